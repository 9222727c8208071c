"""A run's folder: nothing in it is lost, half written, or opened that could do harm."""
import errno
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, contents, full_disk, python, records, refused, runs_differ, send

import prepare_data
import sample
import train
from nanodva import checkpoints
from nanodva.checkpoints import FORMAT, load_checkpoint, save
from nanodva.errors import only_writer

# ---- nothing is lost by overwriting --------------------------------------------------------------

MINE = ["notes.txt", "best.pt.old", "last.pt.old", "metrics.jsonl.old", "best-before-tuning.pt",
        "best-13.pt", "last (copy).pt", "best.pt.bak", "old/last.pt.old"]


def test_what_a_run_did_not_write_is_not_its_to_touch(run, finished, tmp_path):
    """Copies of a person's own: after a start that is refused, a resume, and a new run."""
    (tmp_path / "out" / "old").mkdir()
    for name in MINE:
        (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path / "out")
    with refused("last.pt and best.pt", "--init_from=resume", "--overwrite=True", "--out_dir"):
        run()
    assert contents(tmp_path / "out") == before
    run(init_from="resume", max_iters=13)
    run(init_from="resume", max_iters=14, eval_iters=1)
    run(max_iters=1, eval_interval=50, overwrite=True)
    after = contents(tmp_path / "out")
    assert {after.pop(name) for name in MINE} == {b"mine"} and after.pop("old") is None
    [kept] = set(after) - {"last.pt", "best.pt", "metrics.jsonl"}
    assert kept.startswith("best-step13-")
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 1
    assert [record["step"] for record in records(tmp_path / "out")] == [0, 0, 0, 1]


def test_a_new_run_is_killed_at_any_moment_of_its_first_save(run, finished, tmp_path, monkeypatch):
    """Before the old last.pt is replaced the old run goes on, after it the new one."""
    def killed(*args):
        raise KeyboardInterrupt
    replace = os.replace
    for name, step in (("last.pt", 12), ("metrics.jsonl", 5)):
        with monkeypatch.context() as during:
            during.setattr(os, "replace", lambda source, path, name=name: killed()
                           if str(path).endswith(name) else replace(source, path))
            with pytest.raises(KeyboardInterrupt):
                run(overwrite=True, seed=5)
        assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == step
        assert run(init_from="resume", max_iters=14)[0] == 0
        config, *others = [line["config"] for line in records(tmp_path / "out")
                           if "config" in line]
        assert config["seed"] == (1337 if step == 12 else 5) and len(others) == 1
        steps = [line["step"] for line in records(tmp_path / "out") if "train_loss" in line]
        assert steps == list(range(14))


def test_a_run_goes_on_from_what_is_there_once_the_folder_is_its_own(run, finished, tmp_path,
                                                                    monkeypatch):
    """A queued job begins while its predecessor still saves."""
    run(init_from="resume", max_iters=14)
    newer = (tmp_path / "out" / "last.pt").read_bytes()
    (tmp_path / "out" / "last.pt").write_bytes(finished["last.pt"])
    with locked_by_another(tmp_path / "out") as process:
        def wait(seconds):
            (tmp_path / "out" / "last.pt").write_bytes(newer)
            process.communicate()
        monkeypatch.setattr("nanodva.errors.time.sleep", wait)
        assert "at step 14" in run(init_from="auto", max_iters=15)[1]


def test_a_run_that_ends_while_another_one_begins_is_not_overwritten(run, trained, tmp_path,
                                                                     monkeypatch):
    outline = train.outline

    def meanwhile(cfg):
        shutil.copytree(trained, tmp_path / "out")
        return outline(cfg)
    monkeypatch.setattr(train, "outline", meanwhile)
    with refused("holds a run, last.pt and best.pt"):
        run(seed=5)
    assert contents(tmp_path / "out") == contents(trained)


@pytest.mark.parametrize("changes", [dict(learning_rate=1e30, min_lr=1e30), dict(wandb_log=True),
                                     dict(batch_size=10**12)], ids=str)
