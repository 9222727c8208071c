"""
SIGKILL a small run at random moments, resume it each time, and compare what it ends with, bit for bit, with a run that
nobody disturbed.

    python tests/kill_many.py --kills=200

The runs are forked from this process, which has torch loaded: starting one takes milliseconds instead of seconds.
"""
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch

import config
import prepare_data
import train

SETTINGS = dict(dataset="tiny_char", block="dva", bank_layers=1, n_layer=2, n_embd=48, block_size=16, batch_size=4, dropout=0.1,
                gradient_accumulation_steps=2, optimizer="muon", learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, lr_decay_iters=24,
                max_iters=24, eval_interval=2, eval_iters=1, device="cpu", dtype="float32", compile=False)


@dataclass
class KillConfig:
    kills: int = 20           # how many, at least
    seed: int = 0             # of the moments


def start(argv, log):
    """The process id of a forked train.main(argv)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            signal.alarm(100)                                          # a run that hangs is a failure, not a wait
            train.tqdm.set_lock(threading.RLock())                     # tqdm's own is shared by forks: a kill may leave it taken
            torch.set_num_threads(1)
            train.main(argv)
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status or 0)
    return pid


def saving(out_dir):
    """Is there a checkpoint half written, by the run that was started last?"""
    with contextlib.suppress(FileNotFoundError):                       # renamed while we look
        return any(path.stat().st_mtime > 0 for path in out_dir.glob("*.pt.tmp"))
    return False


def kill_many(folder, cfg):
    """(kills, those during a save, runs, seconds). Asserts that every checkpoint loads and every run ends the same."""
    from conftest import runs_differ
    choose, began = random.Random(cfg.seed), time.time()
    (folder / "text.txt").write_text("".join(choose.choices("abcdefgh \n", k=5000)) + "abcdefgh \n")
    prepare_data.main(["tiny_char", f"--input={folder / 'text.txt'}", f"--data_dir={folder}"])

    def run(out_dir, delay=None, during_save=False):
        """Start or resume, and kill after delay seconds (of a save, if so wished); True when it ended before that."""
        argv = [f"--out_dir={out_dir}"]
        if (out_dir / "last.pt").exists():
            argv += ["--init_from=resume"]
        else:
            argv += ["--overwrite"] + [f"--{name}={value}" for name, value in (SETTINGS | {"data_dir": folder}).items()]
        for path in out_dir.glob("*.pt.tmp"):                          # of an earlier kill: aged, so that a new one is told
            os.utime(path, (0, 0))
        pid = start(argv, folder / "log.txt")
        while during_save and not saving(out_dir) and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(1e-4)
        if delay is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-2000:]
        return status == 0

    started = time.time()
    run(folder / "straight")
    whole = time.time() - started
    kills = during_saves = runs = 0
    while kills < cfg.kills:
        out_dir = folder / "killed"
        shutil.rmtree(out_dir, ignore_errors=True)
        patience = 0.1 * whole                                         # grows: a machine that has become slower gets there
        while not (run(out_dir, choose.uniform(0, 0.003), True) if kills % 4 == 3 else run(out_dir, choose.uniform(0, patience))):
            kills, patience = kills + 1, patience * 1.1
            during_saves += saving(out_dir)
            for path in out_dir.glob("*.pt"):
                train.load_checkpoint(path)
        assert runs_differ(folder / "straight", out_dir) == 0
        runs += 1
    return kills, during_saves, runs, time.time() - began


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kills, during_saves, runs, seconds = kill_many(Path(folder), config.load(KillConfig))
    print(f"{kills} kills, {during_saves} of them during a save, all survived; {runs} runs ended bit-identical to the undisturbed "
          f"one; {seconds:.0f} s")
