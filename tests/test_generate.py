"""Generation: what is drawn, and that the cache changes nothing."""
import pytest
import torch
from conftest import each_system, shaken, tiny, tokens

from model import Cache, draw, generate

# ---- the cache -----------------------------------------------------------------------------------

@each_system
def test_cached_generation_equals_recomputation_across_a_full_window(system):
    """The window holds 16; of a full one the newer half becomes the next prompt."""
    model, prompt = shaken(tiny(**system)), tokens(2, 5)
    text = generate(model, prompt, 40, temperature=0)
    assert text.shape == (2, 45)
    window = prompt
    for new in text[:, 5:].split(1, dim=1):
        if window.size(1) > 16:
            window = window[:, -8:]
        logits, _ = model(window)
        assert torch.equal(logits[:, -1].argmax(dim=-1, keepdim=True), new)
        window = torch.cat((window, new), dim=1)


@each_system
def test_logits_with_a_cache_are_those_without(system):
    model, idx, cache = shaken(tiny(**system)), tokens(2, 16), Cache(16)
    whole = model(idx, idx)[0]
    pieces = [(0, 6), *((t, t + 1) for t in range(6, 16))]
    for first, end in pieces:
        logits, _ = model(idx[:, first:end], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[:, end - 1], atol=2e-5, rtol=1e-4)


# ---- drawing a token -----------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(), dict(top_k=5), dict(top_p=0.6), dict(top_k=9, top_p=0.8), dict(temperature=0.5)],
    ids=str)
def test_draws_follow_the_chances(options):
    """
    Of 20,000 rows, as many draw a token as its chance says, to 5 standard deviations, and a token
    without a chance is never drawn.
    """
    logits = 2 * torch.randn(23, generator=torch.Generator().manual_seed(0))
    chances = (logits / options.get("temperature", 1)).softmax(dim=0)
    keep = chances.argsort(descending=True)[:options.get("top_k", 23)]
    share = chances[keep] / chances[keep].sum()
    keep = keep[share.cumsum(dim=0) - share < options.get("top_p", 1.1)]
    expected = torch.zeros(23).index_copy(0, keep, chances[keep] / chances[keep].sum())
    luck = torch.rand(20000, 1, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits.expand(20000, 23), luck, **options)
    share = drawn.flatten().bincount(minlength=23) / 20000
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (0, 0.3), (7, 0.8), (0, 1e-9)])
def test_top_k_and_top_p_leave_the_tokens_that_transformers_leaves(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    logits = 3 * torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    theirs = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    left = TopPLogitsWarper(top_p)(None, theirs).isfinite()
    luck = torch.linspace(0, 1 - 1e-6, 3000)[:, None]
    for row in range(8):
        drawn = draw(logits[row].expand(3000, 40), luck, top_k=top_k, top_p=top_p)
        likely = left[row] & (logits[row].softmax(dim=0) > 1e-3)
        drawn = set(drawn.flatten().tolist())
        assert drawn <= set(left[row].nonzero().flatten().tolist())
        assert drawn >= set(likely.nonzero().flatten().tolist())


@pytest.mark.parametrize("luck", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-6, 1e-4])
def test_a_temperature_near_0_takes_the_likeliest(temperature, luck):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e4, -2e4, -3e4]])
    drawn = draw(logits, torch.full((2, 1), luck), temperature)
    assert drawn.tolist() == [[1], [0]]


# ---- texts ---------------------------------------------------------------------------------------

def test_top_k_1_is_the_likeliest_and_padded_rows_are_never_drawn():
    model, idx = shaken(tiny()), tokens(2, 4)
    greedy = generate(model, idx, 8, temperature=0)
    assert torch.equal(generate(model, idx, 8, top_k=1), greedy)
    assert torch.equal(generate(model, idx, 8, top_k=1, temperature=1e-3), greedy)
    drawn = generate(model, idx, 200, num_tokens=5, temperature=5.0)[:, 4:]
    assert set(drawn.unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_text_does_not_depend_on_how_many_are_made_with_it():
    model, idx = shaken(tiny()), tokens(1, 4)
    texts = []
    for count in (1, 2, 7):
        torch.manual_seed(5)
        texts.append(generate(model, idx.expand(count, 4), 30))
    assert torch.equal(texts[0][0], texts[1][0]) and torch.equal(texts[1], texts[2][:2])
    assert len({tuple(row) for row in texts[2].tolist()}) == 7


def test_a_stopped_row_stays_stopped_and_the_stream_ends_with_the_last():
    model, idx = shaken(tiny()), tokens(4, 3)
    torch.manual_seed(0)
    out = generate(model, idx, 500, stop_token=7, temperature=2.0)[:, 3:]
    ends = [row.tolist().index(7) for row in out]
    assert len(set(ends)) > 1 and max(ends) == out.size(1) - 1
    assert all((row[end:] == 7).all() for row, end in zip(out, ends, strict=True))