def test_a_new_run_that_comes_to_nothing_leaves_the_old_one(run, finished, tmp_path, monkeypatch,
                                                            changes):
    """It breaks after it has begun: its loss, its memory, or wandb, which needs a login."""
    wandb = MagicMock(__spec__="here", **{"init.side_effect": ValueError("no login")})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises((ValueError, MemoryError)):
        run(overwrite=True, **changes)
    after = contents(tmp_path / "out")
    del after["metrics.jsonl.new"]
    assert after == finished


def test_a_run_that_replaces_another_leaves_no_best_of_it(run, finished, tmp_path, at_step):
    """sample.py would take it for the best of the run that is there now."""
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert "no best" in run(overwrite=True)[1]
    assert set(contents(tmp_path / "out")) == {"last.pt", "metrics.jsonl"}


def test_a_folder_without_a_checkpoint_counts_as_empty(run, tmp_path):
    """A first run that broke leaves its metrics, and needs no --overwrite."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(train.BrokenLoss):
        run(learning_rate=1e30, min_lr=1e30)
    assert set(contents(tmp_path / "out")) == {"notes.txt", "metrics.jsonl"}
    run(max_iters=1)
    assert [record["step"] for record in records(tmp_path / "out")] == [0, 0, 0, 1]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def wrong(trained, tmp_path_factory):
    """A folder with what a mistaken command line may name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "other.txt").write_text("zyx " * 1000)
    prepare_data.main(["other_char", f"--input={folder / 'other.txt'}", f"--data_dir={folder}"])
    (folder / "half.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    torch.save({"weights": torch.ones(2)}, folder / "foreign.pt")
    return folder


# One for each place that refuses something
MISTAKES = {
    "too few rows": (dict(vocab_size=5), "vocab_size=5"),
    "no such data set": (dict(dataset="missing"), "missing/meta.json"),
    "a file as data folder": (dict(data_dir="{wrong}/half.pt"), "half.pt/tiny_char/meta.json"),
    "a window longer than val": (dict(block_size=501), "block_size=501 needs at least 502"),
    "no such device": (dict(device="cuda:77"), "device='cuda:77' is not on this machine"),
    "heads that do not divide": (dict(n_head=3), "n_embd=16 does not divide into n_head=3"),
    "a misspelt setting": (dict(n_layr=3), "did you mean 'n_layer'?"),
    "no batches": (dict(batch_size=0), "batch_size=0"),
    "nothing to start from": (dict(init_from="nowhere"), "init_from='nowhere'"),
    "half a checkpoint": (dict(init_from="{wrong}/half.pt"), "half.pt is not a checkpoint"),
    "a foreign checkpoint": (dict(init_from="{wrong}/foreign.pt"), "neither a nanoDVA"),
    "weights of another depth": (dict(init_from="{trained}", n_layer=3), "n_layer=3 contradicts"),
    "weights of another width": (dict(init_from="{trained}", block="dva", n_embd=8), "n_embd=8"),
    "another alphabet": (dict(init_from="{trained}", data_dir="{wrong}", dataset="other_char",
                              vocab_size=24), "another tokenizer"),
    "weights that are not here": (dict(init_from="gpt2-xl"), "cannot fetch openai-community"),
    "no wandb": (dict(wandb_log=True), "pip install wandb")}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_loses_nothing_and_leaves_nothing_behind(run, trained, finished, wrong, tmp_path,
                                                           monkeypatch, kind):
    """The same command in the folder of a finished run, with --overwrite, and in a new folder."""
    # As if wandb and the hub's cache were not there
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))
    changes, words = MISTAKES[kind]
    changes = {name: str(value).format(wrong=wrong, trained=trained)
               for name, value in changes.items()}
    with refused(words):
        run("out", overwrite=True, **changes)
    assert contents(tmp_path / "out") == finished
    with refused(words):
        run("new/folder", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out_dir, words", [
    ("last.pt", "{folder}/last.pt/lock: File exists"), ("file/below", "{folder}/file/below"),
    ("x" * 300, "File name too long; give another folder"), ("/proc/nothing", "/proc/nothing")])
