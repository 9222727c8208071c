"""tools/convert.py: our weights in other programs' formats, with transformers as the oracle."""
import re
import sys

import pytest
import torch
from conftest import KINDS, ROOT, message_of, save_run, shaken, tiny, tokens
from safetensors.torch import load_file

from model import generate
from nanodva.tokenizer import Tokenizer, same_tokenizer
from nanodva.weights import load_model, read_weights
from tools import convert

pytestmark = pytest.mark.usefixtures("code_folder")


# Tiny Shakespeare's
ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def exported(folder, tokenizer=None, to="hf", **settings):
    """A random model, saved as a run in folder / "out", and folder / "hf", its export."""
    shape = dict(vocab_size=65, block_size=64, n_layer=2, n_embd=32, bias=False)
    model = shaken(tiny(**shape | settings))
    save_run(folder / "out", model, tokenizer or {"kind": "char", "alphabet": ALPHABET})
    convert.main([str(folder / "out"), f"--to={to}", f"--dest={folder / 'hf'}"])
    return model, folder / "hf"


def loaded(folder, kind="AutoModelForCausalLM", **options):
    """What transformers makes of a folder: a model in evaluation mode, or a tokenizer."""
    import transformers
    found = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **options)
    return found.eval() if hasattr(found, "eval") else found


def error_of(*argv):
    return message_of(convert.main, [*map(str, argv)])


@torch.no_grad()
@pytest.mark.parametrize("bias, gelu", [(False, "exact"), (True, "tanh")])
def test_a_run_goes_to_transformers_and_comes_back(tmp_path, bias, gelu):
    model, folder = exported(tmp_path, bias=bias, gelu=gelu)
    theirs, back, idx = loaded(folder), load_model(folder), tokens(2, 64, V=65)
    ours = model(idx)
    assert (theirs(idx).logits - ours).abs().max() < 1e-4
    assert torch.equal(theirs.train()(idx).logits, theirs.eval()(idx).logits)
    assert (back(idx) - ours).abs().max() < 1e-4
    assert back.tokenizer.spec == read_weights(tmp_path / "out")["tokenizer"]
    assert "is not empty" in error_of(tmp_path / "out", f"--dest={folder}")


@torch.no_grad()
@pytest.mark.parametrize("kind, rows, count", [("gpt2", 50304, 50257), ("gpt2:1000", 1000, 1000)])
def test_a_bpe_run_goes_out_with_its_tokenizer(tmp_path, kind, rows, count):
    model, folder = exported(tmp_path, {"kind": kind}, vocab_size=rows, n_embd=16)
    theirs, their_tokenizer = loaded(folder), loaded(folder, "AutoTokenizer")
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
    assert (theirs(idx).logits - model(idx)[..., :count]).abs().max() < 1e-4
    assert same_tokenizer(read_weights(folder)["tokenizer"], ours.spec)


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(block="dva"), dict(block="dva", rotary=False, bias=True, value_norm=False),
    dict(block="dva", bank_layers=1, rotary="only", value_dim=20), dict(rotary=True),
    dict(bank_layers=1, rotary="only")], ids=str)
def test_a_run_that_gpt2_cannot_express_brings_its_model(tmp_path, settings):
    model, folder = exported(tmp_path, **settings)
    theirs = loaded(folder)
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
    loaded(folder, "AutoTokenizer").save_pretrained(tmp_path / "again")
    for back in map(load_model, (folder, tmp_path / "again")):
        assert torch.equal(back(idx), ours)
        assert back.tokenizer.spec == read_weights(tmp_path / "out")["tokenizer"]
    assert torch.equal(loaded(tmp_path / "again")(idx).logits, theirs(idx).logits)


@torch.no_grad()
def test_what_transformers_could_get_wrong_of_a_run_that_brings_its_model(tmp_path):
    model, folder = exported(tmp_path, {"kind": "gpt2:300"}, block="dva", vocab_size=320,
                             bank_layers=1)
    theirs, idx = loaded(folder, dtype=torch.bfloat16), tokens(2, 64, V=300)
    # Rows of padding are no tokens, but part of the softmax while it was trained
    logits = model(idx)
    difference = theirs(idx).logits - logits[..., :300]
    assert difference.norm() < 0.04 * logits.norm()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 299
    assert theirs.gpt.lm_head.weight is theirs.gpt.transformer.wte.weight


def test_the_pages_lines_for_transformers_run(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "interop.md").read_text()
    [code] = re.findall(r"```python\n(from transformers.*?)```", text, re.DOTALL)
    exported(tmp_path, block="dva", bank_layers=1)[1].rename(tmp_path / "demo-hf")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    out = capsys.readouterr().out
    assert out.startswith("ROMEO:") and len(out) == len("ROMEO:\n") + 200


@pytest.mark.parametrize("alphabet", ["\n !':EMORabcet", "\t\n\r \xa0e\u0301é\u2003漢\U0001f642"])
def test_characters_go_out_with_their_tokenizer(tmp_path, alphabet):
    from transformers import AutoTokenizer
    _, folder = exported(tmp_path, {"kind": "char", "alphabet": alphabet},
                         vocab_size=len(alphabet))
    theirs, text = AutoTokenizer.from_pretrained(folder), alphabet + alphabet[::-1] * 2
    trusted, config = loaded(folder, "AutoTokenizer"), loaded(folder, "AutoConfig")
    # Generation does not end with a line
    assert config.eos_token_id is None and config.max_position_embeddings == 64
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
    model, folder = exported(tmp_path, to="safetensors", block=block, bank_layers=banks)
    state = load_file(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    back, idx = load_model(folder), torch.arange(60).view(2, 30)
    assert torch.equal(back(idx), model(idx))
    assert back.tokenizer.spec == {"kind": "char", "alphabet": ALPHABET}
    # Whoever may read one of the files may read all
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_what_the_user_gets_wrong_is_one_line(tmp_path, monkeypatch):
    assert "say what goes where" in error_of()
    assert "say what goes where" in error_of(tmp_path)
    assert "no " in error_of(tmp_path / "nowhere", f"--dest={tmp_path / 'x'}")
    assert "to='onnx'" in error_of("out", "--to=onnx", "--dest=x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in error_of("out", "--dest=x")
