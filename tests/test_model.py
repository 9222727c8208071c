"""Each block against an oracle, with a bank and without; the cache, and what is generated."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import each_system, shaken, tiny, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from model import GPT, Cache, ModelConfig, generate, mean_loss, sample_token

each_block = pytest.mark.parametrize("block", ["gpt2", "dva"])


# ---- DVA and rotary positions against their definitions ------------------------------------------

def turned(x):
    """
    x (B, T, N) with each pair of channels (c, c + N/2) taken for a complex number, and multiplied
    by e^(i position / 10000^(2c/N)).
    """
    T, N = x.shape[-2:]
    angle = torch.tensor([[t / 10000 ** (2 * c / N) for c in range(N // 2)] for t in range(T)])
    z = torch.complex(x[..., :N // 2], x[..., N // 2:])
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("value_norm, rotary, banked",
                         list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("value_dim, qk_dim", [(40, 8), (24, 24)])
def test_dva_is_the_sum_of_pair_values(value_norm, value_dim, qk_dim, rotary, banked):
    model = shaken(tiny(block="dva", value_norm=value_norm, value_dim=value_dim, qk_dim=qk_dim,
                        rotary=rotary, bank_layers=banked))
    attn, B, T = model.transformer.h[-1].attn, 2, 16
    x, idx = torch.randn(B, T, 24), tokens(B, T)
    q, k, g = attn.c_q(x), attn.c_k(x), attn.c_gate(x)
    u = attn.bank.gamma * attn.bank.table[idx] if banked else attn.c_v(x)
    if rotary:
        q, k = turned(q), turned(k)
    strength = torch.zeros(B, T, T)
    for i in range(T):
        scores = (k[:, :i + 1] @ q[:, i, :, None])[..., 0] / math.sqrt(qk_dim)
        strength[:, i, :i + 1] = torch.softmax(scores, dim=-1)
    # v_ij, (B, T, T, M): the tensor that the model never builds
    pairs = g[:, :, None, :] * u[:, None, :, :]
    if value_norm:
        mixed = torch.einsum("bij,bjm->bim", strength, u)
        rms = (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        pairs = pairs * (attn.norm.weight / rms)[:, :, None, :]
    expected = attn.c_proj(torch.einsum("bij,bijm->bim", strength, pairs))
    torch.testing.assert_close(attn(x, idx, model.rotary), expected, atol=1e-5, rtol=1e-5)


def test_rotary_positions_turn_every_head_of_gpt2():
    model = shaken(tiny(block="gpt2", rotary=True))
    attn, x, mixed = model.transformer.h[0].attn, torch.randn(2, 16, 24), []
    q, k, v = attn.c_q(x), attn.c_k(x), attn.c_v(x)
    for head in (slice(0, 12), slice(12, 24)):
        scores = turned(q[..., head]) @ turned(k[..., head]).mT / math.sqrt(12)
        scores = scores + torch.full((16, 16), -math.inf).triu(1)
        mixed.append(scores.softmax(dim=-1) @ v[..., head])
    expected = attn.c_proj(torch.cat(mixed, dim=-1))
    torch.testing.assert_close(attn(x, tokens(2, 16), model.rotary), expected, atol=1e-5, rtol=1e-5)


@each_block
def test_rotary_positions_can_take_the_place_of_learned_ones(block):
    both, alone = (shaken(tiny(block=block, rotary=rotary)) for rotary in (True, "only"))
    assert both.num_params() - alone.num_params() == both.transformer.wpe.weight.numel()
    torch.nn.init.zeros_(both.transformer.wpe.weight)
    alone.load_state_dict(both.state_dict(), strict=False)
    idx = tokens(2, 16)
    torch.testing.assert_close(alone(idx), both(idx))


@pytest.mark.parametrize("T, S, D, M", [(16, 16, 8, 24), (16, 16, 24, 24), (1, 16, 8, 24),
                                        (600, 600, 8, 24), (600, 600, 8, 8), (1, 600, 8, 8),
                                        (300, 700, 8, 12)])
def test_attention_is_torchs_with_the_mask_written_out(T, S, D, M):
    """The explicit softmax takes 128 queries at a time; the last shape continues a long cache."""
    q, k, v = torch.randn(2, 3, T, D), torch.randn(2, 3, S, D), torch.randn(2, 3, S, M)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for ours in (model_module.explicit_attention, model_module.attend):
        torch.testing.assert_close(ours(q, k, v), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_rms_norm_is_torchs_in_the_type_of_its_input(dtype, size):
    norm = model_module.RMSNorm(40, eps=1e-5)
    torch.nn.init.uniform_(norm.weight)
    x = (size * torch.randn(7, 40)).to(dtype)
    expected = F.rms_norm(x.float(), (40,), norm.weight, eps=1e-5)
    precision = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).float(), expected, atol=precision, rtol=precision)


@pytest.mark.parametrize("settings, block_params", [
    (dict(block="gpt2"), 12 * 768**2 + 2 * 768),
    (dict(block="dva", qk_dim=768), 5 * 768**2 + 2 * 768),
    (dict(block="dva"), 3 * 768**2 + 2 * 768 * 64 + 2 * 768)])
def test_parameters_at_the_size_of_gpt2(settings, block_params):
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50304, **settings))
    assert model.num_params() == (50304 + 1024) * 768 + 12 * block_params + 768


# ---- banks ---------------------------------------------------------------------------------------

@each_block
def test_a_bank_starts_as_values_projected_from_the_token_embedding(block):
    model = tiny(block=block, bank_layers=1, vocab_size=101, bias=False)
    attn = model.transformer.h[-1].attn
    assert [layer.attn.bank is None for layer in model.transformer.h] == [True, True, False]
    assert [layer.attn.c_v is None for layer in model.transformer.h] == [False, False, True]
    assert attn.bank.gamma == 1
    embedded = F.layer_norm(model.transformer.wte.weight, (24,))
    # 101 equations for the 24 unknowns of each channel
    w_v = torch.linalg.lstsq(embedded, attn.bank.table).solution.T
    torch.testing.assert_close(embedded @ w_v.T, attn.bank.table, atol=1e-5, rtol=0)
    assert w_v.std().item() == pytest.approx(0.02, rel=0.15)


@each_block
def test_a_bank_layer_caches_no_values_and_the_ids_are_cached_once(block):
    model, cache, idx = tiny(block=block, bank_layers=2), Cache(16), tokens(2, 9)
    model(idx[:, :5], cache=cache)
    model(idx[:, 5:6], cache=cache)
    layers = [layer.attn for layer in model.transformer.h]
    assert list(cache.keys) == layers and list(cache.values) == layers[:1]
    assert cache.length == 6 and torch.equal(cache.ids, idx[:, :6])


@pytest.mark.parametrize("system, dtype", [
    (dict(block="dva", bank_layers=1), "float32"),
    *(pytest.param(system, dtype, marks=pytest.mark.slow) for system, dtype in (
        (dict(block="dva", bank_layers=1), "bfloat16"), (dict(block="mean"), "bfloat16"),
        (dict(block="gpt2", bank_layers=1, rotary=True), "float32"),
        (dict(block="gpt2", bank_layers=1, rotary=True), "bfloat16")))], ids=str)
def test_the_compiled_model_is_one_graph_and_trains_the_same(system, dtype):
    """Under autocast, compiled gradients of the scores are bfloat16, as a fused kernel's are."""
    idx, counter = tokens(2, 17, 200), CompileCounterWithBackend("aot_eager")
    eager, model = (shaken(tiny(n_layer=2, vocab_size=200, **system)).train() for _ in range(2))
    torch._dynamo.reset()
    # With fullgraph any break in the graph is an error
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    for each in (compiled, eager):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = each(idx[:, :-1], idx[:, 1:])
        loss.backward()
    assert counter.frame_count == 1
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= allowed * theirs.grad.norm()


