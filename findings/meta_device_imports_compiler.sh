#!/usr/bin/env bash
# torch 2.13.0: the first arithmetic with a tensor on the meta device imports torch's compiler.
#
# Seen: a model built on the meta device takes no memory, and one would think no time either. But
# torch.empty(8, device="meta") * 2 imports torch._dynamo, and with it sympy, torch.distributed.tensor
# and some 800 other modules: a second of processor time, half as much as "import torch" itself. The
# same product on the CPU imports nothing. Making a tensor or an nn.Linear there does not do it,
# nn.Embedding and cos() do. The meta device's Python implementations are wrapped so that the
# compiler leaves them alone, and that wrapper imports it when it is first called.
#
# The script fails if the product stops importing the compiler, or if it begins to do so on the CPU.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

cat > product.py <<'END'
import sys
import time

import torch

device = sys.argv[1]
x = torch.empty(8, device=device)
assert "torch._dynamo" not in sys.modules
modules, start = len(sys.modules), time.process_time()
x * 2
print(f"{device}: {len(sys.modules) - modules} modules more, "
      f"{time.process_time() - start:.1f} s of processor time")
assert ("torch._dynamo" in sys.modules) == (device == "meta"), "the behaviour has changed"
END
env/bin/python product.py cpu
env/bin/python product.py meta
