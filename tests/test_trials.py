"""docs/trials.py: blocks with several heads, or with one GPT-2 block among DVA blocks."""
import importlib.util

import pytest
import torch
from conftest import ROOT

import model
from model import GPT, Cache, DVABlock, GPT2Block, ModelConfig


@pytest.fixture
def trials(monkeypatch):
    monkeypatch.setattr(model, "BLOCKS", dict(model.BLOCKS))
    spec = importlib.util.spec_from_file_location("trials", ROOT / "docs" / "trials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", ["heads", "first", "last"])
def test_a_trial_block_learns_and_decodes_with_a_cache(trials, block):
    config = ModelConfig(block=block, n_layer=3, n_head=4, n_embd=32, qk_dim=8, vocab_size=50,
                         block_size=16, rotary=True)
    gpt, idx = GPT(config), torch.randint(50, (2, 16))
    kinds = {"heads": [trials.HeadsBlock] * 3, "first": [GPT2Block, DVABlock, DVABlock],
             "last": [DVABlock, DVABlock, GPT2Block]}
    assert [type(layer) for layer in gpt.transformer.h] == kinds[block]
    gpt(idx, idx).backward()
    assert all(p.grad is not None for p in gpt.parameters())
    cache = Cache(16)
    with torch.no_grad():
        steps = torch.cat([gpt(idx[:, [i]], cache=cache) for i in range(16)], dim=1)
        torch.testing.assert_close(steps, gpt(idx), atol=1e-5, rtol=1e-5)


def test_one_head_of_several_is_dva(trials):
    settings = dict(n_layer=2, n_head=1, n_embd=32, qk_dim=8, vocab_size=50, block_size=16)
    dva = GPT(ModelConfig(block="dva", **settings))
    heads = GPT(ModelConfig(block="heads", rotary=True, **settings))
    heads.load_state_dict(dva.state_dict())
    idx = torch.randint(50, (2, 16))
    assert torch.equal(heads(idx), dva(idx))
