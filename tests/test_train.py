"""Training: what a step is made of, what a run finds, and what is refused before it begins."""
import copy
import gc
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import (
    BLOCKS,
    comparable,
    contents,
    ids_of,
    largest_difference,
    python,
    records,
    refused,
    runs_differ,
    send,
)

import train
from model import GPT
from nanodva import machine
from nanodva.checkpoints import load_checkpoint
from nanodva.dataset import table_rows
from nanodva.machine import Stop
from nanodva.settings import build, change
from train import TrainConfig, get_batch, seed_dropout

CPU = torch.device("cpu")


def settings(**changes):
    shape = dict(block_size=8, batch_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=8,
                 dropout=0.5, gradient_accumulation_steps=4, dtype="float32")
    return build(TrainConfig, shape | changes)


# ---- batches ------------------------------------------------------------------------------------

def test_batches_follow_from_seed_and_step():
    tokens, cfg = np.arange(1000, dtype=np.uint16), settings(vocab_size=1000, batch_size=3)
    batches = [get_batch(tokens, cfg, 7, micro, CPU) for micro in range(4)]
    again = [get_batch(tokens, cfg, 7, micro, CPU) for micro in (3, 2, 1, 0)][::-1]
    for (x, y), (same_x, same_y) in zip(batches, again, strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)
        # y is what follows
        assert torch.equal(x + 1, y) and x.shape == (3, 8) and x.dtype == torch.int64
    others = [x for x, _ in batches[1:]]
    others.append(get_batch(tokens, cfg, 8, 0, CPU)[0])
    others.append(get_batch(tokens, change(cfg, seed=1), 7, 0, CPU)[0])
    assert not any(torch.equal(batches[0][0], x) for x in others)
    # Every window is reached, and the last token is a target, too
    x, y = get_batch(np.arange(10), settings(batch_size=50), 0, 0, CPU)
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 9


def test_dropout_follows_from_seed_step_and_micro_batch():
    found = []
    for seed, step, micro in [(1, 7, 0), (1, 7, 1), (1, 8, 0), (2, 7, 0), (1, 7, 0)]:
        seed_dropout(settings(seed=seed), step, micro)
        found.append(torch.rand(4).tolist())
    assert found[0] == found.pop() and len(set(map(tuple, found))) == 4


# ---- evaluation ----------------------------------------------------------------------------------

def evaluate(tokens, seed=0, **changes):
    cfg = settings(eval_train=False, **changes)
    torch.manual_seed(0)
    model = GPT(cfg)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    found = train.evaluate(model, model, {"val": tokens}, cfg, CPU, Stop())
    assert model.training and torch.equal(before, torch.get_rng_state())
    return found["val"], model.eval()


def test_evaluation_is_exact_the_same_every_time_and_spread_evenly():
    # 11 windows: the last batch is smaller
    tokens = np.random.default_rng(0).integers(16, size=8 * 11 + 5)
    x, y = torch.from_numpy(tokens[:88]).view(11, 8), torch.from_numpy(tokens[1:89]).view(11, 8)
    loss, model = evaluate(tokens, eval_iters=100)
    assert loss == pytest.approx(model(x, y).item(), abs=1e-6)
    assert loss == evaluate(tokens, eval_iters=100, seed=5)[0]
    assert loss == pytest.approx(evaluate(tokens, eval_iters=100, batch_size=3)[0], abs=1e-6)
    loss, spread = evaluate(tokens, eval_iters=1)[0], [0, 2, 5, 8]
    assert loss == pytest.approx(model(x[spread], y[spread]).item(), abs=1e-6)
    # A split of one window
    assert evaluate(tokens[:9])[0] == pytest.approx(model(x[:1], y[:1]).item(), abs=1e-6)


@pytest.mark.parametrize("eval_tokens, count", [(1, 1), (8, 1), (33, 5), (10**6, 11)])
def test_evaluation_windows_need_not_follow_from_the_batch(eval_tokens, count):
    tokens = np.random.default_rng(0).integers(16, size=8 * 11 + 5)
    found = {evaluate(tokens, eval_tokens=eval_tokens, batch_size=size)[0] for size in (1, 4, 7)}
    assert max(found) - min(found) < 1e-6
    assert train.count_windows(tokens, settings(eval_tokens=eval_tokens)) == count


# ---- a run ---------------------------------------------------------------------------------------

