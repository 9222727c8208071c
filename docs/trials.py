"""
Small changes to DVA, as blocks to race. docs/race.md says what they showed.

    python docs/trials.py config/race_ladder.py config/race_trials.py

    heads      DVA with n_head heads of qk_dim channels each: several queries for each position
    attention  GPT-2's attention without an MLP: what is left of DVA without its gate and norm
    first      one GPT-2 block, then DVA blocks
    last       DVA blocks, then one GPT-2 block

All other settings are those of tools.race. A GPT-2 block among DVA blocks needs heads as wide as
DVA's one: n_embd / n_head = qk_dim.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanodva.errors import run_script

# isort: split
from torch import nn

import model
from model import CausalSelfAttention, DVABlock, DynamicValueAttention, GPT2Block
from tools import race


class SeveralHeads(DynamicValueAttention):
    """DVA whose queries and keys have n_head heads of qk_dim channels; each weights its own part
    of the value's channels."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.n_head = config.n_head
        self.c_q, self.c_k = (nn.Linear(config.n_embd, self.n_head * config.qk_dim,
                                        bias=config.bias) for _ in "qk")


class HeadsBlock(DVABlock):
    attention = SeveralHeads


class AttentionBlock(DVABlock):
    attention = CausalSelfAttention


def first(config, layer):
    return (DVABlock if layer > 0 else GPT2Block)(config, layer)


def last(config, layer):
    return (DVABlock if layer < config.n_layer - 1 else GPT2Block)(config, layer)


# The processes of a race import this file, too, and so know these blocks
model.BLOCKS |= {"heads": HeadsBlock, "attention": AttentionBlock, "first": first, "last": last}

if __name__ == "__main__":
    run_script(lambda: race.main(script="docs/trials.py"))
