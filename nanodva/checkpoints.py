"""
A run's folder: its checkpoints, last.pt to go on from and best.pt to sample from, and its metrics.
"""
import json
import math
import os
import re
import time
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import ModelConfig
from nanodva.errors import UserError, fail, naming_file, replacing
from nanodva.machine import naming_memory, say
from nanodva.settings import build

FORMAT = 4
CHECKPOINTS = ("last.pt", "best.pt")


def save(checkpoint, path):
    """Write a checkpoint; path holds the old one or the new one, never half of one."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


def saved_so_far(out_dir):
    """What a run that fails leaves in its folder, in words."""
    names = [name for name in CHECKPOINTS if Path(out_dir, name).exists()]
    return f"{out_dir} still holds {' and '.join(names)}" if names else "nothing was saved before"


def load_file(path):
    """What torch.save wrote, on the CPU. Tensors, numbers and text only; code is never run."""
    try:
        # torch.load does not compare the checksums. Files older than torch 1.6 have none.
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        if not damaged:
            with naming_memory("use a machine with more"):
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
             f"last.pt in the run's folder, or train again")
    fail(f"{path} is damaged: the checksum of {damaged} in it is wrong")


def load_checkpoint(path):
    """The checkpoint of ours at path, on the CPU. Raises UserError if it is none."""
    path = Path(path)
    if not path.exists():
        fail(f"no {path.absolute()}: train first, or give the run's folder as --out_dir")
    checkpoint = load_file(path)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found == FORMAT:
        return checkpoint
    if found == 3:
        fail(f"{path} is of nanoDVA 3, whose optimizer no longer exists: start from its weights "
             f"with --init_from={path.parent} and another --out_dir")
    fail(f"{path} is not a nanoDVA checkpoint of format {FORMAT}")


def resume(cls, given):
    """
    (cfg, checkpoint, changes) of the run in the given out_dir. cfg, of the dataclass cls, has the
    run's settings except for the given ones; changes lists those that differ, in words. Raises
    UserError for another architecture or optimizer.
    """
    out_dir = Path(given.get("out_dir", cls.out_dir))
    checkpoint = load_checkpoint(out_dir / "last.pt")
    if "optimizer" not in checkpoint:
        fail(f"{out_dir}/last.pt holds weights to sample from, without the optimizer's state: it "
             f"cannot be resumed")
    # The run may have been moved: it goes on where it was found
    saved = checkpoint["config"] | {"overwrite": False, "eval_only": False, "init_from": "resume",
                                    "out_dir": given.get("out_dir", cls.out_dir)}
    removed = saved.keys() - {field.name for field in fields(cls)}
    if removed:
        fail(f"{out_dir}/last.pt is of another version of train.py, which had the settings "
             f"{', '.join(sorted(removed))}: resume it with that version")
    # A run from before a setting existed had its default
    before = asdict(build(cls, saved))
    cfg = build(cls, saved | given)
    changed = {name: value for name, value in asdict(cfg).items()
               if value != before[name] and name != "init_from"}
    fixed = {field.name for field in fields(ModelConfig) if field.name != "dropout"}
    for name in changed.keys() & (fixed | {"optimizer"}):
        fail(f"{name}={changed[name]!r} differs from the checkpoint's {before[name]!r}: a run "
             f"keeps its architecture and optimizer; leave {name} out, or train from scratch")
    changes = [f"{name}={value!r} (was {before[name]!r})" for name, value in changed.items()]
    return cfg, checkpoint, changes


def restore(checkpoint, model, optimizer, scaler):
    """Put a checkpoint's state into the objects of a run, whose own settings stay."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    # Only a run in float16 has a state to scale the loss by
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