def test_every_step_is_logged(trained):
    header, *lines = records(trained)
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(12))
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 10, 12]
    assert all(("val_loss" in line) == ("train_eval_loss" in line) for line in lines)
    assert all(line["grad_norm"] > 0 and line["lr"] > 0 and line["peak_gb"] > 0 for line in steps)
    assert all(line["tokens"] == line["step"] * 2 * 4 * 16 for line in lines)
    assert {"config", "params", "flops_per_token", "world_size", "versions"} < header.keys()
    assert header["config"]["vocab_size"] == 24 and header["config"]["n_embd"] == 16


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_trains_saves_and_samples(run, texts, tmp_path, block):
    """The mean is a block that a reader wrote: two edits, and all scripts know it."""
    status, out = run(block=block, max_iters=25, lr_decay_iters=25, dropout=0, eval_interval=25)
    assert status == 0 and "done: step 25" in out
    lines = comparable(tmp_path / "out")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.2
    assert load_checkpoint(tmp_path / "out" / "best.pt")["model_config"]["block"] == block
    [text] = texts(out_dir=tmp_path / "out", max_new_tokens=40)
    assert text.startswith("ab") and len(text) == 42


@pytest.fixture
def terminal():
    """A terminal that does not tell its size, as a new pseudo-terminal."""
    ends, stream = os.openpty(), io.StringIO()
    stream.isatty, stream.fileno = lambda: True, lambda: ends[0]
    yield stream
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("err, out", [("terminal", "terminal"), ("terminal", "file"),
                                      ("file", "file")])
def test_a_terminal_gets_a_bar_with_the_loss_and_a_file_gets_lines(run, terminal, tmp_path,
                                                                   monkeypatch, err, out):
    kinds = {"terminal": terminal, "file": io.StringIO()}
    monkeypatch.setattr(sys, "stderr", kinds[err])
    monkeypatch.setattr(sys, "stdout", kinds[out])
    run()
    shown, written = (stream.getvalue() for stream in kinds.values())
    losses = [f"loss {record['train_loss']:.4f}" for record in records(tmp_path / "out")
              if "train_loss" in record]
    # Each log line once: in the bar, or as a line of its own
    assert all(loss in shown for loss in losses) == ("terminal" == err)
    assert all(f"{loss}, lr" in written for loss in losses) == ("file" == out)
    assert ", lr" not in shown and "step 5: train loss" in (written if out == "file" else shown)
    # Of many processes one shows a bar
    monkeypatch.setattr(machine, "RANK", 1)
    assert list(machine.bar(range(3))) == [0, 1, 2] and terminal.getvalue() == shown


def test_evaluating_and_logging_never_change_the_training(run, trained, tmp_path):
    out = run(eval_interval=4, log_interval=3, eval_iters=1, eval_train=False)[1]
    assert "train loss" not in out and "val loss" in out
    with_train, without = (load_checkpoint(folder / "last.pt")["model"]
                           for folder in (trained, tmp_path / "out"))
    assert largest_difference(with_train, without) == 0


