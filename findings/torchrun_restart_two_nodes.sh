#!/usr/bin/env bash
# torch 2.13.0: a job of two torchrun launchers does not come back after one of its processes died.
#
# Seen: with --nnodes=2 --rdzv_backend=c10d --max_restarts=N, both launchers restart their processes
# after one of them has died, and all of these fail in init_process_group with "Gloo
# connectFullMesh failed ... Connection refused", in every attempt. The launchers keep one
# key-value store for the rendezvous and lend it to the processes, so that a new attempt reads the
# addresses of the processes that are no more. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each
# attempt has a store of its own, and the job goes on. One launcher (--standalone) has the same
# weakness, but comes back where the first of its processes is the first to be there again.
#
# The script fails if either of the two changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

cat > worker.py <<'EOF'
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
for step in range(20):
    if step == 5 and dist.get_rank() == 1 and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(9)
    dist.all_reduce(torch.ones(1))
print("finished", flush=True)
dist.destroy_process_group()
EOF

# Start two launchers with one process each and print how many processes finished
job() {
  rm -f died
  port=$(env/bin/python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
  for launcher in 1 2; do
    OMP_NUM_THREADS=1 timeout 120 env/bin/python -m torch.distributed.run --max_restarts=1 --nnodes=2 \
      --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint="127.0.0.1:$port" worker.py \
      > "log$launcher" 2>&1 &
  done
  wait
  cat log1 log2 | grep -c '^finished$' || true
}

shared=$(job)
echo "finished with the shared store: $shared of 2"
grep -ho 'Gloo connectFullMesh failed' log1 log2 | sort -u
own=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 job)
echo "finished with a store for each attempt: $own of 2"
[ "$shared" = 0 ] && [ "$own" = 2 ]
