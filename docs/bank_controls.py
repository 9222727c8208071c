"""
Why does a Bank of Values help? Blocks for the race that have only a part of what a bank does.

    python docs/bank_controls.py config/race_bpe.py --contenders=gpt2:rotary=True,gpt2_scale+bank

These come in addition to the blocks of model.py, and have rotary positions. What differs stands in
the layers that would have a bank:

    gpt2_scale               the projected value, times one learned number
    gpt2_token, dva_token    a value projected from the token's embedding
    gpt2_both, dva_both      a bank added to the projected value

Under DVA's norm a scale cancels, so there is no dva_scale. All else is as in tools/race.py.
"""
import sys
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
from model import BankOfValues, CausalSelfAttention, DVABlock, DynamicValueAttention, GPT2Block
from nanodva.errors import run_script
from tools import race


class Scale(BankOfValues):
    """One learned number for the projected values; the table has no rows."""

    def __init__(self):
        super().__init__(vocab_size=0, width=1)

    def forward(self, v):
        """v (B, T, M), multiplied"""
        return self.gamma * v

    def align(self, embedding):
        """There is no table to align."""


class FromToken(BankOfValues):
    """A value that one matrix projects from the token's embedding; the table has no rows."""

    def __init__(self, n_embd, width):
        super().__init__(vocab_size=0, width=1)
        self.c_v = nn.Linear(n_embd, width, bias=False)
        nn.init.normal_(self.c_v.weight, std=0.02)

    def forward(self, idx):
        """Token ids idx (B, S) -> values (B, S, M)"""
        x = F.embedding(idx, self.embedding[0])                        # (B, S, C)
        return self.gamma * self.c_v(F.layer_norm(x, x.shape[-1:]))

    def align(self, embedding):
        """Keep the model's token table. In a list it does not become a parameter of this module."""
        self.embedding = [embedding]


class ScaledAttention(CausalSelfAttention):
    def __init__(self, config):
        super().__init__(config, banked=False)
        self.scale = Scale()

    def forward(self, x, idx, cache=None):
        q, k, v = self.c_attn(x).split(x.size(-1), dim=-1)
        return self.resid_dropout(self.c_proj(self.mix(q, k, self.scale(v), idx, cache)))


class BothAttention(CausalSelfAttention):
    def __init__(self, config):
        super().__init__(config, banked=False)
        self.added = BankOfValues(config.vocab_size, config.n_embd)

    def forward(self, x, idx, cache=None):
        q, k, v = self.c_attn(x).split(x.size(-1), dim=-1)
        v = v + self.added(idx[:, -x.size(1):])
        return self.resid_dropout(self.c_proj(self.mix(q, k, v, idx, cache)))


class BothDynamicAttention(DynamicValueAttention):
    def __init__(self, config):
        super().__init__(config, banked=False)
        self.added = BankOfValues(config.vocab_size, config.value_dim)

    def forward(self, x, idx, cache=None):
        q, k, g = self.c_q(x), self.c_k(x), self.c_gate(x)
        v = self.c_v(x) + self.added(idx[:, -x.size(1):])
        y = self.mix(q, k, v, idx, cache)
        return self.resid_dropout(self.c_proj(self.norm(y) * g))


class ScaledGPT2(GPT2Block):
    def __init__(self, config, banked):
        super().__init__(config, banked)
        if banked:
            self.attn = ScaledAttention(config)


class TokenGPT2(GPT2Block):
    def __init__(self, config, banked):
        super().__init__(config, banked)
        if banked:
            self.attn.bank = FromToken(config.n_embd, config.n_embd)


class BothGPT2(GPT2Block):
    def __init__(self, config, banked):
        super().__init__(config, banked)
        if banked:
            self.attn = BothAttention(config)


class TokenDVA(DVABlock):
    def __init__(self, config, banked):
        super().__init__(config, banked)
        if banked:
            self.attn.bank = FromToken(config.n_embd, config.value_dim)
            self.attn.bank.gamma.requires_grad_(not config.value_norm)


class BothDVA(DVABlock):
    def __init__(self, config, banked):
        super().__init__(config, banked)
        if banked:
            self.attn = BothDynamicAttention(config)


# The race's worker processes import this file, too
model.BLOCKS |= {"gpt2_scale": ScaledGPT2, "gpt2_token": TokenGPT2, "gpt2_both": BothGPT2,
                 "dva_token": TokenDVA, "dva_both": BothDVA}

if __name__ == "__main__":
    run_script(race.main)
