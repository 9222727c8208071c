"""The mathematics: each block against an oracle, with and without banks."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import prepare_data
import sample
import train
from model import BLOCKS, GPT, Cache, ModelConfig
from optimizers import build_optimizers, clip_gradients

SYSTEMS = [dict(block=block, bank_layers=banks, shift=placed, rotary=placed)
           for block, banks, placed in itertools.product(BLOCKS, (0, 1), (False, True))]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    settings = dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=24, qk_dim=8, bias=True) | settings
    return GPT(ModelConfig(**settings)).eval()


def shaken(model, seed=1):
    """The model with every parameter moved off its initialisation, where many effects are too small to be seen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def tokens(B, T, V=37, seed=2):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- DVA and BoV against their definitions --------------------------------------------------------------------------

def turned(x):
    """x (B, T, N), each pair of channels (c, c + N/2) as a complex number, times e^(i position / 10000^(2c/N))."""
    T, N = x.shape[-2:]
    angle = torch.tensor([[t / 10000 ** (2 * c / N) for c in range(N // 2)] for t in range(T)])
    z = torch.complex(x[..., :N // 2], x[..., N // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("value_norm, value_dim, qk_dim, shift, rotary",
                         list(itertools.product((True, False), (24, 40), (8, 24), (True, False), (True, False))))
def test_dva_is_the_sum_of_pair_values(value_norm, value_dim, qk_dim, shift, rotary):
    attn = shaken(tiny(block="dva", value_norm=value_norm, value_dim=value_dim, qk_dim=qk_dim, shift=shift,
                       rotary=rotary)).transformer.h[0].attn
    B, T = 2, 16
    x = torch.randn(B, T, 24)
    q, k, g, u = (layer(x) for layer in (attn.c_q, attn.c_k, attn.c_gate, attn.c_v))
    if shift:
        for t in (k, u):                                   # in place, from the last position backwards
            for j in range(T - 1, -1, -1):
                t[:, j, :t.size(-1) // 2] = t[:, j - 1, :t.size(-1) // 2] if j else 0
    if rotary:
        q, k = turned(q), turned(k)
    strength = torch.zeros(B, T, T)
    for i in range(T):
        strength[:, i, :i + 1] = torch.softmax((k[:, :i + 1] @ q[:, i, :, None])[..., 0] / math.sqrt(qk_dim), dim=-1)
    pairs = g[:, :, None, :] * u[:, None, :, :]            # v_ij: (B, T, T, M), the tensor that the model never builds
    if value_norm:
        mixed = torch.einsum("bij,bjm->bim", strength, u)
        rms = (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        pairs = pairs * (attn.norm.weight / rms)[:, :, None, :]
    expected = attn.c_proj(torch.einsum("bij,bijm->bim", strength, pairs))
    torch.testing.assert_close(attn(x, None), expected, atol=1e-5, rtol=1e-5)


def test_rotary_positions_turn_every_head_of_gpt2():
    attn = shaken(tiny(block="gpt2", rotary=True)).transformer.h[0].attn
    x, mixed = torch.randn(2, 16, 24), []
    q, k, v = attn.c_attn(x).split(24, dim=2)
    for head in (slice(0, 12), slice(12, 24)):
        scores = turned(q[..., head]) @ turned(k[..., head]).mT / math.sqrt(12)
        mixed.append((scores + torch.full((16, 16), -math.inf).triu(1)).softmax(dim=-1) @ v[..., head])
    torch.testing.assert_close(attn(x), attn.c_proj(torch.cat(mixed, dim=-1)), atol=1e-5, rtol=1e-5)


def test_rotary_positions_tell_the_distance_and_nothing_else():
    N = 8
    torch.manual_seed(0)
    q, k = torch.randn(N), torch.randn(N)
    strength = torch.einsum("in,jn->ij", *model_module.rotate(q.expand(40, N), k.expand(40, N)))          # the same q and k everywhere
    for distance in (-7, 0, 1, 30):
        along = strength.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)
    assert abs(strength[0, 0] - strength[0, 1]) > 1e-3
    last, _ = model_module.rotate(q.expand(1, N), k.expand(40, N))     # one query, the newest position
    torch.testing.assert_close(last[0], turned(q.expand(40, N))[-1])


@pytest.mark.parametrize("T, S, D, M", [(16, 16, 8, 24), (16, 16, 24, 24), (1, 16, 8, 24), (600, 600, 8, 24), (600, 600, 8, 8)])
def test_both_attention_paths_give_the_same(T, S, D, M):
    q, k, v = torch.randn(2, 3, T, D), torch.randn(2, 3, S, D), torch.randn(2, 3, S, M)
    fused = model_module.fused(q, k, v)
    torch.testing.assert_close(model_module.explicit(q, k, v), fused, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model_module.attend(q, k, v), fused, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_bank_starts_as_values_projected_from_the_token_embedding(block):
    model = tiny(block=block, bank_layers=1, vocab_size=101, bias=False)
    attn = model.transformer.h[-1].attn
    assert [getattr(b.attn, "bank", None) is None for b in model.transformer.h] == [True, True, False]
    assert attn.c_v is None if block == "dva" else attn.c_attn.out_features == 2 * 24      # no W_v
    table = F.layer_norm(model.transformer.wte.weight, (24,))
    w_v = torch.linalg.lstsq(table, attn.bank.weight).solution.T                # 101 equations for 24 unknowns a channel
    torch.testing.assert_close(table @ w_v.T, attn.bank.weight, atol=1e-5, rtol=0)
    assert w_v.std().item() == pytest.approx(0.02, rel=0.15)

    oracle = tiny(block=block, vocab_size=101, bias=False)                      # the same layer with W_v in it
    state = {k: v for k, v in model.state_dict().items() if "bank" not in k}
    if block == "gpt2":
        key = "transformer.h.2.attn.c_attn.weight"
        state[key] = torch.cat((state[key], w_v))
    else:
        state["transformer.h.2.attn.c_v.weight"] = w_v
    oracle.load_state_dict(state)
    idx = tokens(2, 16, 101)
    embedded = F.layer_norm(oracle.transformer.wte(idx), (24,))
    layer = oracle.transformer.h[2].attn
    c_v = layer.c_attn if block == "gpt2" else layer.c_v
    c_v.register_forward_hook(lambda module, args, out: torch.cat((out[..., :-24], embedded @ w_v.T), dim=-1))
    torch.testing.assert_close(model(idx, idx)[0], oracle(idx, idx)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_banks_cache_token_ids_once_and_no_values(block):
    model, cache = tiny(block=block, bank_layers=2), Cache(16)
    model(tokens(2, 5), cache=cache)
    kinds = [[str(t.dtype) for t in cache.memory[owner]] for owner in (*(b.attn for b in model.transformer.h), model)]
    assert kinds == [["torch.float32"] * 2, ["torch.float32"], ["torch.float32"], ["torch.int64"]]


@pytest.mark.parametrize("block", BLOCKS)
def test_banks_break_the_compiled_graph_once_and_train_the_same(block):
    idx, graphs = tokens(2, 17), CompileCounterWithBackend("aot_eager")
    eager, model = (shaken(tiny(block=block, bank_layers=2)).train() for _ in range(2))
    torch.compile(model, backend=graphs, dynamic=False)(idx[:, :-1], idx[:, 1:])[1].backward()
    eager(idx[:, :-1], idx[:, 1:])[1].backward()
    assert graphs.frame_count == 2                                     # what comes before the look-ups, and all the rest
    for ours, theirs in zip(model.parameters(), eager.parameters()):
        assert ours.grad.is_sparse == theirs.grad.is_sparse
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense(), atol=1e-6, rtol=1e-4)


# ---- GPT-2 against transformers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_layer, n_head, n_embd", [(2, 2, 32), (3, 4, 48)])
def test_gpt2_is_transformers_gpt2(n_layer, n_head, n_embd):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_embd=n_embd, n_layer=n_layer, n_head=n_head)).eval()
    ours = tiny(vocab_size=97, block_size=24, n_layer=n_layer, n_head=n_head, n_embd=n_embd, gelu="tanh")
    state = shaken(theirs).state_dict()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")                 # stored (in, out), Linear's are (out, in)
    ours.load_state_dict({k: v.T if k.endswith(conv1d) else v for k, v in state.items()})
    idx = tokens(3, 24, 97)
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


# ---- what every block must do ---------------------------------------------------------------------------------------

@each_system
def test_no_position_sees_a_later_one(system):
    model, idx = shaken(tiny(**system)), tokens(1, 16)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 37
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=1e-6)
    assert (before[:, 10] - after[:, 10]).abs().max() > 1e-3


@each_system
def test_cached_generation_equals_uncached_across_a_full_window(system):
    model, prompt = shaken(tiny(**system)), tokens(2, 5)
    seen = {True: [], False: []}
    texts = []
    for use_cache in (True, False):
        hook = model.lm_head.register_forward_hook(lambda m, a, out: seen[use_cache].append(out[:, -1]))
        torch.manual_seed(3)
        texts.append(model.generate(prompt, 40, use_cache=use_cache))          # the window holds 16
        hook.remove()
    assert texts[0].shape == (2, 45) and torch.equal(*texts)
    torch.testing.assert_close(torch.stack(seen[True]), torch.stack(seen[False]), atol=2e-5, rtol=1e-4)


@each_system
def test_every_parameter_gets_a_gradient(system):
    model, idx = shaken(tiny(**system)).train(), tokens(4, 17)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.to_dense().abs().max() > 0, name


@each_system
def test_the_loss_at_initialisation_is_that_of_guessing(system):
    idx = tokens(8, 17, 512)
    assert tiny(vocab_size=512, **system)(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(512), abs=0.1)


@each_system
def test_fifty_steps_learn_one_batch_by_heart(system):
    model, idx = tiny(n_embd=64, n_head=4, **system).train(), tokens(4, 17)
    optimizers = build_optimizers(model, train.TrainConfig(learning_rate=1e-2))
    for _ in range(50):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("clip", (0, 0.1))
def test_a_banks_sparse_gradient_trains_as_a_dense_one_and_leaves_unseen_rows_alone(block, clip, monkeypatch):
    trained = []
    for sparse in (True, False):
        if not sparse:
            monkeypatch.setattr(model_module, "look_up", lambda tables, ids: [F.embedding(ids, table) for table in tables])
        model = tiny(block=block, bank_layers=1).train()
        before = model.transformer.h[-1].attn.bank.weight.detach().clone()
        optimizers = build_optimizers(model, train.TrainConfig(learning_rate=1e-2))
        for step in range(3):
            for half in tokens(4, 17, 20, seed=step).split(2):             # ids below 20 only, in two micro-batches
                model(half[:, :-1], half[:, 1:])[1].backward()
            assert model.transformer.h[-1].attn.bank.weight.grad.is_sparse == sparse
            norm = clip_gradients(model, clip)
            grads = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()])
            assert grads.norm().item() == pytest.approx(min(clip, norm.item()) if clip else norm.item(), rel=1e-4)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        after = model.transformer.h[-1].attn.bank.weight
        assert torch.equal(after[20:], before[20:]) and (after[:20] != before[:20]).any(dim=1).all()
        trained.append(model)
    for p, q in zip(trained[0].parameters(), trained[1].parameters()):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0)            # Adam makes steps of 1e-2 of any gradient


@each_system
def test_dropout_is_off_in_eval_mode(system):
    model, idx = shaken(tiny(dropout=0.5, **system)), tokens(2, 16)
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    model.train()
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


@each_system
@pytest.mark.parametrize("equal_widths", (True, False))
def test_flops_per_token_agree_with_torchs_counter(system, equal_widths, monkeypatch):
    # the counter knows no fused CPU attention: count the textbook's lines
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, dropout_p, is_causal: (q @ k.mT).softmax(dim=-1) @ v)
    model = tiny(block_size=32, qk_dim=24 if equal_widths else 8, **system)
    idx = tokens(2, 32)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(model.flops_per_token(), rel=0.01)


