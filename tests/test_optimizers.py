"""How a gradient becomes a step: the schedule, who has which parameters, Muon and the banks."""
import pytest
import torch
from conftest import each_system, tiny

from nanodva.optimizers import (
    MuonAdamW,
    build_optimizer,
    learning_rate,
    orthogonal,
    parameter_groups,
    set_learning_rate,
)
from train import TrainConfig

# ---- the schedule --------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_decays():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=24)
    rates = [learning_rate(step, cfg) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # Quarters of half a cosine
    assert rates[4:25:5] == pytest.approx([1, 0.868, 0.55, 0.232, 0.1], abs=1e-3)
    assert rates[24:] == pytest.approx([0.1] * 16)
    cfg.decay_lr = False
    assert {learning_rate(step, cfg) for step in range(40)} == {1.0}
    # A warm-up as long as the decay, or longer, divides by nothing
    for warmup, decay in [(0, 0), (10, 10), (10, 0)]:
        cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=decay)
        rates = [learning_rate(step, cfg) for step in range(30)]
        assert max(rates) == rates[warmup] == 1.0 and rates[-1] == pytest.approx(0.1)


# ---- who has which parameters --------------------------------------------------------------------

@each_system
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_with_the_right_optimizer_and_decay(system, optimizer):
    model, found = tiny(**system), []
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    cfg = TrainConfig(optimizer=optimizer, weight_decay=0.3, embedding_lr=3.0, dtype="float16")
    for group in build_optimizer(model, cfg).param_groups:
        for p in group["params"]:
            name = names[p]
            found.append(name)
            in_bank = "attn.bank." in name
            matrix = p.dim() >= 2 and name.startswith("transformer.h.") and not in_bank
            assert (group["kind"] == "muon") == (optimizer == "muon" and matrix), name
            assert group.get("dtype") == (torch.float16 if group["kind"] == "muon" else None)
            if not in_bank:
                assert group["weight_decay"] == (0.3 if p.dim() >= 2 else 0), name
                embeds = name in ("transformer.wte.weight", "transformer.wpe.weight")
                assert group["lr_multiple"] == (3 if embeds else 1), name
    assert sorted(found) == sorted(names.values())


@pytest.mark.parametrize("block", ["gpt2", "dva"])
def test_banks_have_groups_of_their_own_with_their_authors_constants(block):
    model = tiny(n_layer=2, block=block, bank_layers=2)
    own = build_optimizer(model, TrainConfig(learning_rate=0.01, bank_lr=5.0))
    set_learning_rate(own, 0.004)
    groups = {p: group for group in own.param_groups for p in group["params"]}

    def constants(p):
        return [groups[p][name] for name in ("kind", "betas", "eps", "weight_decay", "lr")]
    for bank in model.banks():
        assert constants(bank.table) == ["adamw", (0.8, 0.995), 1e-10, 0.01, 5 * 0.004]
        # Under DVA the norm divides gamma out, and it is not learned
        assert (bank.gamma in groups) == (block == "gpt2")
        if block == "gpt2":
            assert constants(bank.gamma) == ["adamw", (0.96, 0.95), 1e-10, 0, 25 * 0.004]
    assert groups[model.transformer.wte.weight]["lr"] == 0.004


def test_adamw_is_torchs_in_its_plainest_form():
    models = [tiny(), tiny()]
    cfg = TrainConfig(learning_rate=1e-2, weight_decay=0.2, beta1=0.8, beta2=0.9)
    ours = build_optimizer(models[0], cfg)
    matrices = [p for p in models[1].parameters() if p.dim() == 2]
    vectors = [p for p in models[1].parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW([dict(params=matrices, weight_decay=0.2),
                                dict(params=vectors, weight_decay=0.0)],
                               lr=5e-3, betas=(0.8, 0.9), foreach=False, fused=False)
    set_learning_rate(ours, 5e-3)
    idx = torch.arange(32).view(2, 16)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model(idx, idx).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


# ---- Muon ----------------------------------------------------------------------------------------

def muon(params, dtype=torch.float32):
    return MuonAdamW([dict(params=params, kind="muon", momentum=0.95, weight_decay=0.3, lr=0.1,
                           dtype=dtype)])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first with Muon")
def test_muon_is_torchs():
    torch.manual_seed(0)
    # Some alike, tall, flat, square, a single row
    shapes = [(24, 8), (8, 24), (8, 8), (24, 8), (8, 24), (1, 5)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    without_gradient = torch.nn.Parameter(torch.ones(8, 8))
    optimizers = (muon([*ours, without_gradient], dtype=torch.bfloat16),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3,
                                   adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            # bfloat16 inside; a step moves an element by about 0.02
            torch.testing.assert_close(a, b, rtol=0, atol=3e-3)
    assert (without_gradient == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_muon_brings_singular_values_near_one(dtype):
    torch.manual_seed(0)
    for shape in ((3, 40, 40), (2, 16, 64), (2, 64, 16)):
        gradients = torch.randn(shape)
        # They may be smaller than float16's smallest number
        for size in (1.0, 1e-8):
            x = orthogonal(size * gradients, dtype)
            values = torch.linalg.svdvals(x.float())
            assert x.dtype == dtype
            assert 0.2 < values.min() and values.max() < 1.3 and values.median() > 0.6
    assert not orthogonal(torch.zeros(1, 4, 4), dtype).any()


def test_a_readers_convolution_is_a_matrix_and_no_embedding():
    """Muon takes its weight (rows, columns, width) as (rows, columns x width)."""
    model = tiny()
    model.transformer.h[0].add_module("conv", torch.nn.Conv1d(24, 24, 3))
    matrices = parameter_groups(model)["matrices"]
    assert any(p is model.transformer.h[0].conv.weight for p in matrices)
    torch.manual_seed(0)
    folded, flat = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4, 3), (6, 12)))
    folded.grad = torch.randn(6, 4, 3)
    flat.grad = folded.grad.flatten(1)
    muon([folded]).step()
    muon([flat]).step()
    torch.testing.assert_close(folded.flatten(1), flat)
    assert (flat != 1).all()