def test_an_out_dir_that_cannot_be_is_named(run, tmp_path, out_dir, words):
    for name in ("file", "last.pt"):
        (tmp_path / name).write_text("in the way")
    for init_from in ("scratch", "resume"):
        with refused("out_dir", words.format(folder=tmp_path)):
            run(out_dir, init_from=init_from)
    assert contents(tmp_path) == dict.fromkeys(("file", "last.pt"), b"in the way")


HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from nanodva.errors import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()"""


@contextmanager
def locked_by_another(folder):
    """A with block in which another process writes in the folder, as a script started twice."""
    with subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, folder], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_a_second_run_in_a_folder_is_refused(run, finished, tmp_path, at_step, monkeypatch):
    with locked_by_another(tmp_path / "out") as process:
        for changes in (dict(overwrite=True), dict(init_from="resume", max_iters=13)):
            with refused(f"process {process.pid} on {platform.node()} writes in",
                         str(tmp_path / "out" / "lock"), "give another folder"):
                run(**changes)
    assert contents(tmp_path / "out") == finished

    def another():
        # As in a process that holds no lock
        with monkeypatch.context() as there, refused(f"process {os.getpid()} on"):
            there.setattr("nanodva.errors.HELD", set())
            with only_writer(tmp_path / "new"):
                pass
    at_step(0, another)
    assert run("new", max_iters=1)[0] == 0


def test_a_lock_names_a_machine_in_letters_that_the_system_does_not_write(tmp_path):
    code = """if True:
        import platform, sys
        from nanodva.errors import only_writer
        platform.node = lambda: "b\\xfcro"
        with only_writer(sys.argv[1]):
            pass"""
    python(code, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").check_returncode()
    assert (tmp_path / "lock").read_bytes().endswith("on büro".encode())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_disk_that_cannot_lock_gets_one_line(run, tmp_path, monkeypatch, capsys, number):
    """Also in a folder with a lock file, which was copied or is of a run killed on another node."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text("process 1 on another")

    def flock(file, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", flock)
    assert run(max_iters=1)[0] == 0
    capsys.readouterr()
    with only_writer(tmp_path / "out"), only_writer(tmp_path / "out"):
        pass
    err = capsys.readouterr().err
    assert f"cannot be locked ({os.strerror(number)}): make sure" in err and err.count("\n") == 1


# ---- the best and the last -----------------------------------------------------------------------

@pytest.mark.parametrize("always, saved", [(True, [3, 6, 9, 11]), (False, [3, 6, 11])])
def test_best_is_only_replaced_by_better(run, tmp_path, losses, monkeypatch, always, saved):
    seen = []

    def watched(checkpoint, path):
        seen.append((path.name, checkpoint["step"]))
        save(checkpoint, path)
    monkeypatch.setattr(train.checkpoints, "save", watched)
    # at steps 0, 3, 6, 9 and 11
    losses(9, 3, 2, 5, 4)
    run(max_iters=11, eval_interval=3, always_save_checkpoint=always)
    assert [step for name, step in seen if name == "best.pt"] == [3, 6]
    assert [step for name, step in seen if name == "last.pt"] == saved
    best, last = (load_checkpoint(tmp_path / "out" / name) for name in ("best.pt", "last.pt"))
    assert best["best_val_loss"] == last["best_val_loss"] == 2
    # Weights to sample from, and all that it takes to go on
    assert "optimizer" in last and "optimizer" not in best
    # Resumed, the best so far is known; at steps 12 and 15
    losses(1.9, 2.5)
    run(init_from="resume", max_iters=15)
    assert load_checkpoint(tmp_path / "out" / "best.pt")["step"] == 12


@pytest.mark.parametrize("tuned, values, best", [
    (True, (1, 2, 3, 4), (0, 1)), (True, (4, 3, 5, 6), (5, 3)), (False, (1, 2, 3, 4), (5, 2))])
def test_what_is_called_best_is_on_the_disk(run, trained, tmp_path, losses, tuned, values, best):
    """At steps 0, 5, 10 and 12; random weights are not worth a name, those to fine-tune are."""
    losses(*values)
    out = run(init_from=trained if tuned else "scratch", always_save_checkpoint=False)[1]
    assert f"best val loss {best[1]:.4f}" in out
    saved = load_checkpoint(tmp_path / "out" / "best.pt")
    assert (saved["step"], saved["best_val_loss"]) == best


def test_best_survives_a_kill_between_the_two_saves(run, tmp_path, losses):
    """best.pt is of step 6 and last.pt of step 3, and with other settings step 6 is worse."""
    losses(9, 3)
    run(max_iters=3, eval_interval=3)
    last = (tmp_path / "out" / "last.pt").read_bytes()
    losses(2)
    run(init_from="resume", max_iters=6)
    best = (tmp_path / "out" / "best.pt").read_bytes()
    (tmp_path / "out" / "last.pt").write_bytes(last)
    losses(2.5)
    run(init_from="resume", max_iters=6, learning_rate=2e-2)
    assert (tmp_path / "out" / "best.pt").read_bytes() == best


def test_patience_ends_a_run_that_has_become_worse(run, tmp_path, losses):
    # at steps 0, 2, 4 ...
    losses(9, 3, 4, 3.5, 2)
    out = run(max_iters=20, eval_interval=2, patience=2)[1]
    assert "done: step 6, best val loss 3.0000" in out
    # One that is better, and three that are not
    losses(2, 2.5, 2.5, 2.5)
    assert "done: step 14, best val loss 2.0000" in run(init_from="resume", patience=3)[1]


def test_a_run_that_stops_before_its_first_evaluation_has_no_best_loss(run, tmp_path, at_step):
    at_step(1, send(signal.SIGTERM))
    assert "stopped at step 2, no best" in run(eval_interval=100)[1]
    at_step(0, send(signal.SIGTERM), function="learning_rate")
    assert "stopped before the first step: nothing was saved" in run("other")[1]
    assert not list((tmp_path / "other").glob("*.pt"))


@pytest.mark.parametrize("steps", [8, 0])
def test_the_last_step_is_saved_whatever_the_interval(run, tmp_path, steps):
    run(max_iters=steps, eval_interval=100, always_save_checkpoint=False)
    for name in ("last.pt", "best.pt"):
        assert load_checkpoint(tmp_path / "out" / name)["step"] == steps


# ---- by the clock --------------------------------------------------------------------------------

def test_a_run_is_saved_by_the_clock_without_an_evaluation(run, tmp_path, at_step, monkeypatch):
    """A run that is killed before its first evaluation has something, too."""
    seen = []
    # As if each step took a minute
    monkeypatch.setattr(checkpoints.RunFolder, "is_due", lambda self, interval: interval > 0)
    for step in (2, 7):
        at_step(step, lambda: seen.append(load_checkpoint(tmp_path / "out" / "last.pt")["step"]))
    run(eval_interval=650)
    assert seen == [2, 7]
    evaluated = [line["step"] for line in records(tmp_path / "out") if "val_loss" in line]
    assert evaluated == [0, 12]
    at_step(7, lambda: seen.append((tmp_path / "other" / "last.pt").exists()))
    run("other", eval_interval=650, save_interval_s=0)
    assert seen == [2, 7, False]
    assert runs_differ(tmp_path / "out", tmp_path / "other") == 0


@pytest.mark.parametrize("since, took, interval, due", [
    (16, 0.1, 15, True), (14, 0.1, 15, False), (16, 0.4, 15, False), (21, 0.4, 15, True)])
def test_saves_by_the_clock_take_two_percent_of_the_time_at_most(tmp_path, since, took, interval,
                                                                 due):
    folder = checkpoints.RunFolder(train.TrainConfig(out_dir=str(tmp_path)), None)
    folder.saved_at, folder.save_s = time.monotonic() - since, took
    assert folder.is_due(interval) == due


# ---- all or nothing ------------------------------------------------------------------------------

def test_a_second_interrupt_during_the_save_keeps_the_checkpoint_before(run, tmp_path, at_step,
                                                                        monkeypatch):
    """The step is finished, the save begins, and the user is impatient."""
    def interrupt_the_next_save():
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(os, "fsync", lambda file: signal.raise_signal(signal.SIGINT))
    at_step(6, interrupt_the_next_save)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5
    assert set(contents(tmp_path / "out")) == {"best.pt", "last.pt", "metrics.jsonl"}


@pytest.mark.parametrize("limit, full, is_stopped", [
    (2500, "metrics.jsonl", True), (50_000, "last.pt", True), (10_000, "best.pt", False)])
def test_a_full_disk_is_named_is_no_stop_and_leaves_the_checkpoints_whole(
        run, trained, tmp_path, at_step, limit, full, is_stopped):
    """metrics.jsonl has about 4 kB in step 7, best.pt 40 and last.pt 110."""
    at_step(7, lambda: (fill(limit), is_stopped and signal.raise_signal(signal.SIGTERM)))
    with full_disk() as fill, refused(f"cannot write {tmp_path / 'out' / full}: "
                                      f"{os.strerror(errno.EFBIG)}; "):
        run()
    assert set(contents(tmp_path / "out")) == {"best.pt", "last.pt", "metrics.jsonl"}
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(tmp_path / "out" / name)["step"] == 5
    # There is room again
    assert run(init_from="resume")[0] == 0
    assert runs_differ(trained, tmp_path / "out") == 0


# ---- safe to open --------------------------------------------------------------------------------

class Harm:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def one_wrong_bit(whole):
    middle = whole.index(b"data/0") + 3000
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]


