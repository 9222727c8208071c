#!/usr/bin/env bash
# transformers 5.23.0: from_pretrained throws away the buffers that a model made in its constructor.
#
# register_buffer(..., persistent=False) is the usual place for tables that follow from the settings,
# such as those of rotary positions; no file holds them. Seen: from_pretrained replaces each of them
# by torch.empty_like(), so that the model computes with whatever was in memory, without a warning.
# That goes for a table made with numpy, too, which is whole after the constructor. 4.57.3 kept both.
# A model has to make its buffers again in _init_weights(), which transformers calls for them.
#
# The script fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > check.py <<'EOF'
import sys

import numpy
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


class Tables(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4096))
        self.register_buffer("by_torch", torch.arange(4096.0), persistent=False)
        numbers = torch.from_numpy(numpy.arange(4096, dtype="float32"))
        self.register_buffer("by_numpy", numbers, persistent=False)


class Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.tables = Tables()
        self.post_init()


class Mended(Model):
    def _init_weights(self, module):
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(Tables().get_buffer(name))


Model(PretrainedConfig()).save_pretrained("folder")
print("transformers", transformers.__version__)
found = []
for cls in (Model, Mended):
    tables = cls.from_pretrained("folder").tables
    for name in ("by_torch", "by_numpy"):
        buffer = tables.get_buffer(name)
        found.append(torch.equal(buffer, torch.arange(4096.0)))
        print(f"{cls.__name__}, {name}: {'kept' if found[-1] else 'lost'}, {buffer[:3].tolist()}")
assert found == [word == "kept" for word in sys.argv[1:]]
EOF
check() {
  python3 -m venv "env$1"
  "env$1/bin/pip" install --quiet --disable-pip-version-check "transformers==$1" torch==2.13.0 \
    numpy==2.4.6 2>/dev/null
  rm -rf saved
  "env$1/bin/python" check.py "$2" "$2" kept kept 2>/dev/null
}
check 4.57.3 kept
check 5.23.0 lost