def test_accumulated_steps_are_those_of_one_large_batch(run, tmp_path):
    """Without dropout, and with the same windows: a step's are sampled at once, and then cut."""
    shape = dict(dropout=0, max_iters=3)
    run("whole", batch_size=8, gradient_accumulation_steps=1, eval_iters=1, **shape)
    run("parts", batch_size=2, gradient_accumulation_steps=4, eval_iters=4, **shape)
    whole, parts = (comparable(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_bits_per_byte_count_the_bytes_of_the_text(run, trained, data_dir):
    _, out = run("nothing", init_from=trained, eval_only=True)
    found = re.search(r"val loss (\S+), (\S+) bits per byte", out)
    loss, bits = float(found[1]), float(found[2])
    meta = json.loads((data_dir / "tiny_char" / "meta.json").read_text())
    # One character takes two bytes
    assert meta["bytes"]["val"] == meta["tokens"]["val"] + 1
    assert bits == pytest.approx(loss / math.log(2) * 501 / 502, abs=1e-3)


def test_wandb_is_told_what_metrics_jsonl_is_told(run, tmp_path, monkeypatch):
    """A stand-in for the package, which is 100 MB."""
    wandb = MagicMock(__spec__="here")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(wandb_log=True, wandb_project="p", wandb_run_name="r", max_iters=3)
    header, *lines = records(tmp_path / "out")
    wandb.init.assert_called_once_with(project="p", name="r", config=header["config"])
    logged = wandb.init.return_value.log.mock_calls
    assert logged == [call(line, step=line["step"]) for line in lines]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("steps", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_steps(run, at_step, steps):
    seen = []

    def look():
        tensors = sum(type(each) is torch.Tensor for each in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * resource.getpagesize(), tensors, len(os.listdir("/proc/self/fd"))))
    at_step(50, look)
    at_step(steps, look)
    run(max_iters=steps + 1, lr_decay_iters=steps + 1, n_layer=1, n_embd=8, batch_size=1,
        gradient_accumulation_steps=1, eval_interval=50, log_interval=10)
    (memory, *counts), (later_memory, *later_counts) = seen
    # It grows by 100 bytes a step, and may grow by a thousand; the allocator has its own ups
    assert later_memory - memory < 300_000 + 1000 * steps and later_counts == counts


@pytest.mark.parametrize("changes", [dict(), dict(init_from="resume"), dict(overwrite=True)],
                         ids=str)
def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(run, finished, tmp_path, changes):
    status, out = run(dry_run=True, max_iters=36_000_000, **changes)
    assert status == 0 and contents(tmp_path / "out") == finished
    [seconds, hours, minutes, rest, steps] = re.search(
        r"dry run: at most (\S+) s a step, (\d+):(\d\d):(\d\d) for (\d+) steps", out).groups()
    expected = 36_000_000 * float(seconds)
    assert int(hours) * 3600 + int(minutes) * 60 + int(rest) == pytest.approx(expected, rel=0.01)
    assert "0.01 M parameters" in out and " GB" in out and "loss" in out


# ---- broken numbers ------------------------------------------------------------------------------

def break_gradients(parameters, largest):
    for p in parameters:
        p.grad.fill_(math.nan)


@pytest.mark.parametrize("function, broken, log_interval, reason", [
    ("learning_rate", lambda step, cfg: 1e30, 1, "step 8 is broken: loss nan, grad norm nan"),
    *(("clip_grad_norm_", lambda *_, norm=norm: torch.tensor(norm), 1,
       f"step 6 is broken: loss [23].*, grad norm {norm}") for norm in (math.nan, math.inf)),
    # Stopped between two logged steps, when nobody has seen the loss
    ("clip_grad_norm_", break_gradients, 100, "step 7 is broken: a weight is not finite")])
def test_broken_numbers_stop_the_run_and_are_never_saved(run, tmp_path, at_step, monkeypatch,
                                                         function, broken, log_interval, reason):
    def break_one():
        monkeypatch.setattr(train, function, broken)
        if log_interval > 1:
            signal.raise_signal(signal.SIGTERM)
    at_step(6, break_one)
    with pytest.raises(train.BrokenLoss, match=reason):
        run(log_interval=log_interval)
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(tmp_path / "out" / name)["step"] == 5


def test_a_broken_evaluation_stops_the_run(run, trained, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pt")
    # Finite, as weights must be to be read, and too large for what is computed with them
    checkpoint["model"]["transformer.ln_f.weight"][:] = 3e38
    torch.save(checkpoint, tmp_path / "broken.pt")
    with pytest.raises(train.BrokenLoss, match="step 0 is broken: the losses are {'train': nan"):
        run("tuned", init_from=tmp_path / "broken.pt")
    assert not list((tmp_path / "tuned").glob("*.pt"))


@pytest.mark.parametrize("optimizer, name", [
    ("adamw", "wte.weight"), ("adamw", "h.1.attn.bank.table"), ("muon", "h.0.attn.c_q.weight")])
def test_one_infinite_gradient_under_float16_leaves_out_the_whole_step(run, tmp_path, at_step,
                                                                      monkeypatch, optimizer, name):
    """Muon's matrices, AdamW's and their averages; the next gradients are scaled half as much."""
    made = []
    for function in ("build_model", "build_optimizer"):
        original = getattr(train, function)
        monkeypatch.setattr(train, function, lambda *args, original=original: made.append(
            original(*args)) or made[-1])

    def break_one():
        model, optimizer = made
        made.extend(copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]]))
        model.get_parameter(f"transformer.{name}").register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.inf))
    at_step(4, break_one)
    run(dtype="float16", optimizer=optimizer, block="dva", bank_layers=1, max_iters=5)
    after = load_checkpoint(tmp_path / "out" / "last.pt")
    assert after["step"] == 5 and after["scaler"]["scale"] == 2.0**15
    assert largest_difference([after["model"], after["optimizer"]["state"]],
                              [dict(made[2]), made[3]]) == 0


# ---- compiling -----------------------------------------------------------------------------------

def no_compiler(graph, inputs):
    raise OSError("failed to map segment from shared object")