NO_CHECKPOINT = "is not a checkpoint, or a damaged one: name another, such as best.pt"
# What is there instead of last.pt: (its bytes, made of a good one's, or what is saved; the error)
DAMAGED = {
    "code": ({"format": FORMAT, "model": Harm()}, "is refused: it calls for"),
    "code in a pickle": (lambda whole: pickle.dumps(Harm(), protocol=2), "is refused"),
    "nothing": (lambda whole: b"", NO_CHECKPOINT), "text": (lambda whole: b"hi\n", NO_CHECKPOINT),
    "half": (lambda whole: whole[:len(whole) // 2], NO_CHECKPOINT),
    "a byte too few": (lambda whole: whole[:-1], NO_CHECKPOINT),
    "one wrong bit": (one_wrong_bit, "is damaged"),
    "a list": ([1], "nanoDVA checkpoint"), "a foreign dict": ({"a": 1}, "nanoDVA checkpoint"),
    "another format": ({"format": 1}, "nanoDVA checkpoint")}


@pytest.mark.parametrize("content, words", DAMAGED.values(), ids=list(DAMAGED))
def test_only_checkpoints_are_opened_and_none_can_run_code(trained, tmp_path, monkeypatch, content,
                                                           words):
    monkeypatch.chdir(tmp_path)
    if callable(content):
        Path("last.pt").write_bytes(content((trained / "last.pt").read_bytes()))
    else:
        torch.save(content, "last.pt")
    for main in (train.main, sample.main):
        with refused("last.pt", words):
            main(["--out_dir=.", "--init_from=resume"])
    assert not Path("harm").exists()


@pytest.mark.parametrize("log_interval", [1, 100])
def test_a_folder_that_is_deleted_during_a_run_is_made_again(run, at_step, tmp_path, log_interval):
    """For a record of a step, or for the checkpoint of a stop, if that comes first."""
    at_step(7, lambda: (shutil.rmtree(tmp_path / "a"), signal.raise_signal(signal.SIGTERM)))
    assert run("a/b", log_interval=log_interval)[0] == 143
    assert load_checkpoint(tmp_path / "a" / "b" / "last.pt")["step"] == 8
