"""tools/convert.py: our weights in other programs' formats, with transformers as the oracle."""
import re
import sys

import pytest
import torch
from conftest import KINDS, ROOT, message_of, save_run, shaken, tiny, tokens
from safetensors.torch import load_file

from model import generate
from nanodva.tokenizer import Tokenizer
from nanodva.weights import load_model, read_weights
from tools import convert

pytestmark = pytest.mark.usefixtures("code_folder")


def make_run(folder, tokenizer=None, **settings):
    """A run's folder with a random model in best.pt, and that model."""
    shape = dict(vocab_size=65, block_size=64, n_layer=2, n_embd=32, bias=False)
    model = shaken(tiny(**shape | settings))
    alphabet = "".join(map(chr, range(32, 32 + model.config.vocab_size)))
    save_run(folder, model, tokenizer or {"kind": "char", "alphabet": alphabet})
    return model


def error_of(*argv):
    """The message with which convert.py refuses the arguments."""
    return message_of(convert.main, [*map(str, argv)])


@torch.no_grad()
@pytest.mark.parametrize("bias, gelu", [(False, "exact"), (True, "tanh")])
def test_a_run_goes_to_transformers_and_comes_back(tmp_path, bias, gelu):
    from transformers import AutoModelForCausalLM
    model = make_run(tmp_path / "out", bias=bias, gelu=gelu)
    convert.main([str(tmp_path / "out"), "--to=hf", f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    back = load_model(str(tmp_path / "hf"))
    idx = torch.randint(65, (2, 64))
    ours = model(idx)
    assert (theirs(idx).logits - ours).abs().max() < 1e-4
    assert torch.equal(theirs.train()(idx).logits, theirs.eval()(idx).logits)
    assert (back(idx) - ours).abs().max() < 1e-4
    tokenizer = read_weights(str(tmp_path / "out"))["tokenizer"]
    assert read_weights(str(tmp_path / "hf"))["tokenizer"] == tokenizer
    assert "is not empty" in error_of(tmp_path / "out", f"--dest={tmp_path / 'hf'}")


@torch.no_grad()
@pytest.mark.parametrize("kind, rows, count", [("gpt2", 50304, 50257), ("gpt2:1000", 1000, 1000)])
def test_a_bpe_run_goes_out_with_its_tokenizer(tmp_path, kind, rows, count):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = make_run(tmp_path / "out", {"kind": kind}, vocab_size=rows, n_embd=16)
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer({"kind": kind})
    # Rows of padding are gone, and <|endoftext|> is the last token
    assert theirs.config.vocab_size == len(their_tokenizer) == count
    assert theirs.config.eos_token_id == their_tokenizer.eos_token_id == count - 1
    for text in ("Hello, world! It's 1999.", "naïve café — 你好 🙂\n\n\tend  ",
                 " <|endoftex", "".join(map(chr, range(32, 600)))):
        ids = ours.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids
        assert their_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    idx = tokens(1, 64, V=count)
    difference = theirs(idx).logits - model(idx)[..., :count]
    assert difference.abs().max() < 1e-4
    assert read_weights(str(tmp_path / "hf"))["tokenizer"] == {"kind": kind}


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(block="dva"), dict(block="dva", rotary=False, bias=True, value_norm=False),
    dict(block="dva", bank_layers=1, rotary="only", value_dim=20), dict(rotary=True),
    dict(bank_layers=1, rotary="only")], ids=str)
