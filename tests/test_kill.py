"""Processes that are killed, and real ones that are signalled."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import metrics, runs_differ

import train

TESTS = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill_many.py forks")
def test_twenty_kills_change_nothing():
    """In a process of its own, since it forks."""
    done = subprocess.run([sys.executable, TESTS / "kill_many.py", "--kills=20"], capture_output=True, text=True)
    print(done.stdout)
    kills, saves, runs = map(int, re.search(r"(\d+) kills, (\d+) of .* survived; (\d+) runs", done.stdout + done.stderr[-3000:]).groups())
    assert done.returncode == 0 and kills >= 20 and saves >= 3 and runs >= 1


def test_a_real_process_stops_and_resumes(arguments, run, tmp_path):
    """python train.py, stopped by a SIGTERM from outside: exit status 143, and in the end nothing was lost."""
    process = subprocess.Popen([sys.executable, "train.py", *arguments(max_iters=100_000, lr_decay_iters=60)], cwd=TESTS.parent,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 7:"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "continue:  python train.py --init_from=resume" in rest
    step = train.load_checkpoint(tmp_path / "out" / "last.pt")["step"]
    assert f"stopped at step {step}" in rest and step >= 8
    run(init_from="resume", max_iters=step + 5)
    run("straight", max_iters=step + 5, lr_decay_iters=60)
    assert runs_differ(tmp_path / "straight", tmp_path / "out") == 0
