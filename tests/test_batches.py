"""Batches: what is drawn follows from the seed and the step alone."""
import numpy as np
import torch

from nanodva.settings import build, change
from train import TrainConfig, get_batch, seed_dropout, table_rows

CPU = torch.device("cpu")


def settings(**changes):
    shape = dict(block_size=8, batch_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=8,
                 dropout=0.5, gradient_accumulation_steps=4, dtype="float32")
    return build(TrainConfig, shape | changes)


def test_batches_follow_from_seed_and_step():
    tokens, cfg = np.arange(1000, dtype=np.uint16), settings(vocab_size=1000, batch_size=3)
    batches = [get_batch(tokens, cfg, 7, micro, CPU) for micro in range(4)]
    again = [get_batch(tokens, cfg, 7, micro, CPU) for micro in (3, 2, 1, 0)][::-1]
    for (x, y), (same_x, same_y) in zip(batches, again, strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)
        # y is what follows
        assert torch.equal(x + 1, y) and x.shape == (3, 8) and x.dtype == torch.int64
    others = [x for x, _ in batches[1:]]
    others.append(get_batch(tokens, cfg, 8, 0, CPU)[0])
    others.append(get_batch(tokens, change(cfg, seed=1), 7, 0, CPU)[0])
    assert not any(torch.equal(batches[0][0], x) for x in others)


def test_batches_reach_every_window():
    cfg = settings(batch_size=50, gradient_accumulation_steps=1)
    x, y = get_batch(np.arange(10), cfg, 0, 0, CPU)
    # The last token is a target, too
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 9


def test_dropout_follows_from_seed_step_and_micro_batch():
    drawn = []
    for seed, step, micro in [(1, 7, 0), (1, 7, 1), (1, 8, 0), (2, 7, 0), (1, 7, 0)]:
        seed_dropout(settings(seed=seed), step, micro)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[4] and len({tuple(each) for each in drawn}) == 4


def test_gpt2s_table_is_padded_to_a_multiple_of_64():
    assert table_rows({"vocab_size": 50257}) == 50304
    assert table_rows({"vocab_size": 4096}) == 4096