@each_system
def test_parameter_groups_hold_every_parameter_once(system):
    model = tiny(**system)
    groups = model.parameter_groups()
    held = [p for group in groups.values() for p in group]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    assert [p.shape for p in groups["banks"]] == [(37, 24)] * system["bank_layers"]
    assert {p.dim() for p in groups["matrices"]} == {2} and len(groups["embeddings"]) == 2
    if system["bank_layers"]:
        assert any(p is model.transformer.h[-1].attn.bank_scale for p in groups["vectors"])


def test_tied_weights_stay_one_tensor():
    model = tiny()
    again = tiny(seed=9)
    again.load_state_dict(model.state_dict())
    for m in (model, again.to(torch.float64)):
        assert m.lm_head.weight is m.transformer.wte.weight
    assert model.num_params() == sum(p.numel() for p in set(model.parameters()))


@pytest.mark.parametrize("settings, block_params", [
    (dict(block="gpt2"), 12 * 768**2 + 2 * 768), (dict(block="dva", qk_dim=768), 5 * 768**2 + 2 * 768),
    (dict(block="dva"), 3 * 768**2 + 2 * 768 * 64 + 2 * 768)])
def test_parameters_at_gpt2_size(settings, block_params):
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50304, **settings))
    assert model.num_params() == (50304 + 1024) * 768 + 12 * block_params + 768


