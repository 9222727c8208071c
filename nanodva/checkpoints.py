"""
A run's folder: its checkpoints, last.pt to go on from and best.pt to sample from, and its metrics.
"""
import json
import pickle
import re
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from model import ModelConfig
from nanodva.errors import UserError, fail, replacing
from nanodva.settings import build, declared, flat

FORMAT = 3


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
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            fail(f"{path} is damaged: the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        fail(f"{path} is refused: it calls for {code[1] if code else 'more'}, and only tensors, "
             f"numbers and text are read")
    except Exception as error:
        # zipfile and torch raise a dozen kinds for a file that is no checkpoint
        fail(f"{path} is not a checkpoint, or a damaged one: {str(error)[:200]}")


def load_checkpoint(path):
    """The checkpoint of ours at path, on the CPU. Raises UserError where there is none."""
    path = Path(path)
    if not path.exists():
        fail(f"no {path}: train first, or give the run's folder as --out_dir")
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
    checkpoint = load_checkpoint(out_dir / "last.pt")
    if "optimizers" not in checkpoint:
        fail(f"{out_dir}/last.pt holds weights to sample from, without the optimizer's state: it "
             f"cannot be resumed")
    if (out_dir / "best.pt").exists():
        # It is saved first, so that of a run that was killed may be newer than last.pt
        try:
            best = load_checkpoint(out_dir / "best.pt")["best_val_loss"]
            checkpoint["best_val_loss"] = min(checkpoint["best_val_loss"], best)
        except UserError as error:
            print(f"going on without best.pt: {error}")
    saved = checkpoint["config"] | {"overwrite": False, "eval_only": False, "init_from": "resume"}
    unknown = saved.keys() ^ declared(cls).keys()
    if unknown:
        fail(f"{out_dir}/last.pt is of another version of train.py, which differs in the settings "
             f"{', '.join(sorted(unknown))}: resume it with that version")
    cfg = build(cls, saved | given)
    changed = {name: value for name, value in flat(cfg).items() if value != saved[name]}
    fixed = {field.name for field in fields(ModelConfig)} - {"dropout"} | {"optimizer"}
    for name in changed.keys() & fixed:
        fail(f"{name}={changed[name]!r} differs from the checkpoint's {saved[name]!r}: a run keeps "
             f"its architecture and optimizer; leave {name} out, or train from scratch")
    changes = [f"{name}={value!r} (was {saved[name]!r})" for name, value in changed.items()]
    return cfg, checkpoint, changes


def restore(checkpoint, model, optimizers, scaler):
    """Put a checkpoint's state into the objects of a run, whose own settings stay."""
    model.load_state_dict(checkpoint["model"])
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    scaler.load_state_dict(checkpoint["scaler"])


def check_out_dir(out_dir, overwrite):
    """Raise UserError where a new run would overwrite an earlier one without being told to."""
    saved = [name for name in ("last.pt", "best.pt") if (out_dir / name).exists()]
    if saved and not overwrite:
        fail(f"{out_dir} holds a run, {' and '.join(saved)}: continue it with --init_from=resume, "
             f"start anew with --overwrite=True, or give another --out_dir")


def clear_out_dir(out_dir):
    """Make the folder of a new run, without what an earlier one wrote there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        (out_dir / name).unlink(missing_ok=True)


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