def test_a_run_that_gpt2_cannot_express_brings_its_model(tmp_path, settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = make_run(tmp_path / "out", **settings)
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules")
    idx = tokens(2, 64, V=65)
    ours, loss = model(idx), model(idx[:, :-1], targets=idx[:, 1:])
    assert (theirs(idx).logits - ours).abs().max() < 1e-5
    assert theirs(idx, labels=idx).loss.item() == pytest.approx(loss.item(), abs=1e-5)
    # Greedy text up to the window, and any text beyond it
    expected = generate(model, idx[:, :4], 60, temperature=0)
    assert torch.equal(theirs.generate(idx[:, :4], max_new_tokens=60, do_sample=False), expected)
    assert theirs.generate(idx, max_new_tokens=9, do_sample=True, num_beams=2).shape == (2, 73)
    # What transformers saves is whole, and comes back as the first folder does
    theirs.save_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "again")
    for name in ("hf", "again"):
        back = load_model(tmp_path / name)
        assert torch.equal(back(idx), ours)
        assert back.tokenizer.spec == read_weights(tmp_path / "out")["tokenizer"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(again(idx).logits, theirs(idx).logits)


@torch.no_grad()
def test_what_transformers_could_get_wrong_of_a_run_that_brings_its_model(tmp_path):
    from transformers import AutoModelForCausalLM
    model = make_run(tmp_path / "out", {"kind": "gpt2:300"}, block="dva", vocab_size=320,
                     bank_layers=1)
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True,
                                                  dtype=torch.bfloat16).eval()
    idx = tokens(2, 64, V=300)
    # Rows of padding are no tokens, but part of the softmax while it was trained
    logits = model(idx)
    difference = theirs(idx).logits - logits[..., :300]
    assert difference.norm() < 0.04 * logits.norm()
    assert theirs.generation_config.eos_token_id == 299
    assert theirs.gpt.lm_head.weight is theirs.gpt.transformer.wte.weight


def test_the_pages_lines_for_transformers_run(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "interop.md").read_text()
    [code] = re.findall(r"```python\n(from transformers.*?)```", text, re.DOTALL)
    make_run(tmp_path / "out", block="dva", bank_layers=1)
    monkeypatch.chdir(tmp_path)
    convert.main(["out", "--dest=demo-hf"])
    capsys.readouterr()
    exec(code, {})
    out = capsys.readouterr().out
    assert out.startswith("ROMEO:") and len(out) == len("ROMEO:\n") + 200


@pytest.mark.parametrize("alphabet", ["\n !':EMORabcet", "\t\n\r \xa0e\u0301é\u2003漢\U0001f642"])
def test_characters_go_out_with_their_tokenizer(tmp_path, alphabet):
    from transformers import AutoTokenizer
    make_run(tmp_path / "out", {"kind": "char", "alphabet": alphabet}, vocab_size=len(alphabet))
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), alphabet + alphabet[::-1] * 2
    trusted = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = [alphabet.index(character) for character in text]
    for tokenizer in (theirs, trusted):
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
        assert len(tokenizer) == len(alphabet) and tokenizer.model_max_length == 64
        # The new line if there is one: programs ask for a first, an end and a padding token
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert special == (alphabet.index("\n"),) * 3
    assert trusted.decode(ids, skip_special_tokens=True) == text
    assert trusted.decode(ids, clean_up_tokenization_spaces=True) == text
    with pytest.raises(Exception, match="a character outside the alphabet"):
        theirs("Z")
    with pytest.raises(ValueError, match="not in the model's alphabet: 'YZ'"):
        trusted(alphabet + "ZY")
    # transformers 4 does not ask the class about lists
    with pytest.raises(Exception, match="'YZ'|outside the alphabet"):
        trusted([alphabet, "ZY"])


@torch.no_grad()
@pytest.mark.parametrize("block, banks", KINDS)
def test_plain_safetensors_of_any_block(tmp_path, block, banks):
    model = make_run(tmp_path / "out", block=block, bank_layers=banks)
    convert.main([str(tmp_path / "out"), "--to=safetensors", f"--dest={tmp_path / 'plain'}"])
    state = load_file(tmp_path / "plain" / "model.safetensors")
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    back, idx = load_model(str(tmp_path / "plain")), torch.arange(60).view(2, 30)
    assert torch.equal(back(idx), model(idx))
    there, here = (read_weights(str(tmp_path / name)) for name in ("plain", "out"))
    assert there["tokenizer"] == here["tokenizer"]
    # Whoever may read one of the files may read all
    assert len({path.stat().st_mode for path in (tmp_path / "plain").iterdir()}) == 1


def test_what_the_user_gets_wrong_is_one_line(tmp_path, monkeypatch):
    assert "say what goes where" in error_of()
    assert "say what goes where" in error_of(tmp_path)
    assert "no " in error_of(tmp_path / "nowhere", f"--dest={tmp_path / 'x'}")
    assert "to='onnx'" in error_of("out", "--to=onnx", "--dest=x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in error_of("out", "--dest=x")
