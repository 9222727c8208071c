#!/usr/bin/env bash
# tqdm 4.70.1: in a terminal that does not tell its size, a bar is not shown at all.
#
# A pseudo-terminal has 0 columns and 0 rows until somebody sets them, as under `script </dev/null`,
# expect, and some containers and notebooks. Standard error is a terminal there, so that
# disable=None keeps the bar on; but tqdm takes 0 - 1 columns and 0 - 1 rows for the size.
#
# Seen: with tqdm 4.70.1 nothing is written, no statistics either, although neither ncols nor nrows
# is given. tqdm 4.66.3 writes the statistics without the bar. With ncols and nrows, as from
# shutil.get_terminal_size(), which takes 80 x 24 there, both write a bar.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
cat > bar.py <<'EOF2'
import shutil
import sys

from tqdm import tqdm

columns, rows = shutil.get_terminal_size()
given = dict(ncols=columns - 1, nrows=rows) if sys.argv[1:] else {}
for _ in tqdm(range(3), disable=None, **given):
    pass
EOF2
cat > look.py <<'EOF2'
import os
import pty
import sys


def shown(*arguments):
    """What bar.py writes to a new pseudo-terminal, of 0 x 0."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "bar.py", *arguments])
    text = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            piece = b""
        if not piece:
            os.waitpid(pid, 0)
            return text.decode()
        text += piece


plain, sized = shown(), shown("sized")
print(sys.argv[1], repr(plain[-60:]), repr(sized[-60:]), sep="\n  ")
assert ("3/3" in plain) == (sys.argv[1] == "4.66.3")
assert "3/3" in sized and "█" in sized
EOF2
env/bin/pip install --quiet --disable-pip-version-check tqdm==4.66.3
env/bin/python look.py 4.66.3
env/bin/pip install --quiet --disable-pip-version-check tqdm==4.70.1
env/bin/python look.py 4.70.1