# ---- what every block must do --------------------------------------------------------------------

@each_system
def test_every_position_sees_itself_and_all_earlier_ones_and_no_later_one(system):
    model, idx = shaken(tiny(**system)), tokens(1, 16)
    before = model(idx)
    for position in (0, 7, 15):
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 37
        moved = (model(changed) - before).abs().amax(dim=-1)[0]
        assert (moved[:position] < 1e-6).all() and (moved[position:] > 1e-5).all()


@each_system
def test_every_parameter_gets_a_dense_gradient(system):
    model, idx = shaken(tiny(**system)).train(), tokens(4, 17)
    model(idx[:, :-1], idx[:, 1:]).backward()
    for name, p in model.named_parameters():
        # Under DVA's norm the scale of a bank cancels, and it alone is not learned
        if system["block"] in ("dva", "sigmoid") and name.endswith("bank.gamma"):
            assert p.grad is None and not p.requires_grad
        else:
            assert not p.grad.is_sparse and p.grad.abs().max() > 0, name


@each_block
def test_matrices_start_at_002_and_those_that_end_a_layer_smaller(block):
    model = tiny(block=block, n_layer=8, n_embd=64, vocab_size=512)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


@each_system
def test_dropout_is_off_in_evaluation_mode(system):
    model, idx = shaken(tiny(dropout=0.5, **system)), tokens(2, 16)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


