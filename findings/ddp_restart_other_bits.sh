#!/usr/bin/env bash
# torch 2.13.0: a DistributedDataParallel model that restarts takes other steps than one that goes on.
#
# Seen, with four processes on the CPU (gloo): three steps of SGD at once, or one step, its weights
# into a new DistributedDataParallel object, and two more, differ in the last bits (1.5e-8).
# After its first pass DDP sorts its buckets into the order in which the gradients came. Each of the
# processes' sums begins at another rank for another part of a bucket, so the parameters' sums are
# rounded in another way. A pass whose gradients are thrown away, before the first step of each,
# makes the two equal; so does find_unused_parameters=True, which never sorts. With two processes,
# a + b = b + a, they are equal anyway.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > check.py <<'EOF'
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    """The gradients come in another order than that in which the layers are made."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(61, 7), nn.Linear(13, 61)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def backward(ddp, seed):
    torch.manual_seed(100 * seed + dist.get_rank())
    ddp(torch.randn(5, 13)).square().mean().backward()


def train(seeds, state=None, throw_away=False, **options):
    torch.manual_seed(1)
    model = Net()
    if state:
        model.load_state_dict(state)
    ddp = DistributedDataParallel(model, **options)
    if throw_away:
        backward(ddp, 0)
        model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for seed in seeds:
        backward(ddp, seed)
        optimizer.step()
        model.zero_grad()
    return {name: p.clone() for name, p in model.state_dict().items()}


def difference(**options):
    straight = train([1, 2, 3], **options)
    restarted = train([2, 3], train([1], **options), **options)
    return max((straight[name] - restarted[name]).abs().max().item() for name in straight)


torch.set_num_threads(1)
dist.init_process_group("gloo")
found = [difference(), difference(throw_away=True), difference(find_unused_parameters=True)]
if dist.get_rank() == 0:
    print(dist.get_world_size(), "processes:", found)
    assert (found[0] > 0) == (dist.get_world_size() == 4) and found[1:] == [0, 0]
dist.destroy_process_group()
EOF
for processes in 2 4; do
  OMP_NUM_THREADS=1 env/bin/python -m torch.distributed.run --standalone \
    --nproc_per_node="$processes" check.py
done
