"""Every device of this machine computes what float32 on a CPU computes; and what is chosen."""
import itertools
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, refused, runs_differ, shaken, tiny, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from model import Cache, attend, attend_in_heads
from nanodva import machine
from nanodva.checkpoints import load_checkpoint
from nanodva.machine import Stop
from nanodva.optimizers import build_optimizer, set_learning_rate
from train import TrainConfig

CPU = torch.device("cpu")
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")
HAS_COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()

# float16 and bfloat16 keep 11 and 8 bits
PRECISION = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
SETTINGS = [dict(block=block, bank_layers=banks) for block, banks in KINDS]
DVA_BANK = dict(block="dva", bank_layers=1)

each_device = pytest.mark.parametrize("name", DEVICES)
each_kind = pytest.mark.parametrize("kind", SETTINGS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", list(PRECISION))


def gradients_of(kind, device=CPU, dtype="float32", backend=None):
    """(loss, {name: gradient}) for one batch, as numbers and in float32 on the CPU."""
    model = shaken(tiny(n_layer=2, **kind)).to(device)
    forward = torch.compile(model, backend=backend, dynamic=False) if backend else model
    idx = tokens(4, 17).to(device)
    with machine.autocast(device, dtype):
        loss = forward(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()
                 if p.requires_grad}
    return loss.item(), gradients


def assert_close_gradients(found, expected, dtype):
    (loss, gradients), (expected_loss, expected) = found, expected
    assert loss == pytest.approx(expected_loss, rel=PRECISION[dtype])
    # A gradient that is next to nothing beside the others is all rounding
    size = torch.stack([p.norm() for p in expected.values()]).norm()
    for name in expected:
        distance = (gradients[name] - expected[name]).norm()
        assert distance < PRECISION[dtype] * max(expected[name].norm(), size / 100), name


# ---- the same numbers on every device ------------------------------------------------------------

@each_device
@each_kind
@each_dtype
def test_gradients_are_those_of_float32_on_the_cpu(name, kind, dtype):
    assert_close_gradients(gradients_of(kind, torch.device(name), dtype), gradients_of(kind), dtype)


@pytest.mark.parametrize("name, kind", [
    *itertools.product(DEVICES[1:], SETTINGS),
    pytest.param("cpu", DVA_BANK, marks=[pytest.mark.slow, pytest.mark.skipif(
        not HAS_COMPILER, reason="needs g++ and Python.h")])], ids=str)
def test_compiled_gradients_are_those_of_float32_on_the_cpu(name, kind):
    """By Inductor: test_model.py compiles without the last step, which takes g++ half a minute."""
    torch._dynamo.reset()
    found = gradients_of(kind, torch.device(name), "bfloat16", "inductor")
    assert_close_gradients(found, gradients_of(kind), "bfloat16")


@each_device
@each_kind
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizers_steps_are_those_of_float64_on_the_cpu(name, kind, optimizer):
    _, gradients = gradients_of(kind)
    models = [shaken(tiny(n_layer=2, **kind)).to(where) for where in (name, torch.float64)]
    for model in models:
        own = build_optimizer(model, TrainConfig(optimizer=optimizer))
        for step in range(3):
            set_learning_rate(own, 1e-2 / (step + 1))
            for parameter_name, p in model.named_parameters():
                if p.requires_grad:
                    p.grad = gradients[parameter_name].to(p) * (1 - step / 2)
            own.step()
    for p, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Rounding grows in Muon's five products
        allowed = 1e-5 if optimizer == "adamw" else 2e-3
        torch.testing.assert_close(p.detach().cpu().double(), expected.detach(), rtol=0,
                                   atol=allowed)


@each_device
@each_kind
@each_dtype
def test_logits_with_a_cache_are_those_without(name, kind, dtype):
    """As sampling computes them, with weights of that type."""
    model = shaken(tiny(**kind)).to(name, getattr(torch, dtype))
    idx, cache = tokens(2, 16).to(name), Cache(16)
    whole = model(idx).float()
    for first, end in [(0, 10), *((t, t + 1) for t in range(10, 16))]:
        logits = model(idx[:, first:end], cache=cache, last_only=True).float()
        distance = (logits[:, 0] - whole[:, end - 1]).norm() / whole[:, end - 1].norm()
        assert distance < PRECISION[dtype]


@pytest.mark.parametrize("name, dtype", [("cpu", "bfloat16"),
                                         *itertools.product(DEVICES[1:], PRECISION)])
def test_a_run_trains_saves_resumes_and_samples(run, texts, tmp_path, name, dtype):
    settings = dict(device=name, dtype=dtype, block="dva", bank_layers=1, optimizer="muon")
    run("straight", **settings)
    # An evaluation is due at this step, so the longer run has it, too
    run("parts", max_iters=5, **settings)
    run("parts", init_from="resume", max_iters=12)
    # A GPU may add up in another order
    allowed = 0 if name == "cpu" else 1e-2
    assert runs_differ(tmp_path / "straight", tmp_path / "parts") <= allowed
    tensors = load_checkpoint(tmp_path / "parts" / "last.pt")["model"].values()
    assert {(p.dtype, p.device.type) for p in tensors} == {(torch.float32, "cpu")}
    found = texts(out_dir=tmp_path / "parts", device=name, dtype=dtype, num_samples=2)
    assert [len(text) for text in found] == [22, 22]


# ---- a value too wide for a kernel ---------------------------------------------------------------

@each_device
@each_dtype
def test_a_model_with_its_values_in_heads_has_the_same_gradients(monkeypatch, name, dtype):
    """Under autocast, too, which leaves a bank's values float32 and makes the queries bfloat16."""
    expected = gradients_of(DVA_BANK)
    monkeypatch.setattr("model.attend", lambda q, k, v, dropout: attend_in_heads(q, k, v))
    assert_close_gradients(gradients_of(DVA_BANK, torch.device(name), dtype), expected, dtype)


@pytest.mark.parametrize("shape, dropout, chosen", [
    ((1, 40, 40, 64, 768), 0, "heads"), ((1, 40, 40, 64, 768), 0.1, "explicit"),
    ((1, 1, 40, 64, 768), 0, "heads"), ((1, 8, 40, 64, 768), 0, "explicit"),
    ((1, 40, 40, 64, 100), 0, "explicit"), ((2, 40, 40, 64, 768), 0, "explicit"),
    ((12, 40, 40, 64, 64), 0.1, "kernel"), ((2, 40, 40, 320, 320), 0, "explicit"),
    ((1, 40, 40, 320, 320), 0, "explicit")])
def test_a_gpu_gets_a_fused_kernel_if_one_fits(monkeypatch, shape, dropout, chosen):
    """On tensors that only claim to be on a GPU: the choice is tested, not the kernels."""
    calls = []
    for way, name in (("heads", "model.attend_in_heads"), ("explicit", "model.explicit_attention"),
                      ("kernel", "torch.nn.functional.scaled_dot_product_attention")):
        monkeypatch.setattr(name, lambda q, k, v, *rest, way=way, **options: calls.append(way) or v)
    H, T, S, D, M = shape
    with FakeTensorMode():
        q, k, v = (torch.empty(2, H, length, width, device="cuda")
                   for length, width in ((T, D), (S, D), (S, M)))
        attend(q, k, v, dropout)
    assert calls == [chosen]


# ---- what is chosen ------------------------------------------------------------------------------

def test_auto_is_the_fastest_device_and_one_that_is_not_there_is_named():
    assert machine.pick_device("auto").type == DEVICES[-1]
    assert machine.pick_device("cpu") == CPU
    for name in ("cuda:99", "cpu:", "tpu", "meta", "", "cuda:-1", "CPU"):
        with refused(f"device={name!r} is not on this machine: choose from", "cpu"):
            machine.pick_device(name)


@pytest.mark.parametrize("cpuinfo, chosen", [
    ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
    ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", "bfloat16"),
    ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", "float32"),
    ("vendor_id : AuthenticAMD\nflags : avx2 fma", "float32"),
    ("Features : fp asimd bf16", "float32"), (None, "float32")])
def test_a_cpus_instructions_tell_whether_auto_is_bfloat16(monkeypatch, tmp_path, cpuinfo, chosen):
    """As measured on four machines. macOS and Windows have no such file."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    mps = torch.device("mps")
    assert machine.pick_dtype("auto", CPU, 64) == chosen
    assert machine.pick_dtype("auto", CPU, 63) == machine.pick_dtype("auto", mps, 768) == "float32"
    assert machine.pick_sampling_dtype("auto", CPU, 124e6) == chosen
    assert machine.pick_sampling_dtype("auto", CPU, 1e6) == "float32"
    assert machine.pick_dtype("float16", CPU, 64) == "float16"
    assert machine.pick_sampling_dtype("float16", CPU, 1e6) == "float16"


@pytest.mark.parametrize("has_bfloat16, chosen", [(True, "bfloat16"), (False, "float16")])
def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch, has_bfloat16, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert machine.pick_dtype("auto", torch.device("cuda"), 64) == chosen


@pytest.mark.parametrize("device, missing, flops, is_compiled", [
    ("cpu", "", 1e15, True), ("cpu", "", 1e14, False), ("cpu", "g++", 1e15, False),
    ("cpu", "Python.h", 1e15, False), ("cuda", "", 1e16, True), ("cuda", "", 1e14, False),
    ("cuda", "triton.py", 1e16, False), ("mps", "", 1e20, False)])
def test_auto_compiles_long_runs_if_a_compiler_is_there(monkeypatch, tmp_path, device, missing,
                                                        flops, is_compiled):
    for name in {"Python.h", "triton.py"} - {missing}:
        (tmp_path / name).touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if missing != "g++" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    device = torch.device(device)
    assert machine.pick_compile("auto", device, flops) == is_compiled
    assert machine.pick_compile(True, device, 1) and not machine.pick_compile(False, device, 1e20)


# ---- memory --------------------------------------------------------------------------------------

def test_weights_that_no_memory_holds_are_refused_before_they_are_made(run, tmp_path):
    """80 GB a matrix, on a computer that would begin to swap"""
    with refused("M parameters take", "GB of memory: lower --n_layer, --n_embd"):
        run(n_embd=100_000, device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_peak_of_memory_is_known():
    before = machine.peak_memory(CPU)
    torch.ones(int((before + 0.1) * 1e9 / 4))
    assert 0.05 < before < before + 0.1 < machine.peak_memory(CPU) < 3 * before + 0.2


def test_too_much_memory_is_one_line_and_other_errors_keep_their_traceback():
    for allocate in (lambda: torch.empty(2**60), lambda: np.empty(2**50), lambda: [None] * 2**58):
        with refused("out of memory", "lower --this"), machine.naming_memory("lower --this"):
            allocate()
    with pytest.raises(RuntimeError, match="shape"), machine.naming_memory("lower --this"):
        torch.ones(2).view(3)


# ---- signals -------------------------------------------------------------------------------------

def test_stop_keeps_the_first_signal_and_gives_the_handlers_back(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # What breaks after a signal is not called a stop
    with pytest.raises(RuntimeError, match="a block's mistake"), Stop() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGTERM and stop.agreed(7)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("a block's mistake")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "\nfinishing the step; Ctrl-C again stops at once\n" in capsys.readouterr().err


def test_stop_leaves_ctrl_c_ignored_if_the_runs_parent_has_set_it_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