@each_system
def test_flops_per_token_agree_with_torchs_counter(system):
    model, idx = tiny(block_size=32, **system), tokens(2, 32)
    # The counter does not know torch's fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    counted = counter.get_total_flops() / idx.numel()
    assert counted == pytest.approx(model.flops_per_token(), rel=0.01)


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
        logits = model(window)
        assert torch.equal(logits[:, -1].argmax(dim=-1, keepdim=True), new)
        window = torch.cat((window, new), dim=1)


@each_system
def test_any_chunk_continues_what_the_cache_holds(system):
    """The text in two parts, in every way, and in more; the logits of all positions."""
    model, idx = shaken(tiny(**system)), tokens(2, 16)
    whole = model(idx)
    for parts in [(n, 16 - n) for n in range(1, 16)] + [(5, 6, 5), (1, 14, 1), (6, *[1] * 10)]:
        cache, logits = Cache(16), []
        for part in idx.split(parts, dim=1):
            logits.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("T, S", [(200, 200), (1, 200)])
def test_scores_are_not_rounded_before_the_softmax(size, T, S):
    """In bfloat16 the explicit softmax is as exact as the fused kernels, for large scores, too."""
    torch.manual_seed(0)
    q, k, v = size**0.5 * torch.randn(3, 1, 2, S, 64).bfloat16()
    q, v = q[..., -T:, :], v / size**0.5
    exact = model_module.explicit_attention(*(x.double() for x in (q, k, v)))
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model_module.explicit_attention(q, k, v)
    assert (ours - exact).norm() < 1.1 * (kernel - exact).norm() + 1e-3 * exact.norm()
    assert (ours - exact).norm() < 0.0035 * exact.norm()


# ---- sampling a token ----------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, 0, 1), (0.5, 0, 1), (1, 5, 1), (1, 0, 0.9), (1, 0, 0.6), (1, 0, 0.3), (1, 0, 1e-9),
    (1, 9, 0.8), (0.7, 7, 0.8), (2, 1, 1)])
