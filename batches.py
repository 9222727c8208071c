"""
From the token ids on the disk to the batches of a run.
"""
from pathlib import Path

import numpy as np
import torch

from config import fail
from prepare_data import read_meta


def open_data(cfg):
    """
    {"meta", "train", "val"} of the data set: what meta.json says, and the token ids of each split,
    mapped into memory. Raises UserError where they do not fit the model.
    """
    folder = Path(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
    if meta["vocab_size"] > cfg.model.vocab_size:
        fail(f"vocab_size={cfg.model.vocab_size}: {folder} has {meta['vocab_size']} tokens; leave "
             f"vocab_size out, or make it at least that")
    data = {"meta": meta}
    for split, count in meta["tokens"].items():
        if count <= cfg.model.block_size:
            fail(f"{folder / split}.bin holds {count} tokens: block_size={cfg.model.block_size} "
                 f"needs at least {cfg.model.block_size + 1}; use a smaller --block_size or more "
                 f"text")
        data[split] = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
    return data


def table_rows(meta):
    """Rows of the token table for a data set: its tokens, and GPT-2's 50257 padded to a multiple
    of 64, as in nanoGPT, since products of that width are faster."""
    return 50304 if meta["vocab_size"] == 50257 else meta["vocab_size"]


def windows(tokens, starts, cfg, device):
    """Inputs and the token that follows each, (B, T) int64, of the windows at starts (B,)."""
    rows = tokens[starts[:, None] + np.arange(cfg.model.block_size + 1)].astype(np.int64)
    if rows.max() >= cfg.model.vocab_size:
        fail(f"{cfg.data_dir}/{cfg.dataset} is damaged: it holds token {rows.max()}, beyond "
             f"vocab_size={cfg.model.vocab_size}; try  python prepare_data.py NAME --check")
    rows = torch.from_numpy(rows)                                      # (B, T + 1)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def get_batch(tokens, cfg, step, micro, device):
    """
    Micro-batch number `micro` of a step, as windows() gives it. It follows from (seed, step,
    micro) alone, so resuming needs no state. The whole step's batch is drawn at once and then
    cut, so any number of processes sees the same tokens.
    """
    rng = np.random.default_rng((cfg.seed, step))
    shape = (cfg.gradient_accumulation_steps, cfg.batch_size)
    starts = rng.integers(len(tokens) - cfg.model.block_size, size=shape)
    return windows(tokens, starts[micro], cfg, device)


def seed_dropout(cfg, step, micro):
    """Let dropout, too, follow from (seed, step, micro) alone."""
    entropy = np.random.SeedSequence((cfg.seed, step, micro))
    torch.manual_seed(entropy.generate_state(1)[0].item())
