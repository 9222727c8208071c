"""The scripts in docs/: DVA in plain Python, the race's losses by kinds of tokens, its trials."""
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, message_of
from test_race import TINY, stay_here

import model
from model import GPT, Cache, DVABlock, GPT2Block, ModelConfig, mean_loss
from tools import race


def module_of(name):
    """docs/NAME.py as a module of its own, as if it were imported for the first time."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- microdva.py: the lesson in plain Python computes what model.py computes ---------------------

VOCAB_SIZE, IDS = 11, [0, 3, 10, 3, 7, 1, 0]


@pytest.fixture
def microdva():
    return module_of("microdva")


@pytest.fixture
def weights(microdva):
    """Its weights, with norms that matter: none of their weights is 1."""
    random.seed(1)
    weights = microdva.new_weights(VOCAB_SIZE)
    norms = [weights["ln_f"], *(layer[name] for layer in weights["layers"]
                                for name in ("ln_1", "norm"))]
    for norm in norms:
        norm.data = [random.uniform(0.5, 2) for _ in norm.data]
    microdva.TAPE.clear()
    return weights


def by_name(weights):
    """{a parameter's name in model.py: its Vector, or the list of its rows}"""
    named = {"transformer.wte.weight": weights["wte"], "transformer.ln_f.weight": weights["ln_f"]}
    for number, layer in enumerate(weights["layers"]):
        for name, matrix in layer.items():
            module = name if name == "ln_1" else f"attn.{name}"
            named[f"transformer.h.{number}.{module}.weight"] = matrix
    return named


def tensor(matrix, attribute):
    if isinstance(matrix, list):
        return torch.stack([tensor(row, attribute) for row in matrix])
    return torch.tensor(getattr(matrix, attribute), dtype=torch.float64)


@pytest.fixture
def gpt(microdva, weights):
    """model.py's model of the same weights, in float64 with its table of rotary positions."""
    config = ModelConfig(block="dva", block_size=len(IDS), vocab_size=VOCAB_SIZE,
                         n_layer=microdva.LAYERS, n_embd=microdva.C, qk_dim=microdva.D,
                         value_dim=microdva.M, rotary="only")
    torch.set_default_dtype(torch.float64)
    try:
        gpt = GPT(config)
    finally:
        torch.set_default_dtype(torch.float32)
    copied = {name: tensor(matrix, "data") for name, matrix in by_name(weights).items()}
    assert copied.keys() == dict(gpt.named_parameters()).keys()
    gpt.load_state_dict(copied, strict=False)
    return gpt


def test_its_logits_are_those_of_the_model_with_and_without_all_pairs(microdva, weights, gpt):
    expected, made = gpt(torch.tensor([IDS]))[0], []
    for build_pairs in (False, True):
        microdva.TAPE.clear()
        found = torch.stack([tensor(logits, "data") for logits in
                             microdva.gpt(weights, IDS, build_pairs)])
        assert (found - expected).abs().max() < 1e-9
        made.append(len(microdva.TAPE))
    # A vector for each pair
    assert made[1] - made[0] == microdva.LAYERS * len(IDS) * (len(IDS) + 1) // 2


def test_its_gradients_are_those_of_the_model(microdva, weights, gpt):
    loss = microdva.loss_and_gradients(weights, IDS)
    theirs = mean_loss(gpt(torch.tensor([IDS[:-1]])), torch.tensor([IDS[1:]]))
    theirs.backward()
    assert abs(loss - theirs.item()) < 1e-9
    for name, matrix in by_name(weights).items():
        found = tensor(matrix, "grad")
        assert found.abs().max() > 1e-6
        assert (found - gpt.get_parameter(name).grad).abs().max() < 1e-9, name


def test_it_learns_the_lines_that_it_is_given_with_200_lines_of_python_alone(tmp_path):
    """Of two texts that begin alike: nearly all it can say is one of them."""
    code = (ROOT / "docs" / "microdva.py").read_text()
    script, lines = tmp_path / "microdva.py", tmp_path / "lines.txt"
    script.write_text(code.replace("2, 2000, 0.005", "1, 200, 0.02"))
    lines.write_text("to be\nto do\t1\n")
    # -S: without the packages that are installed
    out = subprocess.run([sys.executable, "-I", "-S", script, lines], capture_output=True,
                         text=True, check=True).stdout
    loss, written = out.splitlines()[-1].split("loss ")[1].split("  ", 1)
    assert float(loss) < 0.6
    assert "to be" in written and "to do\t1" in written
    assert len(code.splitlines()) <= 200


# ---- why.py: which tokens a contender loses ------------------------------------------------------

def test_the_kinds_of_a_window_by_hand():
    why = module_of("why")
    # After 0 comes 1 most often, after 1 comes 2, after 2 comes 0; 3 is followed by 0
    guesses = why.bigram_guesses(np.array([0, 1, 2, 0, 1, 2, 0, 3, 0, 1], dtype=np.uint16), 4)
    assert guesses.tolist() == [1, 2, 0, 0]
    # (1, 3) and (3, 1) return; (0, 1) and (1, 2) are guessed. Each row is a window of its own.
    x = torch.tensor([[0, 1, 3, 1, 3, 1, 2], [1, 3, 2, 2, 2, 2, 2]])
    y = torch.tensor([[1, 3, 1, 3, 1, 2, 3], [3, 2, 0, 0, 0, 0, 0]])
    assert why.kinds_of(x, y, guesses).tolist() == [[0, 2, 2, 1, 1, 0, 2], [2, 2, 0, 0, 0, 0, 0]]


def test_the_parts_of_a_loss_add_up_to_it(data_dir, tmp_path, monkeypatch, capsys):
    why = module_of("why")
    monkeypatch.chdir(tmp_path)
    stay_here(monkeypatch)
    race.main(command_line(TINY | dict(data_dir=data_dir, lrs="0.01", contenders="gpt2,dva")))
    folder = Path("out", "race", "tiny_char-tokens")
    facts = json.loads((folder / "results.json").read_text())["contenders"]
    means = [np.mean([test for _, test in facts[name]["losses"].values()]) for name in facts]
    # Weights that were deleted are trained again
    next(Path("out", "race_runs").rglob("best.pt")).unlink()
    capsys.readouterr()
    why.main([str(folder), f"--data_dir={data_dir}"])
    printed = capsys.readouterr().out
    assert printed.count("again ...") == 1
    heading, *rows = ([cell.strip() for cell in printed.splitlines()[line].split("|")[2:-1]]
                      for line in (1, 3, 4))
    # Shares are rounded to a percent
    shares = [float(cell.split()[-2]) / 100 for cell in heading[::2]]
    for cells, mean in zip(rows, means, strict=True):
        assert np.dot(shares, [float(cell) for cell in cells[::2]]) == pytest.approx(mean, abs=0.05)
    gaps = [float(cell.split()[0]) for cell in rows[1][1::2]]
    assert sum(gaps) == pytest.approx(means[1] - means[0], abs=3e-4)
    assert "which race?" in message_of(why.main, [])
    assert "contenders: x: choose from gpt2, dva" in message_of(
        why.main, [str(folder), "--contenders=x"])


# ---- trials.py: DVA with several heads, or with one GPT-2 block ----------------------------------

@pytest.fixture
def trials(monkeypatch):
    monkeypatch.setattr(model, "BLOCKS", dict(model.BLOCKS))
    return module_of("trials")


def trial(block, **settings):
    return GPT(ModelConfig(**dict(block=block, n_layer=3, n_head=4, n_embd=32, qk_dim=8,
                                  vocab_size=50, block_size=16, rotary=True) | settings))


@pytest.mark.parametrize("block", ["heads", "attention", "first", "last"])
def test_a_trial_block_learns_and_decodes_with_a_cache(trials, block):
    gpt, idx = trial(block), torch.randint(50, (2, 16))
    kinds = {"heads": [trials.HeadsBlock] * 3, "attention": [trials.AttentionBlock] * 3,
             "first": [GPT2Block, DVABlock, DVABlock], "last": [DVABlock, DVABlock, GPT2Block]}
    assert [type(layer) for layer in gpt.transformer.h] == kinds[block]
    gpt(idx, idx).backward()
    assert all(p.grad is not None for p in gpt.parameters())
    cache = Cache(16)
    with torch.no_grad():
        steps = torch.cat([gpt(idx[:, [i]], cache=cache) for i in range(16)], dim=1)
        torch.testing.assert_close(steps, gpt(idx), atol=1e-5, rtol=1e-5)


def test_one_head_of_several_is_dva(trials):
    dva, heads = trial("dva", n_head=1), trial("heads", n_head=1)
    heads.load_state_dict(dva.state_dict())
    idx = torch.randint(50, (2, 16))
    assert torch.equal(heads(idx), dva(idx))