# ---- generation -----------------------------------------------------------------------------------------------------

def test_temperature_0_takes_the_likeliest():
    model, idx = shaken(tiny()), tokens(3, 4)
    out = model.generate(idx, 8, temperature=0)
    for t in range(4, 12):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.6), dict(top_k=9, top_p=0.8), dict(num_tokens=7), dict(temperature=0.5)], ids=str)
def test_draws_follow_the_chances(options):
    """Of 20,000 rows, as many draw a token as its chance says, to 5 standard deviations; one without a chance is never drawn."""
    model = tiny(vocab_size=23).eval()
    idx = torch.full((20000, 1), 3)
    logits = model(idx[:1])[0][0, 0].detach() * 20                     # a fresh model's are nearly alike
    model.forward = lambda new, cache: (logits.repeat(len(new), 1, 1), None)
    chances = (logits / options.get("temperature", 1)).masked_fill(torch.arange(23) >= options.get("num_tokens", 23), -math.inf).softmax(0)
    likeliest = chances.argsort(descending=True)
    keep = likeliest[:options.get("top_k", 23)]
    before = (chances[keep] / chances[keep].sum()).cumsum(0) - chances[keep] / chances[keep].sum()
    keep = keep[before < options.get("top_p", 1.1)]
    expected = torch.zeros(23).index_copy(0, keep, chances[keep] / chances[keep].sum())
    drawn = model.generate(idx, 1, **options)[:, 1].bincount(minlength=23) / 20000
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_top_k_1_is_the_likeliest_and_padded_rows_are_never_drawn():
    model, idx = shaken(tiny()), tokens(2, 4)
    assert torch.equal(model.generate(idx, 8, top_k=1), model.generate(idx, 8, temperature=0))
    assert torch.equal(model.generate(idx, 8, top_k=1, temperature=1e-3), model.generate(idx, 8, temperature=0))
    drawn = model.generate(idx, 200, num_tokens=5, temperature=5.0)[:, 4:]
    assert set(drawn.unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_stopped_row_stays_stopped_and_the_stream_ends_with_the_last():
    model, idx = shaken(tiny()), tokens(4, 3)
    torch.manual_seed(0)
    out = model.generate(idx, 500, stop_token=7, temperature=2.0)[:, 3:]
    ends = [row.tolist().index(7) for row in out]
    assert len(set(ends)) > 1 and max(ends) == out.size(1) - 1
    assert all((row[end:] == 7).all() for row, end in zip(out, ends))


def test_a_sequence_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        tiny()(tokens(1, 17))


@pytest.mark.parametrize("settings, said", [
    (dict(block="mlp"), "block='mlp': there are gpt2, dva"), (dict(n_embd=25), "n_embd=25 does not divide into n_head=2"),
    (dict(dropout=1.0), "dropout=1.0"), (dict(bank_layers=4), "bank_layers=4"), (dict(qk_dim=0), "qk_dim=0"),
    (dict(block="dva", qk_dim=7), "qk_dim=7"), (dict(block="gpt2", n_head=8, rotary=True), "n_embd / n_head=3"),
    (dict(gelu="new"), "gelu='new': there are exact, tanh")])
def test_a_wrong_setting_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        tiny(**settings)


# ---- a fourth system: two edits -------------------------------------------------------------------------------------

class RunningMeanBlock(torch.nn.Module):
    """A student's block: x + W mean(x_j for j <= i)."""

    def __init__(self, config, banked=False):
        super().__init__()
        self.c_proj = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rows=None, cache=None):
        past = x if cache is None else cache.extend(self, x)[0]
        means = past.cumsum(1) / torch.arange(1, past.size(1) + 1)[:, None]
        return x + self.c_proj(means[:, -x.size(1):])


def test_a_students_block_trains_saves_and_samples(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(BLOCKS, "mean", RunningMeanBlock)
    (tmp_path / "toy.txt").write_text("to be or not to be, that is the question. " * 60)
    prepare_data.main(["toy", f"--input={tmp_path / 'toy.txt'}", "--tokenizer=char", f"--data_dir={tmp_path / 'data'}"])
    train.main([f"--data_dir={tmp_path / 'data'}", "--dataset=toy", f"--out_dir={tmp_path / 'out'}", "--block=mean",
                "--n_layer=2", "--n_embd=32", "--block_size=16", "--batch_size=8", "--gradient_accumulation_steps=1",
                "--max_iters=20", "--lr_decay_iters=20", "--warmup_iters=0", "--learning_rate=1e-2", "--eval_interval=10",
                "--eval_iters=2", "--device=cpu", "--dtype=float32"])
    losses = [float(line.split("val loss ")[1].split()[0].rstrip(",")) for line in capsys.readouterr().out.splitlines()
              if line.startswith("step") and "val loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3
    sample.main([f"--out_dir={tmp_path / 'out'}", "--num_samples=1", "--max_new_tokens=40", "--start=to be"])
    assert len(capsys.readouterr().out) >= 45
