"""Training: what a step is made of, and a run that can be stopped, killed, resumed and trusted."""
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, one_error, run_main, runs_differ

import sample
import train
from model import BLOCKS, GPT, ModelConfig
from optimizers import Muon, build_optimizers, learning_rate
from train import TrainConfig

ON_LINUX = os.path.exists("/proc/self/statm")


@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, action): call action() in that step of every run, before its forward pass."""
    def at_step(wanted, action):
        original = train.learning_rate
        monkeypatch.setattr(train, "learning_rate", lambda step, cfg: (step == wanted and action(), original(step, cfg))[1])
    return at_step


@pytest.fixture
def losses(monkeypatch):
    """losses(*values): what the evaluations find on the val split, one after another."""
    def losses(*values):
        found = iter(value for value in values for _ in ("train", "val"))
        monkeypatch.setattr(train, "evaluate", lambda *_: next(found))
    return losses


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- a step ---------------------------------------------------------------------------------------------------------

def test_schedule():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=24)
    rates = [learning_rate(step, cfg) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55)                            # half way down the cosine
    assert all(a > b for a, b in zip(rates[4:24], rates[5:25]))
    assert rates[24:] == pytest.approx([0.1] * 16)
    cfg.decay_lr = False
    assert {learning_rate(step, cfg) for step in range(40)} == {1.0}


@pytest.mark.parametrize("warmup, decay", [(0, 0), (0, 10), (10, 10), (10, 0), (1, 1)])
def test_schedule_edges(warmup, decay):
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=decay)
    rates = [learning_rate(step, cfg) for step in range(30)]
    assert all(0 < rate <= 1 for rate in rates) and rates[warmup] == 1.0 and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("banks", [0, 1])
@pytest.mark.parametrize("block", BLOCKS)
def test_each_parameter_is_in_one_group(block, banks, optimizer):
    model = GPT(ModelConfig(block=block, bank_layers=banks, vocab_size=9, n_layer=2, n_head=2, n_embd=8, qk_dim=4, bias=True))
    names = {p: name for name, p in model.named_parameters()}
    found = []
    for each in build_optimizers(model, TrainConfig(optimizer=optimizer)):
        for group in each.param_groups:
            for p in group["params"]:
                found.append(names[p])
                matrix = p.dim() == 2 and names[p].startswith("transformer.h.") and ".bank" not in names[p]
                assert isinstance(each, Muon) == (optimizer == "muon" and matrix), names[p]
                assert isinstance(each, torch.optim.SparseAdam) == names[p].endswith("attn.bank.weight"), names[p]
                decayed = p.dim() == 2 and ".bank" not in names[p]
                assert (group.get("weight_decay", 0) > 0) == decayed, names[p]
    assert sorted(found) == sorted(names.values())


def test_compile_is_for_long_runs(monkeypatch, tmp_path):
    def pick(setting, device, flops, eval_only=False):
        cfg = TrainConfig(compile=setting, max_iters=10, gradient_accumulation_steps=2, batch_size=5, block_size=1, eval_only=eval_only)
        return train.pick_compile(cfg, torch.device(device), flops / 100)

    monkeypatch.setattr(train.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(train.sysconfig, "get_path", lambda name: tmp_path)
    assert not pick("auto", "cpu", 1e15)                               # no Python.h
    (tmp_path / "Python.h").touch()
    assert pick("auto", "cpu", 1e15) and pick("auto", "cuda", 1) and pick(True, "cpu", 1) and pick(True, "mps", 1)
    assert not (pick("auto", "cpu", 1e14) or pick("auto", "cpu", 1e15, eval_only=True) or pick("auto", "mps", 1e15) or pick(False, "cpu", 1e15) or pick(False, "cuda", 1e15))
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    assert not pick("auto", "cpu", 1e15) and pick(True, "cpu", 1)


def test_muon_is_torchs():
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8), (24, 8), (8, 24), (1, 5)]      # some alike, tall, flat, square, a single row
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    left_out = torch.nn.Parameter(torch.ones(8, 8))                    # without a gradient
    optimizers = (Muon([*ours, left_out], lr=0.1, weight_decay=0.3),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)        # bfloat16 inside; a step moves elements by about 0.02
    assert (left_out == 1).all()
    with pytest.raises(ValueError, match="Muon is for matrices"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1)


def test_batches_follow_from_seed_and_step():
    tokens, cpu = np.arange(1000, dtype=np.uint16), torch.device("cpu")
    cfg = TrainConfig(block_size=8, batch_size=3, gradient_accumulation_steps=4, vocab_size=1000)
    step_7 = [train.get_batch(tokens, cfg, 7, micro, cpu) for micro in range(4)]
    again = [train.get_batch(tokens, cfg, 7, micro, cpu) for micro in (3, 2, 1, 0)][::-1]
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(step_7, again))
    assert all(torch.equal(x + 1, y) and x.shape == (3, 8) for x, y in step_7)     # y is what follows
    others = [train.get_batch(tokens, TrainConfig(**vars(cfg) | change), step, 0, cpu)[0]
              for change, step in [({}, 8), ({"seed": 1}, 7)]] + [x for x, _ in step_7[1:]]
    assert not any(torch.equal(step_7[0][0], x) for x in others)


def test_batches_reach_every_window():
    cfg = TrainConfig(block_size=8, batch_size=50, gradient_accumulation_steps=1, vocab_size=10)
    x, y = train.get_batch(np.arange(10), cfg, 0, 0, torch.device("cpu"))
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 9            # the last token is a target, too


def evaluate(tokens, seed=0, **changes):
    cfg = TrainConfig(block_size=8, batch_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5, **changes)
    torch.manual_seed(0)
    model = GPT(cfg)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    loss = train.evaluate(model, tokens, cfg, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    assert model.training and torch.equal(before, torch.get_rng_state())
    return loss, model


def test_evaluation_is_fixed_and_exact():
    tokens = np.random.default_rng(0).integers(16, size=8 * 11 + 5)    # 11 windows: the last batch is smaller
    loss, model = evaluate(tokens, eval_iters=100)
    rows = torch.from_numpy(tokens[:88]).view(11, 8), torch.from_numpy(tokens[1:89]).view(11, 8)
    assert loss == pytest.approx(model.eval()(*rows)[1].item(), abs=1e-6)
    assert loss == evaluate(tokens, eval_iters=100, seed=5)[0]
    few = evaluate(tokens, eval_iters=1)[0]                            # windows 0, 2, 5 and 8: spread over all of it
    spread = [0, 2, 5, 8]
    assert few == pytest.approx(model(rows[0][spread], rows[1][spread])[1].item(), abs=1e-6)


def test_training_learns(run, tmp_path):
    assert run(max_iters=50, dropout=0)[0] == 0
    lines = metrics(tmp_path / "out")
    assert lines[-1]["val_loss"] < lines[1]["val_loss"] - 0.2
    assert [line["step"] for line in lines[1:]] == list(range(51))
    assert all(line["grad_norm"] > 0 and line["tokens"] == line["step"] * 2 * 4 * 16 for line in lines[1:-1])
    assert {"config", "params", "flops_per_token", "world_size", "versions"} == lines[0].keys()


# ---- resuming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("banks", [0, 1])
@pytest.mark.parametrize("block", BLOCKS)
def test_resume_is_exact(run, tmp_path, at_step, block, banks, optimizer, dtype):
    """Stopped after step 5, where an evaluation is due, and after step 8, where none is; dropout and accumulation are on."""
    changes = dict(block=block, bank_layers=banks, optimizer=optimizer, dtype=dtype)
    assert run("straight", **changes)[0] == 0
    for stop in (5, 8):
        at_step(stop - 1, lambda: signal.raise_signal(signal.SIGTERM))
    status, out, _ = run("parts", **changes)
    assert status == 143 and "stopped at step 5" in out and "train.py --init_from=resume --out_dir=" in out
    assert run("parts", init_from="resume")[0] == 143
    assert run("parts", init_from="resume")[0] == 0
    assert runs_differ(tmp_path / "straight", tmp_path / "parts") == 0


def test_resume_with_more_steps(run, tmp_path):
    run("straight")
    run("parts", max_iters=7)
    status, out, _ = run("parts", init_from="resume", max_iters=12)
    assert status == 0 and "at step 7, max_iters=12 (was 7)\n" in out
    assert runs_differ(tmp_path / "straight", tmp_path / "parts") == 0


def test_intervals_never_change_the_training(run, tmp_path):
    run("a", eval_interval=5, log_interval=1)
    run("b", eval_interval=4, log_interval=3, eval_iters=1)
    a, b = (train.load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_eval_only_on_resume(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    status, out, _ = run(init_from="resume", eval_only=True, max_iters=1000)
    loss = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert status == 0 and f"step 12: train loss" in out and f"val loss {loss:.4f}" in out and "step 13" not in out
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [dict(n_layer=3), dict(n_embd=32), dict(block="dva"), dict(bias=True), dict(block_size=8),
                                    dict(bank_layers=1), dict(shift=True), dict(rotary=True), dict(gelu="tanh"), dict(optimizer="muon")], ids=str)
def test_resume_keeps_its_architecture(run, trained, tmp_path, change):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    (name, value), = change.items()
    assert f"{name}={value!r} differs from the checkpoint's" in one_error(run(init_from="resume", **change))
    assert contents(tmp_path / "out") == before


def test_resume_of_a_dva_of_before_rotary_positions(run, tmp_path):
    run(block="dva", rotary=False, max_iters=4)
    checkpoint = train.load_checkpoint(tmp_path / "out" / "last.pt")
    del checkpoint["config"]["rotary"], checkpoint["model_config"]["rotary"]
    torch.save(checkpoint, tmp_path / "out" / "last.pt")
    assert "rotary=True differs from the checkpoint's False" in one_error(run(init_from="resume", rotary=True))
    assert run(init_from="resume", max_iters=6)[0] == 0
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["model_config"]["rotary"] is False


def test_resume_with_other_settings_says_so_and_means_it(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    changes = dict(learning_rate=1e-5, min_lr=1e-6, weight_decay=0.3, beta2=0.9, dropout=0.2, max_iters=14)
    status, out, _ = run(init_from="resume", **changes)      # (a min_lr above the default learning_rate was an error once)
    assert status == 0 and all(f"{name}={value} (was {TINY.get(name, '')}" in out for name, value in changes.items())
    groups = train.load_checkpoint(tmp_path / "out" / "last.pt")["optimizers"][0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.3 and groups[0]["betas"] == (0.9, 0.9) and groups[1]["weight_decay"] == 0


def test_resume_with_a_setting_that_only_fits_its_own(run, tmp_path):
    run(learning_rate=0.05, min_lr=0.01)                               # 0.01 is above the default learning_rate
    assert run(init_from="resume", min_lr=0.02, max_iters=13)[0] == 0


def test_resume_needs_last_pt_and_the_same_alphabet(run, trained, tmp_path, data_dir):
    assert "train first" in one_error(run(init_from="resume"))
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(data_dir / "tiny_char", tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    meta["tokenizer"]["alphabet"] = meta["tokenizer"]["alphabet"][::-1]
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta))
    assert "another tokenizer" in one_error(run(init_from="resume", data_dir=tmp_path, dataset="other"))
    shutil.copy(tmp_path / "out" / "best.pt", tmp_path / "out" / "last.pt")
    assert "cannot be resumed" in one_error(run(init_from="resume"))
    (tmp_path / "out" / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    (tmp_path / "out" / "metrics.jsonl").write_bytes(b"\0" * 100 + b"\n")
    assert "metrics.jsonl is damaged" in one_error(run(init_from="resume"))


# ---- stopping -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step(run, tmp_path, at_step, number, status):
    at_step(6, lambda: signal.raise_signal(number))
    code, out, _ = run()
    assert code == status and "stopped at step 7" in out and "continue:  python train.py --init_from=resume" in out
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 7


def test_a_signal_in_the_last_step_loses_no_evaluation(run, tmp_path, at_step):
    run("straight")
    at_step(11, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("parts")[0] == 143
    assert run("parts", init_from="resume")[0] == 0
    assert runs_differ(tmp_path / "straight", tmp_path / "parts") == 0


def test_a_second_interrupt_ends_at_once(run, tmp_path, at_step):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    at_step(6, twice)
    status, _, err = run()
    assert status == 130 and err == "stopped at once\n"
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5


def test_a_second_interrupt_during_the_save(run, tmp_path, at_step, monkeypatch):
    """The step is finished, the save begins, the user is impatient: the checkpoint before it stays."""
    fsync, calls = os.fsync, []
    def interrupted(file):
        calls.append(file)
        if len(calls) == 4:                                            # metrics, then best.pt and last.pt of step 5
            signal.raise_signal(signal.SIGINT)
        fsync(file)
    monkeypatch.setattr(os, "fsync", interrupted)
    at_step(6, lambda: signal.raise_signal(signal.SIGINT))
    assert run()[0] == 130
    assert len(calls) == 4 and train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5


@pytest.mark.parametrize("limit, file", [(2000, "metrics.jsonl"), (10_000, "best.pt"), (200_000, "last.pt")])
def test_a_full_disk(run, tmp_path, at_step, limit, file):
    """RLIMIT_FSIZE stands for it: no file grows beyond the limit. (best.pt takes 110 kB here, last.pt 330.)"""
    run("straight", n_embd=32)
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    run(n_embd=32)
    before = contents(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        error = one_error(run(init_from="resume", log_interval=1 if file == "metrics.jsonl" else 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in error and "is untouched" in error
    after = contents(tmp_path / "out")
    assert after["last.pt"] == before["last.pt"] and not [name for name in after if name.endswith(".tmp")]
    assert ("best.pt" in after) == (file == "last.pt")
    assert run(init_from="resume")[0] == 0                             # there is room again
    assert runs_differ(tmp_path / "straight", tmp_path / "out") == 0


# ---- what is written ------------------------------------------------------------------------------------------------

def test_never_overwrites_silently(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    error = one_error(run())
    assert all(text in error for text in ("best.pt, last.pt, metrics.jsonl", "--init_from=resume", "--overwrite=True"))
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(max_iters=1, eval_interval=50, overwrite=True)[0] == 0
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 1
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert len(metrics(tmp_path / "out")) == 3                         # header, step 0, the end


@pytest.mark.parametrize("always", [True, False])
def test_best_is_only_replaced_by_better(run, tmp_path, losses, monkeypatch, always):
    saved = []
    original = train.save
    monkeypatch.setattr(train, "save", lambda checkpoint, path: (saved.append((path.name, checkpoint["step"])),
                                                                original(checkpoint, path)))
    losses(9, 3, 2, 5, 4)                                              # at steps 0, 3, 6, 9 and 11
    assert run(max_iters=11, eval_interval=3, always_save_checkpoint=always)[0] == 0
    best, last = (train.load_checkpoint(tmp_path / "out" / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["best_val_loss"]) == (6, 2) and (last["step"], last["best_val_loss"]) == (11, 2)
    assert [step for name, step in saved if name == "best.pt"] == [3, 6]
    assert [step for name, step in saved if name == "last.pt"] == ([3, 6, 9, 11] if always else [3, 6, 11])
    losses(1.9, 2.5)                                                   # resumed, the best so far is known
    assert run(init_from="resume", max_iters=15)[0] == 0
    assert train.load_checkpoint(tmp_path / "out" / "best.pt")["step"] == 12


def test_best_survives_a_kill_before_last(run, tmp_path, losses):
    """Killed between the saves of best.pt and last.pt, and resumed with other settings: best.pt is the better one still."""
    losses(9, 3, 2)
    run(max_iters=6, eval_interval=3)
    (tmp_path / "out" / "best.pt").rename(tmp_path / "best.pt")
    losses(9, 3)
    run(max_iters=3, eval_interval=3, overwrite=True)
    (tmp_path / "best.pt").rename(tmp_path / "out" / "best.pt")
    losses(3, 2.5)
    run(init_from="resume", max_iters=6, learning_rate=2e-2)
    assert train.load_checkpoint(tmp_path / "out" / "best.pt")["best_val_loss"] == 2


def test_without_the_train_split(run, tmp_path):
    """Half the work of an evaluation left out changes nothing else."""
    _, out, _ = run("with")
    assert "train loss" in out
    _, out, _ = run("without", eval_train=False)
    assert "train loss" not in out and "val loss" in out
    first, second = (metrics(tmp_path / name)[1:] for name in ("with", "without"))
    assert [{k: v for k, v in record.items() if k != "train_eval_loss"} for record in first] == second != first


def test_when_each_loss_was_reached(run, losses, tmp_path):
    losses(3.14, 2.5, 2.7, 2.44, 2.41)
    _, out, _ = run(eval_interval=3)
    said = re.findall(r"^val loss ([\d.]+) or less after ([\d.]+) s$", out, re.MULTILINE)
    assert [level for level, _ in said] == ["3.2", "2.5"] and 0 <= float(said[0][1]) <= float(said[1][1])


def test_the_last_step_is_saved(run, tmp_path):
    run(max_iters=8, eval_interval=100)
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 8 and (tmp_path / "out" / "best.pt").exists()
    assert run("none", max_iters=0)[0] == 0
    assert train.load_checkpoint(tmp_path / "none" / "last.pt")["step"] == 0


# ---- broken numbers -------------------------------------------------------------------------------------------------

def test_a_broken_loss_stops_the_run(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    error = one_error(run(init_from="resume", max_iters=1000, learning_rate=1e30, min_lr=1e30))
    assert all(text in error for text in ("step 13 is broken: loss nan", "grad norm nan", "lr 1e+30", "untouched"))
    after = contents(tmp_path / "out")
    assert after["best.pt"] == before["best.pt"] and train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 12


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_broken_gradient_stops_the_run(run, tmp_path, monkeypatch, at_step, norm):
    at_step(7, lambda: monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(norm)))
    error = one_error(run())
    assert f"step 7 is broken: loss 2" in error.replace("loss 3", "loss 2") and f"grad norm {norm}" in error and "lr 0.0" in error
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5


def test_a_broken_evaluation_stops_the_run(run, tmp_path, losses):
    losses(9, 3, math.nan)
    assert "validation loss is nan at step 10 (lr" in one_error(run())
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5


# ---- safe to open ---------------------------------------------------------------------------------------------------

class Harm:
    """Unpickled, it would make a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(trained, path, kind):
    """A file of each wrong kind at path."""
    good = (trained / "last.pt").read_bytes()
    if kind in ("code", "a list", "a foreign dict"):
        torch.save({"code": {"format": 1, "model": Harm(path.parent / "harm")}, "a list": [1], "a foreign dict": {"a": 1}}[kind], path)
    elif kind == "a pickle of code":
        path.write_bytes(pickle.dumps(Harm(path.parent / "harm")))
    elif kind == "a zip file":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "one wrong bit":
        middle = good.index(b"data/0") + 3000
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:])
    else:
        path.write_bytes({"empty": b"", "text": b"hello\n", "half": good[:len(good) // 2], "cut short": good[:-1]}[kind])


@pytest.mark.parametrize("kind", ["code", "a pickle of code", "empty", "text", "half", "cut short", "one wrong bit", "a zip file",
                                  "a folder", "a list", "a foreign dict"])
def test_only_checkpoints_are_opened(run, trained, tmp_path, capsys, kind):
    (tmp_path / "out").mkdir()
    damaged(trained, tmp_path / "out" / "last.pt", kind)
    errors = [one_error(run(init_from="resume")), one_error(run_main(sample.main, [f"--out_dir={tmp_path / 'out'}"], capsys))]
    assert all("last.pt " in error and "weights_only" not in error for error in errors)
    assert all("mkdir, and only tensors, numbers and text are read" in error for error in errors if kind == "code")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out" / "harm").exists()


# ---- wrong data, wrong folders --------------------------------------------------------------------------------------

WRONG_DATA = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no "),
    "no train.bin": (lambda folder: (folder / "train.bin").unlink(), "no "),
    "no val.bin": (lambda folder: (folder / "val.bin").unlink(), "no "),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "no "),
    "empty train.bin": (lambda folder: (folder / "train.bin").write_bytes(b""), "0 bytes"),
    "empty val.bin": (lambda folder: rewrite(folder, "val", []), "0 tokens"),
    "an odd byte": (lambda folder: (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1]), "bytes"),
    "short val.bin": (lambda folder: rewrite(folder, "val", [1] * 16), "block_size=16 needs at least 17"),
    "ids beyond the vocabulary": (lambda folder: rewrite(folder, "train", [60000] * 5000), "beyond vocab_size"),
    "ids beyond it in val.bin": (lambda folder: rewrite(folder, "val", [60000] * 500), "beyond vocab_size"),
    "empty meta.json": (lambda folder: (folder / "meta.json").write_text(""), "not what its meta.json describes"),
    "a list in meta.json": (lambda folder: (folder / "meta.json").write_text("[]"), "not what its meta.json describes"),
    "not UTF-8 in meta.json": (lambda folder: (folder / "meta.json").write_bytes(b'{"\xff": 1}'), "not what its meta.json describes"),
    "meta.json of another version": (lambda folder: edit_meta(folder, format=2), "not what its meta.json describes"),
    "another dtype": (lambda folder: edit_meta(folder, dtype="int8"), "not what its meta.json describes"),
    "no vocabulary size": (lambda folder: edit_meta(folder, vocab_size=None), "not what its meta.json describes"),
}


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def rewrite(folder, split, ids):
    meta = json.loads((folder / "meta.json").read_text())
    np.array(ids, dtype=meta["dtype"]).tofile(folder / f"{split}.bin")
    edit_meta(folder, tokens=meta["tokens"] | {split: len(ids)})


