#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes files that only their owner can read, whatever the umask says.
#
# Seen, with umask 022: 0.7.0 writes mode 644, as open() does. 0.8.0 writes mode 600, and gives an
# existing file of mode 644 the mode 600 when it is overwritten. So a model on a shared disk, or one
# that a web server hands out, can no longer be read by anybody else after an update of the package.
# os.chmod() afterwards, or safetensors.torch.save() with write_bytes(), gives the usual mode.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
umask 022
cat > check.py <<'EOF'
import os
import sys

import numpy
from safetensors.numpy import save_file

save_file({"a": numpy.ones(2)}, "new.safetensors")
open("old.safetensors", "w").close()
before = os.stat("old.safetensors").st_mode & 0o777
save_file({"a": numpy.ones(2)}, "old.safetensors")
modes = [oct(os.stat(name).st_mode & 0o777) for name in ("new.safetensors", "old.safetensors")]
print(f"a new file: {modes[0]}; one of mode {before:#o}, overwritten: {modes[1]}")
assert modes == [sys.argv[1]] * 2
EOF
check() {
  python3 -m venv env
  env/bin/pip install --quiet --disable-pip-version-check "safetensors==$1" numpy==2.4.6 2>/dev/null
  echo "safetensors $1"
  rm -f ./*.safetensors
  env/bin/python check.py "$2"
}
check 0.7.0 0o644
check 0.8.0 0o600
