#!/usr/bin/env bash
# torch 2.13.0: compiled, a float32 island under autocast has a bfloat16 backward pass.
#
# Code that must stay exact under autocast is put into "with torch.autocast(..., enabled=False)". In
# eager mode its backward pass is float32, too: autocast does nothing there. torch.compile traces
# the backward pass with autocast as it is around the compiled function, not as it was around the product.
#
# Seen, for the gradient of sum((a b)^2) with the product inside such an island, the caller under autocast
# to bfloat16: a relative error of 2e-7 in eager mode and of 2e-3 compiled; the value of the loss is
# float32 in both. The backend does not matter (aot_eager generates no code). The setting
# torch._functorch.config.backward_pass_autocast = "off" brings the float32 gradient back.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

cat > island.py <<'END'
import torch
import torch._functorch.config as config


def loss(a, b):
    with torch.autocast("cpu", enabled=False):
        return (a @ b).square().sum()


def error(function):
    """Of the gradient by a, relative to float64."""
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    wide = a.detach().double().requires_grad_()
    [exact] = torch.autograd.grad(loss(wide, b.double()), wide)
    with torch.autocast("cpu", torch.bfloat16):
        value = function(a, b)
    assert value.dtype == torch.float32
    [gradient] = torch.autograd.grad(value, a)
    return ((gradient - exact).norm() / exact.norm()).item()


eager, compiled = error(loss), error(torch.compile(loss, backend="aot_eager"))
torch._dynamo.reset()
with config.patch(backward_pass_autocast="off"):
    switched_off = error(torch.compile(loss, backend="aot_eager"))
print(f"eager {eager:.1e}, compiled {compiled:.1e}, compiled with the setting {switched_off:.1e}")
assert eager < 1e-5 and switched_off < 1e-5 and compiled > 1e-3, "the behaviour has changed"
END
env/bin/python island.py
