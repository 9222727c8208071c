#!/usr/bin/env bash
# torch 2.13.0 (MKL) on an AMD EPYC of the Zen 4 kind, one thread: a matrix times one column.
#
# Seen, for a float32 matrix of 50304 x 768, whose sum takes 6 to 8 ms:
# - F.linear(x, W), W @ x and torch.mv take 12 ms.
# - As a batch of two, the upper half of W and the lower half, the same product takes 6 to 7 ms.
# - But only if the column has the strides of a transposed row, (0, 1, 768). With (0, 1, 1), which
#   differ in a dimension of size 1 alone, so that all numbers lie at the same places, it takes
#   43 ms.
# We had expected that strides of dimensions of size 1 change nothing, and that reading the matrix
# is what counts. Other CPUs behave otherwise: on
# an Intel Xeon with AVX-512 the batch of two takes 2.2 to 2.7 times as long as one product.
#
# The script fails if that changes, so on such an Intel, too.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > check.py <<'EOF'
import time

import torch

torch.set_num_threads(1)
N, K = 50304, 768
W, x = torch.randn(N, K), torch.randn(1, 1, K)
halves = W.view(2, -1, K)
turned = x.mT.expand(2, K, 1)
plain = x.view(1, K, 1).expand(2, K, 1)
assert torch.equal(turned, plain) and turned.data_ptr() == plain.data_ptr()
print("strides", turned.stride(), "and", plain.stride())
ways = {"F.linear": lambda: torch.nn.functional.linear(x, W),
        "two halves, turned row": lambda: torch.bmm(halves, turned),
        "two halves, plain column": lambda: torch.bmm(halves, plain)}
seconds = {way: [] for way in ways}
with torch.inference_mode():
    for _ in range(10):
        for way, product in ways.items():
            began = time.process_time()
            product()
            seconds[way].append(time.process_time() - began)
best = {way: min(times) for way, times in seconds.items()}
for way, least in best.items():
    print(f"{least * 1e3:6.1f} ms  {way}")
assert best["F.linear"] > 1.3 * best["two halves, turned row"]
assert best["two halves, plain column"] > 3 * best["two halves, turned row"]
EOF
env/bin/python check.py