@pytest.fixture
def failing_compiler(monkeypatch):
    """torch.compile does all but the last step, for which it lacks a compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options:
                        compile(model, backend=no_compiler, **options))
    monkeypatch.setattr(machine, "pick_compile", lambda setting, device, flops: bool(setting))
    torch._dynamo.reset()


def test_compiling_that_fails_is_done_without(run, tmp_path, failing_compiler):
    run("straight", compile=False)
    status, out = run(compile="auto")
    assert status == 0 and "runs uncompiled: BackendCompilerFailed: backend='no_compiler'" in out
    assert runs_differ(tmp_path / "straight", tmp_path / "out") == 0
    with refused("compile=True: torch.compile fails here; --compile=False goes on without"):
        run("other", compile=True)
    assert contents(tmp_path / "other") == {"metrics.jsonl": b""}


def test_what_only_looks_like_a_compiler_that_fails(run, monkeypatch, failing_compiler):
    """A mistake in a block keeps its traceback. Ctrl-C, which ends the compiler, too, is a stop."""
    with monkeypatch.context() as during, pytest.raises(RuntimeError, match="size mismatch"):
        during.setattr(BLOCKS["mean"], "forward", lambda self, x, *rest: x @ torch.ones(3))
        run(block="mean", compile=True)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options:
                        signal.raise_signal(signal.SIGINT) or compile(model, **options))
    assert run(compile=True)[0] == 130


@pytest.mark.slow
def test_a_cpp_compiler_that_fails_is_done_without(arguments, tmp_path):
    """By Inductor itself, in a process of its own."""
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    code = ("import sys, train\ntrain.machine.pick_compile = lambda *_: True\n"
            "train.main(sys.argv[1:])")
    done = python(code, *arguments(compile="auto"), TORCHINDUCTOR_FX_GRAPH_CACHE="0",
                  PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and "runs uncompiled: " in done.stdout, done.stderr
    assert "done: step 12" in done.stdout and "Traceback" not in done.stderr


# ---- other data ----------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary_are_named(run, tmp_path, data_dir, split):
    shutil.copytree(data_dir / "tiny_char", tmp_path / "tiny_char")
    ids = ids_of(tmp_path / "tiny_char", split)
    np.full_like(ids, 60000 if split == "train" else 24).tofile(tmp_path / f"tiny_char/{split}.bin")
    with refused("vocab_size=24", str(tmp_path / "tiny_char"), "--check"):
        run(data_dir=tmp_path)


def test_a_table_may_be_padded_as_gpt2s_is(run, tmp_path):
    run(vocab_size=64, max_iters=1)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["model_config"]["vocab_size"] == 64
    assert [table_rows({"vocab_size": size}) for size in (50257, 4096)] == [50304, 4096]


# ---- stopping ------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(run, tmp_path, at_step, number):
    """Ctrl-C, a scheduler's end, a closed terminal, and Slurm's warning; nohup ignores some."""
    at_step(6, send(number))
    ended, out = run()
    assert ended == 128 + number and "stopped at step 7" in out
    assert f"continue:  python train.py --init_from=resume --out_dir={tmp_path / 'out'}" in out
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 7
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_step(8, send(number))
        assert run(init_from="resume")[0] == 0
    finally:
        signal.signal(number, before)


def test_a_signal_during_an_evaluation_leaves_it_at_the_next_batch(run, tmp_path, at_step,
                                                                   monkeypatch):
    batches, windows = [], train.windows
    monkeypatch.setattr(train, "windows", lambda *args: batches.append(args) or windows(*args))
    at_step(10, lambda: (batches.clear(), signal.raise_signal(signal.SIGTERM)), "learning_rate")
    assert run(eval_iters=100)[0] == 143 and len(batches) == 1
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 10


@pytest.mark.parametrize("gone", ["pipe", "terminal"])
@pytest.mark.parametrize("number", [None, signal.SIGHUP])
def test_a_run_goes_on_when_nobody_can_read_what_it_says(run, tmp_path, monkeypatch, at_step, gone,
                                                         number):
    """`| head -4`, or a terminal that is closed; both streams."""
    ours, theirs = os.pipe()[::-1] if gone == "pipe" else os.openpty()[::-1]
    with os.fdopen(ours, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        at_step(3, lambda: os.close(theirs))
        if number:
            at_step(6, send(number))
        assert run()[0] == (128 + number if number else 0)
    saved = load_checkpoint(tmp_path / "out" / "last.pt")["step"]
    assert saved == (7 if number else 12) and records(tmp_path / "out")[-1]["step"] >= saved - 1
