#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel(broadcast_buffers=False) warns, and its successor differs.
#
# Seen: the argument gives a FutureWarning that names forward_sync_buffers, which torch 2.12 does
# not know. So no argument suits both. The attribute does: `ddp.broadcast_buffers = False` after
# construction is silent and turns off the broadcast before each forward pass, because torch 2.13
# has a property of the old name.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > check.py <<'EOF'
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    DistributedDataParallel(torch.nn.BatchNorm1d(3), broadcast_buffers=False)
    [warning] = [w for w in caught if issubclass(w.category, FutureWarning)]
    print(str(warning.message)[:90])
    assert "Use `forward_sync_buffers`" in str(warning.message)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    ddp = DistributedDataParallel(torch.nn.BatchNorm1d(3))
    ddp.broadcast_buffers = False
print("by the attribute:", ddp.forward_sync_buffers)
assert ddp.forward_sync_buffers is False
dist.destroy_process_group()
EOF
env/bin/python check.py
