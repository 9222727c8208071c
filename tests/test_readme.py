"""The README keeps its word: its commands parse, its files exist, its block trains."""
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import config
import prepare_data
import sample
import train
from model import BLOCKS, GPT, DVABlock, GPT2Block, ModelConfig
from optimizers import build_optimizers
from tools import bench, race

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("   ")[0].strip() for _, text in FENCES for line in text.splitlines()
            if re.match(r"(python|torchrun|make) ", line)]
CONFIGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig, "-m tools.bench": bench.BenchConfig,
           "-m tools.race": race.RaceConfig}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command.startswith("make"):
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    arguments = [a.strip("\"'") for a in re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", command)]
    script = next((s for s in CONFIGS if s in command), None)
    if script:
        config.read(CONFIGS[script], [a for a in arguments if a.startswith("--") and "node" not in a and a not in ("--standalone", "--help")
                                      and "rdzv" not in a and "master" not in a or a.startswith("config/")])
    elif "prepare_data.py" in command:
        name, *rest = arguments[2:]
        config.load(prepare_data.PrepareConfig, [f"--name={name}", *rest])
    else:
        assert (ROOT / arguments[2].replace(".", "/")).with_suffix(".py").exists() or (ROOT / arguments[1]).exists()


def test_the_readme_shows_commands():
    assert {"make demo", "make test"} < set(COMMANDS) and len(COMMANDS) > 10


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_each_link_leads_somewhere(target):
    assert (ROOT / target).exists()


def test_the_readmes_block_trains_and_samples_as_any_other(monkeypatch):
    code = next(text for language, text in FENCES if language == "python" and "class MyBlock" in text)
    names = {"nn": nn, "torch": torch, "GPT2Block": GPT2Block, "DVABlock": DVABlock}
    exec(code, names)
    assert set(names["BLOCKS"]) == {*BLOCKS, "mine"}
    monkeypatch.setitem(BLOCKS, "mine", names["BLOCKS"]["mine"])
    torch.manual_seed(0)
    model = GPT(ModelConfig(block="mine", vocab_size=11, n_layer=2, n_embd=32, block_size=8))
    optimizers = build_optimizers(model, train.TrainConfig(learning_rate=1e-2))
    idx = torch.arange(36).view(4, 9) % 11
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    model.eval()
    assert torch.equal(model.generate(idx[:, :3], 12, temperature=0), model.generate(idx[:, :3], 12, temperature=0, use_cache=False))