def test_samples_follow_the_probabilities_that_transformers_leaves(temperature, top_k, top_p):
    """
    Of 20,000 rows as many sample a token as its probability says, to 5 standard deviations, and
    none a token of probability 0.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(1, 23, generator=generator)
        left = logits / temperature
        if top_k:
            left = TopKLogitsWarper(top_k)(None, left)
        expected = TopPLogitsWarper(top_p)(None, left).softmax(dim=-1)[0]
        uniform = torch.rand(20000, 1, generator=generator)
        found = sample_token(logits.expand(20000, 23), uniform, temperature, top_k, top_p)
        share = found.flatten().bincount(minlength=23) / 20000
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-6, 1e-4])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e4, -2e4, -3e4]])
    for uniform in (0.0, 1 - 2**-24):
        found = sample_token(logits, torch.full((2, 1), uniform), temperature)
        assert found.tolist() == [[1], [0]]


@pytest.mark.parametrize("temperature, top_k", [(0, 0), (1, 3)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_token_is_sampled_from_logits_that_are_no_numbers(temperature, top_k, wrong):
    logits = torch.zeros(2, 9)
    logits[1, 4] = wrong
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_token(logits, torch.rand(2, 1), temperature, top_k)


# ---- texts ---------------------------------------------------------------------------------------

@each_block
def test_a_text_does_not_depend_on_how_many_are_made_with_it(block):
    model, idx = shaken(tiny(block=block, bank_layers=1)), tokens(2, 9)

    def texts(rows, count=1):
        torch.manual_seed(5)
        return generate(model, rows, 30, num_samples=count)
    seven = texts(idx[:1], 7)
    assert len({tuple(row) for row in seven.tolist()}) == 7
    for count in (1, 2):
        assert torch.equal(texts(idx[:1], count), seven[:count])
    assert torch.equal(texts(idx, 3), texts(idx.repeat_interleave(3, dim=0)))


def test_a_stopped_row_stays_stopped_and_the_stream_ends_with_the_last():
    model, idx = shaken(tiny()), tokens(4, 3)
    torch.manual_seed(0)
    out = generate(model, idx, 500, stop_token=7, temperature=2.0)[:, 3:]
    ends = [row.tolist().index(7) for row in out]
    assert len(set(ends)) > 1 and max(ends) == out.size(1) - 1
    assert all((row[end:] == 7).all() for row, end in zip(out, ends, strict=True))


# ---- the loss without the logits -----------------------------------------------------------------

def gradients_of(model, loss):
    """The gradients of three times the loss, as one vector."""
    model.zero_grad()
    (3 * loss).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2),
                                              (torch.float16, 4e-3)])
@pytest.mark.parametrize("vocab_size", [37, 400])
def test_the_loss_is_the_same_without_logits(vocab_size, dtype, precision):
    """With 37 tokens by the logits of all rows, with 400 by those of 512 of the 600 at a time."""
    model = shaken(tiny(block="dva", bank_layers=1, block_size=300, vocab_size=vocab_size)).train()
    idx = tokens(2, 301, vocab_size)
    targets = idx[:, 1:].clone()
    targets[0, ::3] = -1
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, loss = model(idx[:, :-1]), model(idx[:, :-1], targets)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        with torch.no_grad():
            without_gradients = model(idx[:, :-1], targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), atol=min(precision, 1e-3), rtol=0)
    torch.testing.assert_close(without_gradients, loss.detach(), atol=1e-5, rtol=1e-5)
    wanted, found = gradients_of(model, expected), gradients_of(model, loss)
    assert (found - wanted).norm() < precision * wanted.norm()


@pytest.mark.parametrize("vocab_size", [37, 400])
def test_only_minus_one_is_ignored(vocab_size):
    model, idx = tiny(vocab_size=vocab_size).train(), tokens(2, 16)
    loss = model(idx, torch.full_like(idx, -1))
    assert loss == 0 and (gradients_of(model, loss) == 0).all()
    for wrong in (-100, -2, 400):
        targets = idx.clone()
        targets[1, 3] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
            model(idx, targets)


def test_the_loss_is_differentiated_once():
    """Its gradients are made with the logits and scaled in place, so all else is refused."""
    model, idx = tiny(vocab_size=400).train(), tokens(2, 16, 400)
    weight, loss = model.lm_head.weight, model(idx, idx)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no second derivatives.* take mean_loss.*MATH"):
        torch.autograd.grad(model(idx, idx), weight, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        [gradient] = torch.autograd.grad(mean_loss(model(idx), idx), weight, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), weight)[0].any()


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("past", [0, 16])
def test_a_sequence_longer_than_the_window_is_refused(past):
    model, cache = tiny(), Cache(17)
    if past:
        model(tokens(1, past), cache=cache)
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        model(tokens(1, 17 - past), cache=cache)


@pytest.mark.parametrize("settings, words", [
    (dict(block="mean", bank_layers=1), "block of the kind 'mean' cannot hold a bank"),
    (dict(n_embd=25), "n_embd=25 does not divide into n_head=2"),
    (dict(block="dva", qk_dim=7), "qk_dim=7: rotary positions rotate pairs of channels"),
    (dict(block="gpt2", n_head=8, rotary=True), "n_head=8: .* a query has 3"),
    (dict(gelu="new"), "gelu='new': choose from exact"), (dict(vocab_size=0), "vocab_size=0")],
    ids=str)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
