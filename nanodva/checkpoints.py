"""
A run's folder: its checkpoints, last.pt to go on from and best.pt to sample from, and its metrics.
"""
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import ModelConfig
from nanodva.errors import UserError, check_folder, fail, only_writer, replacing
from nanodva.machine import say
from nanodva.settings import build

FORMAT = 4


def save(checkpoint, path):
    """Write a checkpoint; path holds the old one or the new one, never half of one."""
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch puts an error of its own around the disk's
        reason = error if isinstance(error, OSError) else error.__context__ or error
        fail(f"cannot write {path}: {reason}; the checkpoint before it is untouched")


def load_file(path):
    """What torch.save wrote, on the CPU. Tensors, numbers and text only; code is never run."""
    try:
        # torch.load does not compare the checksums. Files older than torch 1.6 have none.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                fail(f"{path} is damaged: the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        fail(f"cannot read {path}: {error.strerror}; name another")
    except Exception as error:
        # zipfile and torch raise a dozen kinds for a file that is no checkpoint
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            fail(f"{path} is refused: it calls for {code[1]}, and only tensors, numbers and text "
                 f"are read")
        fail(f"{path} is not a checkpoint, or a damaged one: name another, such as best.pt or "
             f"last.pt in the run's folder, or train anew")


def load_checkpoint(path):
    """The checkpoint of ours at path, on the CPU. Raises UserError where there is none."""
    path = Path(path)
    if not path.exists():
        fail(f"no {path.absolute()}: train first, or give the run's folder as --out_dir")
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        fail(f"{path} is not a nanoDVA checkpoint of format {FORMAT}")
    return checkpoint


def resume(cls, given):
    """
    (cfg, checkpoint, changes) of the run in the out_dir that is given. cfg is of the dataclass
    cls, with the run's own settings but for those given anew; changes lists these in words.
    Raises UserError for another architecture or optimizer.
    """
    out_dir = Path(given.get("out_dir", cls.out_dir))
    recover(out_dir)
    checkpoint = load_checkpoint(out_dir / "last.pt")
    if "optimizer" not in checkpoint:
        fail(f"{out_dir}/last.pt holds weights to sample from, without the optimizer's state: it "
             f"cannot be resumed")
    # The run may have been moved: it goes on where it was found
    saved = checkpoint["config"] | {"overwrite": False, "eval_only": False, "init_from": "resume",
                                    "out_dir": str(out_dir)}
    known = {field.name for field in fields(cls)}
    removed = saved.keys() - known
    if removed:
        fail(f"{out_dir}/last.pt is of another version of train.py, which had the settings "
             f"{', '.join(sorted(removed))}: resume it with that version")
    # A run from before a setting existed had its default
    before = asdict(build(cls, saved))
    cfg = build(cls, saved | given)
    changed = {name: value for name, value in asdict(cfg).items()
               if value != before[name] and name != "init_from"}
    fixed = {field.name for field in fields(ModelConfig)} - {"dropout"} | {"optimizer"}
    for name in changed.keys() & fixed:
        fail(f"{name}={changed[name]!r} differs from the checkpoint's {before[name]!r}: a run "
             f"keeps its architecture and optimizer; leave {name} out, or train from scratch")
    changes = [f"{name}={value!r} (was {before[name]!r})" for name, value in changed.items()]
    return cfg, checkpoint, changes


def best_so_far(out_dir, checkpoint, measured_on):
    """
    (lowest val loss, its step, None) of the run in out_dir, if it was measured on the data, windows
    and dtype of the dict measured_on. Otherwise the best starts anew, and in the place of None
    stands the name that best.pt is to get when there is a new one, so that it is not lost.
    """
    lowest, step = math.inf, checkpoint["step"]
    if same_measure(checkpoint, measured_on):
        lowest, step = checkpoint["best_val_loss"], checkpoint.get("best_step", step)
    path = out_dir / "best.pt"
    if not path.exists():
        return lowest, step, None
    try:
        # best.pt is saved before last.pt, so it may be newer where a run was killed in between
        best = load_checkpoint(path)
    except UserError as error:
        say(f"going on without best.pt: {error}")
        return lowest, step, None
    if same_measure(best, measured_on):
        return *min((lowest, step), (best["best_val_loss"], best["step"])), None
    kept = out_dir / f"best-{best['step']}.pt"
    say(f"the best loss so far, {best['best_val_loss']:.4f}, was measured on other data, windows "
        f"or in another dtype: the best starts anew, and the old one becomes {kept}")
    return lowest, step, kept


def same_measure(checkpoint, measured_on):
    """Whether the losses in a checkpoint can be compared with those measured on measured_on."""
    if "measured_on" in checkpoint:
        return checkpoint["measured_on"] == measured_on
    # Version 2 did not store it
    config = checkpoint["config"]
    return (checkpoint["data"]["val"], config["dtype"]) == (measured_on["data"],
                                                             measured_on["dtype"])


def restore(checkpoint, model, optimizer, scaler):
    """Put a checkpoint's state into the objects of a run, whose own settings stay."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    # Only a run in float16 has a state to scale the loss by
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


def check_out_dir(out_dir, overwrite):
    """Raise UserError where a new run would overwrite an earlier one without being told to."""
    recover(out_dir)
    saved = [name for name in ("last.pt", "best.pt") if (out_dir / name).exists()]
    if saved and not overwrite:
        how = "continue it with --init_from=resume"
        if "last.pt" not in saved:
            how = f"start from its weights with --init_from={out_dir} and another --out_dir"
        fail(f"{out_dir} holds a run, {' and '.join(saved)}: {how}, start anew with "
             f"--overwrite=True, or give another --out_dir")


def written_by_run(out_dir, suffix=""):
    """The files of a run in out_dir, or with the suffix .old those that were set aside."""
    return [path for name in ("last.pt", "metrics.jsonl", "best.pt", "best-*.pt")
            for path in out_dir.glob(name + suffix)]


def set_aside(out_dir):
    """Rename what an earlier run wrote in the folder of a new one to NAME.old, until settle()."""
    for path in written_by_run(out_dir):
        os.replace(path, f"{path}.old")


def settle(out_dir):
    """
    Remove what was set aside if the new run has saved itself; else put it back, since the new run
    has come to nothing.
    """
    saved = (out_dir / "last.pt").exists()
    for path in written_by_run(out_dir, ".old"):
        if saved:
            path.unlink()
        else:
            os.replace(path, path.with_suffix(""))


def recover(out_dir):
    """
    settle() what a run that was killed before its first save had set aside. Raises UserError where
    out_dir is a file or lies under one.
    """
    check_folder("out_dir", out_dir)
    if written_by_run(out_dir, ".old"):
        with only_writer(out_dir, patience=10):
            settle(out_dir)


def open_metrics(out_dir, step):
    """metrics.jsonl, to append to, without the records of the steps that are still to be done."""
    path, kept = out_dir / "metrics.jsonl", []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        for line in lines:
            # A kill may have cut the last line
            if line.endswith(b"\n") and json.loads(line)["step"] < step:
                kept.append(line)
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged ({error}): move it away, and resume")
    with replacing(path) as file:
        file.write(b"".join(kept))
    return open(path, "a", buffering=1)
