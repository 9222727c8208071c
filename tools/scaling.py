"""
What the link between machines costs: the arithmetic of data-parallel training, for any shape, block and link.

    python -m tools.scaling                                                     gpt2 and dva at GPT-2 124M shapes
    python -m tools.scaling config/train_dva.py --gbit=400 --step_s=0.25        your run, your link, your measured step

A ring all-reduce over N processes sends and receives 2 (N - 1) / N times the gradient on each of them, and the slowest link
sets the pace. It is counted as if nothing of it overlapped with the backward pass, so the losses shown are upper bounds.
"""
from dataclasses import dataclass

import torch

from config import check, load
from model import GPT, ModelConfig
from train import TrainConfig


@dataclass
class ScalingConfig(TrainConfig):
    vocab_size: int = 50304      # rows of the token table
    gbit: float = 100.0          # speed of the slowest link of the ring, Gbit/s each way
    step_s: float = 1.0          # seconds of a step's arithmetic on one process: measure it with --max_iters=50

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(gbit=1e-9, step_s=1e-9, vocab_size=1))


def gradient_bytes(config):
    """Bytes of gradient that each process contributes to a step: 4 per parameter (float32); accumulation sends none."""
    with torch.device("meta"):                                         # shapes without memory
        return 4 * GPT(config).num_params()


def scaling(config, processes, gbit, step_s):
    """(seconds in the all-reduce, steps/s, share of the steps/s lost to it) with `processes` on links of `gbit` Gbit/s."""
    sent = 2 * (processes - 1) / processes * gradient_bytes(config)
    reduce_s = sent * 8 / (gbit * 1e9)
    return reduce_s, 1 / (step_s + reduce_s), reduce_s / (step_s + reduce_s)


def main(argv=None):
    cfg = load(ScalingConfig, argv)
    blocks = {"gpt2": {"block": "gpt2"}, "dva, qk_dim 768": {"block": "dva", "qk_dim": 768}, "dva, qk_dim 64": {"block": "dva"}}
    if cfg.block != "gpt2":
        blocks = {"gpt2": {"block": "gpt2"}, cfg.block: {}}
    shape = {name: getattr(cfg, name) for name in ModelConfig.__dataclass_fields__}
    print(f"Links of {cfg.gbit:g} Gbit/s, {cfg.step_s:g} s of arithmetic a step; a cell: seconds to reduce, share of the steps/s lost\n")
    print("| block | gradient a step |" + "".join(f" {n} GPUs |" for n in (2, 4, 8, 16, 32, 64)) + "\n|---|---|" + "---|" * 6)
    for name, change in blocks.items():
        config = ModelConfig(**shape | change)
        cells = [scaling(config, n, cfg.gbit, cfg.step_s) for n in (2, 4, 8, 16, 32, 64)]
        print(f"| {name} | {gradient_bytes(config) / 1e6:.0f} MB |" + "".join(f" {s:.3f} s, {lost:.1%} |" for s, _, lost in cells))


if __name__ == "__main__":
    main()
