#!/usr/bin/env bash
# torch 2.13.0: @once_differentiable does not stop a second derivative of the usual kind.
#
# Its documentation says that a backward pass so marked raises an error if it is differentiated. It
# raises only if the gradient that comes into it requires a gradient itself. For a loss, that gradient is
# the number 1, and requires none: what the marked backward pass returns is then a constant, nothing is
# raised, and its part of the second derivative is missing from the sum.
#
# Seen: for sum(x^2) + sum(x^3) at x = (1, 2) the second derivative is 2 + 6 x = (8, 14). With x^2 as a
# function whose backward pass is marked, it is (6, 12), without a word. So a loss that computes its
# gradient together with its value has to refuse by itself: in backward(), torch.is_grad_enabled() is
# True exactly if create_graph=True.
#
# The script fails if the second derivative is refused, or right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

cat > second.py <<'END'
import torch
from torch.autograd.function import once_differentiable


class SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        assert torch.is_grad_enabled() is False     # the mark itself switches it off
        return 2 * upstream * ctx.saved_tensors[0]


def second(squares):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = squares(x) + x.pow(3).sum()
    [gradient] = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0].tolist()


plain, marked = second(lambda x: x.square().sum()), second(SumOfSquares.apply)
print(f"right: {plain}; with once_differentiable: {marked}, and no error")
assert plain == [8.0, 14.0] and marked == [6.0, 12.0], "the behaviour has changed"
END
env/bin/python second.py
