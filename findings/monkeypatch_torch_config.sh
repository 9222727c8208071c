#!/usr/bin/env bash
# pytest 9.2.0 with torch 2.13.0: monkeypatch removes a setting of torch's that it should restore.
#
# Seen: after monkeypatch.setattr(torch._inductor.config, "max_autotune", True) and its undo, reading
# the setting raises AttributeError "torch._inductor.config.max_autotune does not exist", and so does
# every later torch.compile in that process: the test that fails is another one. pytest 9.2 restores
# what stood in the module's __dict__; torch's configuration modules keep their values elsewhere and
# answer by __getattr__, so pytest finds none there and deletes the attribute. pytest 8.4.2 puts the
# old value back. torch's own way works under both: with torch._inductor.config.patch(...).
#
# The script fails if either of the two changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null

cat > restored.py <<'EOF'
import pytest
import torch._inductor.config as config

with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(config, "max_autotune", True)
try:
    print("restored to", config.max_autotune)
except AttributeError as error:
    print(error)
EOF
env/bin/pip install --quiet --disable-pip-version-check pytest==8.4.2 2>/dev/null
old=$(env/bin/python restored.py)
echo "pytest 8.4.2: $old"
env/bin/pip install --quiet --disable-pip-version-check pytest==9.2.0 2>/dev/null
new=$(env/bin/python restored.py)
echo "pytest 9.2.0: $new"
[ "$old" = "restored to False" ] && [ "$new" = "torch._inductor.config.max_autotune does not exist" ]
