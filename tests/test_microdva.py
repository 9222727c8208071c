"""docs/microdva.py, the lesson in plain Python, computes what model.py computes."""
import importlib.util
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import GPT, ModelConfig, mean_loss

SCRIPT = ROOT / "docs" / "microdva.py"
VOCAB_SIZE, IDS = 11, [0, 3, 10, 3, 7, 1, 0]


@pytest.fixture
def microdva():
    spec = importlib.util.spec_from_file_location("microdva", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def logits_of(microdva, weights, **options):
    return torch.stack([tensor(logits, "data")
                        for logits in microdva.gpt(weights, IDS, **options)])


@pytest.mark.parametrize("build_pairs", [False, True])
def test_the_logits_are_those_of_the_model(microdva, weights, gpt, build_pairs):
    found = logits_of(microdva, weights, build_pairs=build_pairs)
    assert (found - gpt(torch.tensor([IDS]))[0]).abs().max() < 1e-9


def test_the_tensor_of_all_pairs_is_built_only_when_asked_for(microdva, weights):
    made = []
    for build_pairs in (False, True):
        microdva.TAPE.clear()
        microdva.gpt(weights, IDS, build_pairs)
        made.append(len(microdva.TAPE))
    # A vector for each pair
    assert made[1] - made[0] == microdva.LAYERS * len(IDS) * (len(IDS) + 1) // 2


def test_the_gradients_are_those_of_the_model(microdva, weights, gpt):
    loss = microdva.loss_and_gradients(weights, IDS)
    theirs = mean_loss(gpt(torch.tensor([IDS[:-1]])), torch.tensor([IDS[1:]]))
    theirs.backward()
    assert abs(loss - theirs.item()) < 1e-9
    for name, matrix in by_name(weights).items():
        found = tensor(matrix, "grad")
        assert found.abs().max() > 1e-6
        assert (found - gpt.get_parameter(name).grad).abs().max() < 1e-9, name


def run(script, *arguments):
    return subprocess.run([sys.executable, "-I", script, *arguments], capture_output=True,
                          text=True, check=True).stdout


def test_it_learns_the_lines_that_it_is_given_and_writes_them(tmp_path):
    """Of two texts that begin alike: nearly all it can say is one of them."""
    script, lines = tmp_path / "microdva.py", tmp_path / "lines.txt"
    script.write_text(SCRIPT.read_text().replace("2, 2000, 0.005", "1, 200, 0.02"))
    lines.write_text("to be\nto do\t1\n")
    *_, last = run(script, lines).splitlines()
    loss, written = last.split("loss ")[1].split("  ", 1)
    assert float(loss) < 0.6
    assert "to be" in written and "to do\t1" in written


def test_it_is_short_and_needs_nothing_but_python(microdva):
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 200
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names