class RunFolder:
    """
    A run's out_dir, whose lock the caller holds: checkpoints and metrics.jsonl, append only. A new
    run leaves the files of another one alone until its own first save replaces them; until then
    its metrics are in metrics.jsonl.new.

    Raises UserError if the folder holds a run, unless this one continues it from its `checkpoint`
    or cfg.overwrite is set.
    """

    def __init__(self, cfg, checkpoint):
        self.path, self.saved_at, self.save_s = Path(cfg.out_dir), time.monotonic(), 0.0
        self.metrics, self.aside = self.path / "metrics.jsonl", self.path / "metrics.jsonl.new"
        saved = [name for name in CHECKPOINTS if (self.path / name).exists()]
        if checkpoint:
            self.keep_metrics(checkpoint)
        elif saved and not cfg.overwrite:
            how = "continue it with --init_from=resume"
            if "last.pt" not in saved:
                how = f"start from its weights with --init_from={self.path} and another --out_dir"
            fail(f"{self.path} holds a run, {' and '.join(saved)}: {how}, replace it with "
                 f"--overwrite=True, or give another --out_dir")
        self.wrote_best = False
        # The file that the records go to
        self.records = self.aside if saved and not checkpoint else self.metrics
        if not checkpoint:
            self.records.write_bytes(b"")

    def keep_metrics(self, checkpoint):
        """Keep in metrics.jsonl only the records up to the checkpoint's step."""
        if self.aside.exists():
            header = self.aside.read_bytes().partition(b"\n")[0]
            if f'"started": {json.dumps(checkpoint["started"])}'.encode() in header:
                # The run was killed between its first save and renaming its metrics
                os.replace(self.aside, self.metrics)
            else:
                say(f"a newer run in {self.path} was killed before its first save, so this "
                    f"continues the older one; --init_from=scratch --overwrite=True starts again")
                self.aside.unlink()
        kept, old = [], b""
        if self.metrics.exists():
            with naming_file("read", self.metrics, "move it away, and resume"):
                old = self.metrics.read_bytes()
        try:
            # A kill may have left half a line at the end: ignore it
            for line in old[:old.rfind(b"\n") + 1].splitlines(keepends=True):
                record = json.loads(line)
                was_evaluated = "val_loss" in record and record["step"] == checkpoint["evaluated"]
                if record["step"] < checkpoint["step"] or was_evaluated:
                    kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{self.metrics} is damaged ({error}): move it away, and resume")
        with replacing(self.metrics) as file:
            file.write(b"".join(kept))

    def best_so_far(self, checkpoint, measured_on):
        """
        (lowest val loss, its step) of the checkpoint's run, as best.pt holds it. If that was
        measured on other data, other windows or in another dtype than the dict measured_on says,
        it is copied to best-stepSTEP-LOSS.pt, and the best starts again from infinity.
        """
        nothing, path = (math.inf, checkpoint["step"]), self.path / "best.pt"
        try:
            best = load_checkpoint(path) if path.exists() else None
        except UserError as error:
            say(f"going on without best.pt: {error}")
            return nothing
        # A run that was to overwrite this one may have been killed between its first two saves
        if not best or best["started"] != checkpoint["started"]:
            return nothing
        if best["measured_on"] == measured_on:
            return best["best_val_loss"], best["step"]
        kept = self.path / f"best-step{best['step']}-{best['best_val_loss']:.4f}.pt"
        with replacing(kept) as file:
            file.write(path.read_bytes())
        say(f"the best loss so far, {best['best_val_loss']:.4f}, was measured on other data, "
            f"windows or in another dtype: the best starts again, and {kept} keeps the old one")
        return nothing

    def log(self, record):
        """Append a record, a dict, to the metrics."""
        with naming_file("write", self.records, saved_so_far(self.path)):
            # Somebody may have moved or deleted the folder
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.records, "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, name, checkpoint):
        """Write the checkpoint to a file of the folder."""
        began = time.monotonic()
        self.path.mkdir(parents=True, exist_ok=True)
        save(checkpoint, self.path / name)
        self.wrote_best = self.wrote_best or name == "best.pt"
        if name == "last.pt":
            if self.records == self.aside and not self.wrote_best:
                # It is the best of the run that this one has just replaced
                (self.path / "best.pt").unlink(missing_ok=True)
            if self.records.exists():
                os.replace(self.records, self.metrics)
            self.records = self.metrics
        self.saved_at = time.monotonic()
        self.save_s = self.saved_at - began

    def is_due(self, interval):
        """Was the last save so many seconds ago, and long enough for saves to take 2 % at most?"""
        return 0 < interval and time.monotonic() - self.saved_at > max(interval, 50 * self.save_s)
