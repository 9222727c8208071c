"""Shared by all tests: one thread, a tiny data set made by prepare_data, tiny runs of the real scripts in this process."""
import json
import os
import random
import signal
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}     # for processes, too

import pytest
import torch

import prepare_data
import train

torch.set_num_threads(1)

TINY = dict(dataset="tiny_char", n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=16, batch_size=4, dropout=0.1,
            gradient_accumulation_steps=2, learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, lr_decay_iters=12, max_iters=12,
            eval_interval=5, eval_iters=2, log_interval=1, device="cpu", dtype="float32", compile=False)


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run that fails leaves its handlers behind, as a process may that ends: put pytest's back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the data set tiny_char: 4,500 + 500 characters of invented words."""
    folder = tmp_path_factory.mktemp("data")
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnoprstuvw", k=choose.randint(1, 6))) for _ in range(60)]
    text = " ".join(choose.choices(words, k=2000))[:5000]
    (folder / "tiny.txt").write_text(text + "é")
    prepare_data.main(["tiny_char", f"--input={folder / 'tiny.txt'}", f"--data_dir={folder}"])
    return folder


@pytest.fixture
def arguments(data_dir, tmp_path):
    """arguments(out_dir, **changes): the command line of a tiny run; out_dir is relative to tmp_path."""
    def arguments(out_dir="out", **changes):
        settings = TINY | {"data_dir": data_dir, "out_dir": tmp_path / out_dir} | changes
        return [f"--{name}={value}" for name, value in settings.items()]
    return arguments


@pytest.fixture
def run(arguments, capsys, tmp_path):
    """
    run(out_dir, **changes): train.main() in this process; -> (exit status, stdout, stderr). With init_from="resume" only
    the changes are given, as a user would.
    """
    def run(out_dir="out", **changes):
        resumed = [f"--{name}={value}" for name, value in ({"out_dir": tmp_path / out_dir} | changes).items()]
        return run_main(train.main, resumed if changes.get("init_from") == "resume" else arguments(out_dir, **changes), capsys)
    return run


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The out_dir of a finished tiny run; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    train.main([f"--{name}={value}" for name, value in (TINY | {"data_dir": data_dir, "out_dir": folder}).items()])
    return folder


def run_main(main, argv, capsys):
    """(exit status, stdout, stderr) of a script's main() in this process."""
    capsys.readouterr()
    try:
        main(argv)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def one_error(result):
    """The message of a run that has to end as the user's mistakes do: status 2, one line on stderr."""
    status, _, err = result
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    return err


def metrics(out_dir):
    """The lines of metrics.jsonl without what may differ between runs: timings, and in the header how it was started."""
    lines = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    for name in ("out_dir", "init_from", "overwrite", "max_iters"):
        lines[0]["config"].pop(name)
    return lines[:1] + [{k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_s")} for line in lines[1:]]


def largest_difference(a, b):
    """The largest |difference| of two trees of tensors and numbers; they have to agree in everything else."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b)), default=0.0)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, float):
        return abs(a - b)
    assert a == b, (a, b)
    return 0.0


def runs_differ(a, b):
    """The largest |difference| between two runs: last.pt (weights, optimizers, scaler, step, best loss), best.pt, metrics."""
    largest = 0.0
    for name in ("last.pt", "best.pt"):
        first, second = ({k: v for k, v in train.load_checkpoint(Path(out_dir, name)).items() if k not in ("config", "elapsed_s")}
                         for out_dir in (a, b))
        largest = max(largest, largest_difference(first, second))
    return max(largest, largest_difference(metrics(a), metrics(b)))
