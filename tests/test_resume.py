"""A run that is stopped, killed or continued ends bit for bit like an undisturbed one."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, TINY, comparable, contents, records, refused, runs_differ, send

import prepare_data
import train
from nanodva.checkpoints import load_checkpoint, save

# ---- as if nothing had happened ------------------------------------------------------------------

# Each block, bank, optimizer and dtype, and not all their products
@pytest.mark.parametrize("block, banks, optimizer, dtype", [
    ("gpt2", 0, "adamw", "float32"), ("gpt2", 1, "muon", "bfloat16"),
    ("dva", 1, "muon", "float16"), ("mean", 0, "adamw", "bfloat16")])
def test_resume_is_exact(run, tmp_path, at_step, block, banks, optimizer, dtype):
    """
    Stopped in step 4, after which an evaluation is due, in step 7, after which none is, during the
    evaluation of step 10, and in the last step. Dropout and accumulation are on.
    """
    changes = dict(block=block, bank_layers=banks, optimizer=optimizer, dtype=dtype)
    run("straight", **changes)
    for step in (4, 7, 11):
        at_step(step, send(signal.SIGTERM))
    at_step(10, send(signal.SIGTERM), function="learning_rate")
    for step in (5, 8, 10, 12):
        status, out = run("parts", init_from="auto", **changes)
        assert status == 143 and f"stopped at step {step}" in out
    assert run("parts", init_from="resume")[0] == 0
    assert runs_differ(tmp_path / "straight", tmp_path / "parts") == 0


def test_a_stop_does_not_lose_the_best_model_at_its_step(run, tmp_path, at_step, losses):
    """Stopped at step 5 before its evaluation, which is the best; then come worse."""
    at_step(4, send(signal.SIGTERM))
    assert run()[0] == 143
    losses(2, 3, 4)
    run(init_from="resume")
    best = load_checkpoint(tmp_path / "out" / "best.pt")
    assert (best["step"], best["best_val_loss"]) == (5, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill_many.py forks")
@pytest.mark.parametrize("wanted", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_change_nothing(wanted):
    """In a process of its own, since it forks."""
    command = [sys.executable, ROOT / "tests" / "kill_many.py", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, saves, runs = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert kills >= wanted and saves >= 1 and runs >= 1


# ---- with other settings -------------------------------------------------------------------------

def test_eval_only_on_resume_evaluates_and_writes_nothing(run, finished, tmp_path):
    status, out = run(init_from="resume", eval_only=True, max_iters=1000)
    loss = records(tmp_path / "out")[-1]["val_loss"]
    assert status == 0 and f"val loss {loss:.4f}" in out
    assert "step 12: train loss" in out and "step 13" not in out
    assert contents(tmp_path / "out") == finished


@pytest.mark.parametrize("name, value, words", [
    *((name, value, f"{name}={value!r} differs from the checkpoint's") for name, value in dict(
        n_layer=3, n_embd=32, block="dva", bias=True, block_size=8, bank_layers=1, rotary=True,
        gelu="tanh", optimizer="muon", vocab_size=64, value_norm=False).items()),
    ("max_iters", 10, "max_iters=10: the run is at step 12 already"),
    ("batch_size", 10**12, "out of memory")])
def test_resume_keeps_its_architecture_and_its_folder(run, finished, tmp_path, name, value, words):
    with refused(words):
        run(init_from="resume", **{"max_iters": 20, name: value})
    after = contents(tmp_path / "out")
    if name == "batch_size":
        # It had begun: its metrics, and a copy of the best, which is of other windows
        after = {kept: after[kept] for kept in finished}
        after["metrics.jsonl"] = finished["metrics.jsonl"]
    assert after == finished


def test_a_run_with_wandb_goes_on_where_that_is_not_installed(run, finished, tmp_path,
                                                              monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    last = load_checkpoint(tmp_path / "out" / "last.pt")
    save(last | {"config": last["config"] | {"wandb_log": True}}, tmp_path / "out" / "last.pt")
    with refused("pip install wandb"):
        run(init_from="resume", max_iters=13)
    assert run(init_from="resume", max_iters=13, wandb_log=False)[0] == 0


def test_resume_with_other_settings_says_so_and_means_it(run, finished, tmp_path):
    changes = dict(learning_rate=1e-5, min_lr=1e-6, weight_decay=0.3, beta2=0.9, dropout=0.2,
                   max_iters=14)
    status, out = run(init_from="resume", **changes)
    assert status == 0 and "at step 12, " in out
    assert all(f"{name}={value} (was {TINY.get(name, '')}" in out
               for name, value in changes.items())
    assert "max_iters=14 and lr_decay_iters=12 differ" in out and "--lr_decay_iters=14" in out
    groups = load_checkpoint(tmp_path / "out" / "last.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.3, 0}
    assert groups[0]["betas"] == (0.9, 0.9)
    headers = [record for record in records(tmp_path / "out") if "config" in record]
    assert [header["step"] for header in headers] == [0, 12]
    assert [header["config"]["learning_rate"] for header in headers] == [1e-2, 1e-5]
    assert headers[1]["params"] == headers[0]["params"]
    # The end of the first run is replaced by the step in its place
    steps = [record["step"] for record in records(tmp_path / "out") if "train_loss" in record]
    assert steps == list(range(14))


@pytest.mark.parametrize("before, after, evaluated", [
    (dict(max_iters=25, eval_interval=10), dict(max_iters=35), [30, 35]),
    (dict(max_iters=12), dict(max_iters=20, gradient_accumulation_steps=6, eval_interval=3),
     [15, 18, 20]),
    (dict(max_iters=12, log_interval=5), dict(max_iters=20, log_interval=1, eval_train=False),
     [15, 20]),
    # Step 12 is evaluated again, on other windows
    (dict(max_iters=12), dict(max_iters=16, batch_size=8, dtype="bfloat16", eval_interval=4),
     [12, 16])], ids=str)
def test_every_number_in_the_metrics_stays_right(run, tmp_path, before, after, evaluated):
    """Of the time before a resume and of the time after it, whatever has changed."""
    run(lr_decay_iters=40, dropout=0, **before)
    first = comparable(tmp_path / "out")
    run(init_from="resume", **after)
    lines = comparable(tmp_path / "out")
    assert lines[:len(first)] == first
    assert [line["step"] for line in lines[len(first):] if "val_loss" in line] == evaluated
    # The tokens are those that were read
    a, b = (TINY | change for change in (before, before | after))
    a, b = (16 * c["batch_size"] * c["gradient_accumulation_steps"] for c in (a, b))
    end = before["max_iters"]
    for line in lines:
        assert line["tokens"] == min(line["step"], end) * a + max(0, line["step"] - end) * b


def test_resume_in_another_place_with_a_preset(trained, tmp_path, monkeypatch):
    """out_dir counts wherever it is given; min_lr fits this learning_rate, and not the default."""
    monkeypatch.chdir(tmp_path)
    before = contents(trained)
    Path("more.py").write_text("out_dir = 'moved'\nmax_iters = 13\nmin_lr = 2e-3\n")
    # The default is a place, too
    for folder, preset in (("moved", ["more.py"]), ("out", ["--max_iters=13"])):
        shutil.copytree(trained, folder)
        train.main([*preset, "--init_from=resume"])
        assert load_checkpoint(f"{folder}/last.pt")["step"] == 13
    assert contents(trained) == before


def test_a_best_loss_counts_on_the_data_it_was_measured_on(run, finished, data_dir, tmp_path):
    """Another text is harder: none of its losses is as low as the best on the first."""
    text = (data_dir / "tiny.txt").read_text()
    (tmp_path / "b.txt").write_text("".join(random.Random(1).sample(text, len(text))))
    prepare_data.main(["tiny_char", f"--input={tmp_path / 'b.txt'}", f"--data_dir={tmp_path}"])
    before = load_checkpoint(tmp_path / "out" / "best.pt")
    out = run(init_from="resume", max_iters=15, eval_interval=1, data_dir=tmp_path)[1]
    assert "from here on it trains on other text, 'tiny_char' as it is now" in out
    assert "the best starts again" in out
    best = load_checkpoint(tmp_path / "out" / "best.pt")
    lines = records(tmp_path / "out")
    [resumed] = [i for i, line in enumerate(lines) if "config" in line and i > 0]
    on_b = [line["val_loss"] for line in lines[resumed:] if "val_loss" in line]
    assert best["best_val_loss"] == min(on_b) > before["best_val_loss"]
    assert f"best val loss {min(on_b):.4f}" in out
    [kept] = (tmp_path / "out").glob("best-step12-*.pt")
    assert load_checkpoint(kept)["best_val_loss"] == before["best_val_loss"]


def test_a_best_loss_counts_for_its_windows_and_its_dtype(run, finished):
    for steps, change, again in ((13, {}, False), (14, dict(eval_iters=3), True),
                                 (15, dict(dtype="bfloat16"), True)):
        out = run(init_from="resume", max_iters=steps, **change)[1]
        assert ("the best starts again" in out) == again and "on other text" not in out


def test_a_run_in_float16_can_leave_it_and_come_back(run, tmp_path):
    for step, dtype in ((4, "float16"), (6, "float32"), (8, "float16"), (10, "bfloat16"),
                        (12, "float16")):
        origin = {} if step == 4 else {"init_from": "resume"}
        assert run(max_iters=step, dtype=dtype, **origin)[0] == 0
    lines = [record for record in comparable(tmp_path / "out") if "train_loss" in record]
    assert len(lines) == 12 and lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_what_a_run_chose_it_keeps(run, monkeypatch):
    """On another machine, or with fewer steps to go, it might choose otherwise."""
    chosen = []

    def choose(setting, *rest, first):
        chosen.append(setting)
        return first if setting == "auto" else setting
    monkeypatch.setattr(train.machine, "pick_dtype", partial(choose, first="bfloat16"))
    monkeypatch.setattr(train.machine, "pick_compile", partial(choose, first=False))
    run(dtype="auto", compile="auto", max_iters=4)
    assert "dtype=" not in run(init_from="resume", max_iters=6)[1]
    assert chosen == ["auto", "auto", "bfloat16", False]


# ---- what cannot be resumed ----------------------------------------------------------------------

# What is wrong with last.pt: (how to make it so, the error)
WRONG = {
    "weights alone": (lambda checkpoint: checkpoint.pop("optimizer"), "cannot be resumed"),
    "another alphabet": (lambda checkpoint: checkpoint["tokenizer"].update(alphabet="zyx"),
                         "another tokenizer"),
    "version 3": (lambda checkpoint: checkpoint.update(format=3), "last.pt is of nanoDVA 3"),
    "another version": (lambda checkpoint: checkpoint["config"].update(shift=True),
                        "another version of train.py, which had the settings shift")}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=list(WRONG))
def test_a_run_that_cannot_go_on_is_left_alone(run, finished, tmp_path, change, words):
    path = tmp_path / "out" / "last.pt"
    checkpoint = load_checkpoint(path)
    change(checkpoint)
    save(checkpoint, path)
    before = contents(path.parent)
    for init_from in ("resume", "auto"):
        with refused(words):
            run(init_from=init_from)
    assert contents(path.parent) == before


def test_where_nothing_can_be_resumed_nothing_is_made(run, tmp_path):
    with refused("no ", "last.pt: train first"):
        run("nothing", init_from="resume")
    assert not (tmp_path / "nothing").exists()


def test_a_run_of_before_a_setting_existed_goes_on(run, finished, tmp_path):
    checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")
    del checkpoint["config"]["patience"], checkpoint["config"]["value_norm"]
    save(checkpoint, tmp_path / "out" / "last.pt")
    with refused("value_norm=False differs from the checkpoint's True"):
        run(init_from="resume", max_iters=13, value_norm=False)
    assert run(init_from="resume", max_iters=13)[0] == 0


@pytest.mark.parametrize("kind", ["damaged", "of another run"])
def test_a_best_that_is_not_the_runs_own_does_not_count(run, finished, tmp_path, kind):
    """A run that was to overwrite this one may have been killed between its first two saves."""
    best = tmp_path / "out" / "best.pt"
    if kind == "damaged":
        best.write_bytes(finished["best.pt"][:5000])
    else:
        save(load_checkpoint(best) | {"started": 1.0, "best_val_loss": 0.5}, best)
    status, out = run(init_from="resume", max_iters=13)
    assert status == 0 and ("going on without best.pt" in out) == (kind == "damaged")
    loss = records(tmp_path / "out")[-1]["val_loss"]
    assert load_checkpoint(best)["best_val_loss"] == loss and f"best val loss {loss:.4f}" in out


def test_damaged_metrics(run, finished, tmp_path):
    """A kill may cut the last line, and those of a run that was to begin are not needed."""
    metrics = tmp_path / "out" / "metrics.jsonl"
    for rest in (b"x", b"[]\n", b'{"started": 1}\n{"step'):
        metrics.write_bytes(metrics.read_bytes() + b'{"step": 12, "loss')
        (tmp_path / "out" / "metrics.jsonl.new").write_bytes(rest)
        run(init_from="resume", max_iters=13)
    steps = [record["step"] for record in records(tmp_path / "out") if "train_loss" in record]
    assert steps == list(range(13))
    metrics.write_bytes(b"\0" * 100 + b"\n")
    with refused("metrics.jsonl is damaged"):
        run(init_from="resume", max_iters=14)
    metrics.unlink()
    metrics.mkdir()
    with refused("cannot read", "metrics.jsonl", "move it away"):
        run(init_from="resume", max_iters=14)