@pytest.mark.parametrize("kind", WRONG_DATA)
def test_wrong_data_is_named(run, tmp_path, data_dir, kind):
    shutil.copytree(data_dir / "tiny_char", tmp_path / "tiny_char")
    damage, message = WRONG_DATA[kind]
    damage(tmp_path / "tiny_char")
    error = one_error(run(data_dir=tmp_path))
    assert message in error and str(tmp_path / "tiny_char") in error


def test_a_vocabulary_too_small_is_named(run):
    assert "beyond vocab_size=5" in one_error(run(vocab_size=5))


@pytest.mark.parametrize("out_dir", ["file", "file/below", "x" * 300, "/proc/nothing"])
def test_an_out_dir_that_cannot_be(run, tmp_path, out_dir):
    (tmp_path / "file").write_text("in the way")
    assert "cannot use" in one_error(run(out_dir))
    assert one_error(run(out_dir, init_from="resume"))


@pytest.mark.parametrize("device", ["cuda:99", "cpu:", "tpu", "meta", "", "cuda:-1"])
def test_a_device_that_is_not_there(run, device):
    assert f"device={device!r} is not on this machine: there are" in one_error(run(device=device))


# ---- long runs ------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not ON_LINUX, reason="reads /proc")
def test_3000_steps_take_no_more_memory_than_300(run, at_step):
    seen = {}
    for step in (300, 3000):
        at_step(step, lambda step=step: seen.update({step: (int(Path("/proc/self/statm").read_text().split()[1])
                                                            * resource.getpagesize(), len(os.listdir("/proc/self/fd")))}))
    assert run(max_iters=3001, lr_decay_iters=3001, n_layer=1, n_embd=8, batch_size=1, gradient_accumulation_steps=1,
               eval_interval=100, log_interval=10)[0] == 0
    (memory, files), (later_memory, later_files) = seen[300], seen[3000]
    print(f"RSS {memory / 2**20:.1f} MiB at step 300, {later_memory / 2**20:.1f} at step 3000; files {files}, {later_files}")
    assert later_memory - memory < 4 * 2**20 and later_files == files
