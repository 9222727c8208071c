"""nanoGPT's presets and the commands of its README run as they are."""
import runpy
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, command_line

from nanodva.settings import load_settings
from nanodva.weights import OPENAI
from train import TrainConfig

OPENWEBTEXT = dict(wandb_log=False, wandb_project="owt", wandb_run_name="gpt2-124M", batch_size=12,
                   block_size=1024, gradient_accumulation_steps=40, max_iters=600000,
                   lr_decay_iters=600000, eval_interval=1000, eval_iters=200, log_interval=10,
                   weight_decay=0.1)
CHARACTERS = dict(out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200,
                  log_interval=10, always_save_checkpoint=False, wandb_log=False,
                  wandb_project="shakespeare-char", wandb_run_name="mini-gpt",
                  dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64,
                  block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
                  learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4,
                  beta2=0.99, warmup_iters=100)
FINE_TUNING = dict(out_dir="out-shakespeare", eval_interval=5, eval_iters=40, wandb_log=False,
                   wandb_project="shakespeare", dataset="shakespeare", init_from="gpt2-xl",
                   always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32,
                   max_iters=20, learning_rate=3e-5, decay_lr=False)
PRESETS = {"train_gpt2": OPENWEBTEXT, "train_shakespeare_char": CHARACTERS,
           "finetune_shakespeare": FINE_TUNING}
for name in OPENAI:
    PRESETS[f"eval_{name.replace('-', '_')}"] = dict(batch_size=8, eval_iters=500, eval_only=True,
                                                     wandb_log=False, init_from=name)


@pytest.mark.parametrize("name", PRESETS)
def test_nanogpts_presets_load_and_ours_of_that_name_say_the_same(tmp_path, name):
    text = "".join(f"{key} = {value!r} # why\n" for key, value in PRESETS[name].items())
    # As nanoGPT writes them
    text = text.replace("steps = 40", "steps = 5 * 8")
    if name == "finetune_shakespeare":
        text = f"import time\n\n{text}wandb_run_name = 'ft-' + str(time.time())\n"
    (tmp_path / "preset.py").write_text(text)
    for path in (tmp_path / "preset.py", ROOT / "config" / f"{name}.py"):
        cfg = asdict(load_settings(TrainConfig, [str(path)]))
        assert {key: cfg[key] for key in PRESETS[name]} == PRESETS[name]


NANOGPT_README = """
python data/shakespeare_char/prepare.py
python train.py config/train_shakespeare_char.py
python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 \
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \
    --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
python sample.py --out_dir=out-shakespeare-char
python sample.py --out_dir=out-shakespeare-char --device=cpu
python train.py config/train_shakespeare_char.py --device=mps
python data/openwebtext/prepare.py
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=127.0.0.1 train.py
python sample.py
python train.py
python train.py config/eval_gpt2.py
python train.py config/eval_gpt2_medium.py
python train.py config/eval_gpt2_large.py
python train.py config/eval_gpt2_xl.py
python data/shakespeare/prepare.py
python train.py config/finetune_shakespeare.py
python sample.py --out_dir=out-shakespeare
python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe?" \
    --num_samples=5 --max_new_tokens=100
python sample.py --start=FILE:prompt.txt
"""


def small(line):
    """The arguments that make a command line small; and where a run has been, it is told so."""
    if "sample.py" in line:
        return ["--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    if "prepare.py" in line:
        return ["--data_dir=data", "--val_fraction=0.1", "--input=text.txt"]
    shape = dict(block_size=16, max_iters=2, eval_iters=1, gradient_accumulation_steps=2,
                 device="cpu", dtype="float32")
    if "config/eval_" not in line and "finetune" not in line:
        shape |= dict(n_layer=2, n_head=2, n_embd=16, batch_size=2, overwrite=True)
    return command_line(shape)


def test_every_command_line_of_nanogpts_readme_runs_in_small(tmp_path, monkeypatch, hub, data_dir,
                                                             capsys):
    """
    As they are typed, one after another in one folder, and in this process: test_distributed.py
    starts torchrun.
    """
    for layers, name in enumerate(OPENAI, start=1):
        hub(name, n_layer=layers, n_head=1, n_embd=4, vocab_size=50257)
    monkeypatch.chdir(tmp_path)
    Path("config").symlink_to(ROOT / "config")
    Path("prompt.txt").write_text("To be")
    Path("text.txt").write_text((data_dir / "tiny.txt").read_text() + "\nTo be\n" * 100)
    for line in NANOGPT_README.strip().replace("\\\n", "").splitlines():
        words = shlex.split(line)
        script = next(word for word in words if word.endswith(".py"))
        argv = words[words.index(script) + 1:] + small(line)
        monkeypatch.setattr(sys, "argv", [script, *argv])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert capsys.readouterr().out.strip()
    assert Path("out/last.pt").exists() and Path("out-shakespeare/last.pt").exists()
