"""
Kill a small run at random moments, resume it each time, and compare how it ends, bit for bit, with
a run that nobody disturbed.

    python tests/kill_many.py 200

The runs are forked from this process, which has torch loaded, so that one starts in milliseconds.
"""
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

# The first optimizer imports it, which takes a second: once here, not once in each run
import torch._dynamo
from conftest import TINY, command_line, runs_differ

import prepare_data
import train
from nanodva.checkpoints import load_checkpoint

SETTINGS = TINY | dict(block="dva", bank_layers=1, n_embd=48, optimizer="muon", eval_interval=2,
                       eval_iters=1, max_iters=16, lr_decay_iters=16, init_from="auto",
                       overwrite=True)


def start(out_dir, data_dir):
    """The id of a forked process that trains: from scratch, or on from last.pt if it exists."""
    argv = command_line(SETTINGS | {"out_dir": out_dir, "data_dir": data_dir})
    pid = os.fork()
    if pid > 0:
        return pid
    status = 1
    try:
        log = os.open(data_dir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # A run that hangs is a failure, and nothing to wait for
        signal.alarm(100)
        # Forks share tqdm's own lock, and one that was killed may hold it
        train.tqdm.set_lock(threading.RLock())
        train.main(argv)
        status = 0
    finally:
        os._exit(status)


def train_until_killed(out_dir, data_dir, delay, during_save):
    """True if the run ended before it was killed, `delay` seconds after its start or a save's."""
    for path in out_dir.glob("*.pt.tmp"):
        # Of an earlier kill
        path.unlink()
    pid, ended = start(out_dir, data_dir), None
    while during_save and not ended and not any(out_dir.glob("*.pt.tmp")):
        time.sleep(1e-4)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), (data_dir / "log.txt").read_text()[-2000:]
    return status == 0


def kill_many(folder, wanted):
    """
    Kill `wanted` times or more, every third time during a save -> (kills, those during a save,
    runs). Every checkpoint loads, and every run ends the same.
    """
    choose = random.Random(0)
    (folder / "text.txt").write_text(" ".join(choose.choices(["to", "be", "or", "not"], k=2000)))
    prepare_data.main(["tiny_char", f"--input={folder / 'text.txt'}", f"--data_dir={folder}"])
    began = time.time()
    status = os.waitpid(start(folder / "straight", folder), 0)[1]
    assert status == 0, (folder / "log.txt").read_text()[-2000:]
    whole_run = time.time() - began
    kills = during_saves = runs = 0
    while kills < wanted or during_saves == 0:
        out_dir, patience, has_ended = folder / "killed", 0.6 * whole_run, False
        shutil.rmtree(out_dir, ignore_errors=True)
        while not has_ended:
            during_save = kills % 3 == 2
            delay = choose.uniform(0, 0.002 if during_save else patience)
            has_ended = train_until_killed(out_dir, folder, delay, during_save)
            kills += not has_ended
            # It grows, so that a machine that has become slower gets there, too
            patience *= 1.1
            during_saves += any(out_dir.glob("*.pt.tmp"))
            for path in out_dir.glob("*.pt"):
                load_checkpoint(path)
        assert runs_differ(folder / "straight", out_dir) == 0
        runs += 1
    return kills, during_saves, runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills, saves, runs = kill_many(Path(folder), int(sys.argv[1]))
    print(f"{kills} kills, {saves} of them during a save, all survived; {runs} runs ended "
          f"bit-identical to the undisturbed one")
