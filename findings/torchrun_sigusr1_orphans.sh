#!/usr/bin/env bash
# torch 2.13.0: SIGUSR1, with which Slurm warns a job that its time is almost up, ends torchrun at
# once and leaves its processes running without it.
#
# Seen: torchrun catches SIGTERM, SIGINT, SIGHUP and SIGQUIT and passes them on. SIGUSR1 it leaves at
# the system's default, so it dies of it without a word. Its processes have sessions of their own:
# they get no signal, have process 1 as their parent from then on, and go on until somebody ends
# them. With --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 each process gets SIGUSR1, and
# SIGKILL if it has not ended 30 seconds later.
#
# The script fails if either of the two changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

# Notes the number of its parent, and ends by itself: at SIGUSR1, or after 8 seconds
cat > worker.py <<'EOF'
import os
import signal
import time

def note(name):
    with open(f"{name}.{os.environ['RANK']}", "w") as file:
        file.write(str(os.getppid()))

def got(number, frame):
    note("got")
    raise SystemExit(0)

signal.signal(signal.SIGUSR1, got)
note("up")
time.sleep(8)
note("went_on")
EOF

# Start torchrun with these options, send it SIGUSR1 when both processes are up, and wait for it
warn() {
  rm -f up.* got.* went_on.*
  env/bin/python -m torch.distributed.run "$@" --standalone --nproc_per_node=2 worker.py \
    > log 2>&1 &
  launcher=$!
  while [ ! -e up.0 ] || [ ! -e up.1 ]; do sleep 0.2; done
  sleep 1
  kill -USR1 "$launcher"
  set +e
  wait "$launcher" 2> /dev/null
  status=$?
  set -e
  sleep 10
  echo "torchrun $* ended with status $status; processes that got SIGUSR1:" \
    "$(find . -maxdepth 1 -name 'got.*' | wc -l), that went on:" \
    "$(find . -maxdepth 1 -name 'went_on.*' | wc -l)"
}

# 138 is 128 plus the number of SIGUSR1 on Linux
first=$(warn)
echo "$first"
test "$first" = "torchrun  ended with status 138; processes that got SIGUSR1: 0, that went on: 2"
# Their parent has changed: torchrun is no longer there
test "$(cat up.0)" != "$(cat went_on.0)"
second=$(warn --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
echo "$second"
echo "$second" | grep -q "SIGUSR1: 2, that went on: 0"
