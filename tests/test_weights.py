"""Weights from the world of GPT-2 and nanoGPT, with transformers as the oracle."""
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BLOCKS,
    ROOT,
    SYSTEMS,
    command_line,
    comparable,
    ending_of,
    ids_of,
    oracle,
    refused,
    save_run,
    shaken,
    tiny,
    tokens,
)
from safetensors.torch import load_file

import prepare_data
import sample
import train
from model import generate
from nanodva.checkpoints import FORMAT, load_checkpoint
from nanodva.errors import fail
from nanodva.tokenizer import Tokenizer
from nanodva.weights import OPENAI, load_model, read_weights, start_from
from tools import convert, explain

SHAPE = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=130)
# The shape of a tiny run, for its data set
OF_TINY = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=24)
WORDS = ("Não coração de maçã", "ação\n\n  1999  ßßß 漢 x\x00 \U0001f642")


def saved(folder, activation="gelu_new", **shape):
    """A random model of transformers, by default a very small one, which it saves in the folder."""
    theirs = oracle(activation, **dict(n_layer=1, n_head=1, n_embd=8, vocab_size=97) | shape)
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def assert_same_model(ours, theirs):
    """The same logits on a full window."""
    idx = tokens(2, ours.config.block_size, theirs.config.vocab_size)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)


def write_nanogpt(folder, theirs, dataset="tiny_char", prefix="", **changes):
    """The transformers model as nanoGPT would have saved it; with a prefix come masks, too."""
    state = {}
    for name, p in theirs.state_dict().items():
        is_matrix = name.startswith("transformer.h.") and p.dim() == 2
        if changes.get("bias", True) or not name.endswith("bias"):
            state[prefix + name] = p.T.contiguous() if is_matrix else p.clone()
    for layer in range(theirs.config.n_layer if prefix else 0):
        state[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    args = {name: getattr(theirs.config, name)
            for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "iter_num": 7,
                "model_args": {"block_size": 128, "dropout": 0.2} | args | changes,
                "best_val_loss": torch.tensor(1.5), "config": {"dataset": dataset}},
               folder / "ckpt.pt")


# ---- GPT-2 from Hugging Face ---------------------------------------------------------------------

@pytest.mark.parametrize("activation, gelu, shape", [
    ("gelu_new", "tanh", SHAPE),
    ("gelu", "exact", dict(n_layer=2, n_head=5, n_embd=40, vocab_size=65))])
def test_a_hugging_face_gpt2_comes_in_and_writes_the_same(tmp_path, activation, gelu, shape):
    theirs = saved(tmp_path, activation, **shape)
    ours, prompt = load_model(str(tmp_path)), tokens(2, 4, 65)
    assert (ours.config.gelu, ours.config.bias, ours.training) == (gelu, True, False)
    assert_same_model(ours, theirs)
    text = generate(ours, prompt, 100, temperature=0)
    assert torch.equal(text, theirs.generate(prompt, max_new_tokens=100, do_sample=False))
    assert len(text.unique()) > 5
    # Positions are cropped and never made up
    assert_same_model(load_model(str(tmp_path), block_size=8, dropout=0.1), theirs)
    for changes, words in ((dict(block_size=129), "they have 128 positions"),
                           (dict(n_layer=4), "they have n_layer="), (dict(gelu="new"), "choose"),
                           (dict(block_sise=8), "no settings block_sise")):
        with refused(words):
            load_model(str(tmp_path), **changes)


def test_openais_names_come_from_the_hubs_cache_in_the_sizes_of_their_config(hub):
    for layers, name in enumerate(OPENAI, start=1):
        theirs = hub(name, n_layer=layers, n_head=2, n_embd=16 * layers, vocab_size=80)
        ours = load_model(name)
        assert (ours.config.n_layer, ours.config.n_embd) == (layers, 16 * layers)
        assert_same_model(ours, theirs)


@pytest.mark.parametrize("kind, count", [("whole", 1), ("pickled", 1), ("shards", 11)])
def test_shards_and_pickled_files_come_in(tmp_path, kind, count):
    theirs = oracle(**SHAPE)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == count
    if kind == "pickled":
        # In torch's first format, as transformers did before it had safetensors
        pickled = tmp_path / "pytorch_model.bin"
        torch.save(load_file(files[0]), pickled, _use_new_zipfile_serialization=False)
        files[0].unlink()
        files = [pickled]
    assert_same_model(load_model(str(tmp_path)), theirs)
    files[0].unlink()
    with refused(str(tmp_path)):
        load_model(str(tmp_path))


@pytest.mark.parametrize("rows, kept", [
    # nanoGPT's padding, and a table after transformers' resize_token_embeddings(50258)
    (50304, 50257), (50258, 50258)])
def test_rows_that_are_no_tokens_are_never_sampled(tmp_path, texts, monkeypatch, rows, kept):
    theirs = oracle(n_layer=1, n_head=1, n_embd=8, vocab_size=rows)
    with torch.no_grad():
        # These would win time and again
        theirs.transformer.wte.weight[50257:] *= 100
    theirs.save_pretrained(tmp_path)
    ours, idx = load_model(str(tmp_path)), torch.arange(100).view(2, 50)
    with torch.no_grad():
        logits = theirs(idx).logits
        assert (logits.argmax(-1) >= 50257).float().mean() > 0.5
        # Padding is no part of the loss either
        logits = logits[:, :-1, :kept].flatten(0, 1)
        expected = F.cross_entropy(logits, idx[:, 1:].flatten()).item()
        assert ours(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(expected, rel=1e-5)
    # Logits needed no file of a tokenizer
    with monkeypatch.context() as offline, refused("no network"):
        offline.setattr("nanodva.tokenizer.gpt2_tokens", lambda: fail("no network"))
        generate(ours, "a", 1)
    assert ours.tokenizer.vocab_size == 50257
    for text in (generate(ours, "\n", 50), *texts(out_dir=tmp_path, max_new_tokens=50)):
        assert len(text) > 50


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, hub, monkeypatch):
    with refused("cannot fetch openai-community/gpt2-large from http",
                 "hf download openai-community/gpt2-large"):
        sample.main(["--init_from=gpt2-large"])
    # The mistake comes to light before the download
    with refused("batch_size=0"):
        train.main(["--init_from=gpt2-large", "--batch_size=0"])
    with refused("train first, or name another run's folder"):
        load_model(str(tmp_path / "nothing"))
    saved(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with refused("pip install safetensors"):
        load_model(str(tmp_path / "theirs"))


# ---- a folder's own tokens -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def portuguese():
    """Byte-pair tokens of another language, as the package tokenizers trains them."""
    from tokenizers import ByteLevelBPETokenizer
    text = ("Não é português? Ação, coração e canção: o menino não comeu a maçã."
            "\n\n 1999 ßß 漢字")
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([text] * 3, vocab_size=310, show_progress=False,
                               special_tokens=["<s>", "<|endoftext|>", "<pad>"])
    return theirs


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_a_folders_own_tokens_are_used(tmp_path, portuguese, texts, kind):
    theirs = saved(tmp_path, vocab_size=310)
    if kind == "tokenizer.json":
        portuguese.save(str(tmp_path / kind))
    else:
        portuguese.save_model(str(tmp_path))
    tokenizer = load_model(tmp_path).tokenizer
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (310, 1)
    for text in (*WORDS, "<pad>s<s>"):
        ids = tokenizer.encode(text)
        # In a text these are no tokens, as <|endoftext|> is not
        assert "<" in text or ids == portuguese.encode(text).ids
        assert tokenizer.decode(ids).decode() == text
    ids = theirs.generate(torch.tensor([portuguese.encode("Não").ids]), max_new_tokens=20,
                          do_sample=False)[0].tolist()
    written = portuguese.decode(ids, skip_special_tokens=False)
    assert texts(out_dir=tmp_path, start="Não", temperature=0) == [written]
    # The number 50304 alone does not say that some rows are padding
    saved(tmp_path, vocab_size=50304)
    assert load_model(tmp_path).config.vocab_size == 50304
    saved(tmp_path, vocab_size=309)
    with refused(f"tokenizer in {tmp_path}", "310 tokens, and the weights have 309"):
        load_model(tmp_path)


def test_gpt2s_own_tokens_are_recognised(tmp_path, gpt2_files):
    saved(tmp_path, vocab_size=50257)
    for name, key in (("vocab.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
                      ("merges.txt", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")):
        (tmp_path / name).write_bytes((gpt2_files / key).read_bytes())
    weights = read_weights(tmp_path)
    # With the tokens themselves, so nothing has to be fetched
    assert (weights["tokenizer"], weights["assumed"]) == (Tokenizer({"kind": "gpt2"}).spec, "")


# What a file says that is no GPT-2's: (its name, how to make it so, the error)
CONFIG, TOKENIZER, APART = "config.json", "tokenizer.json", "do not belong together"
ANOTHER = [
    (CONFIG, lambda parts: parts.update(model_type="llama"), "model_type='llama' is not GPT-2"),
    (CONFIG, lambda parts: parts.update(activation_function="relu"), "activation_function='relu'"),
    (CONFIG, lambda parts: parts.update(layer_norm_epsilon=1e-3), "layer_norm_epsilon=0.001"),
    (CONFIG, lambda parts: parts.update(tie_word_embeddings=False), "tie_word_embeddings=False"),
    (CONFIG, lambda parts: parts.update(scale_attn_by_inverse_layer_idx=True), "layer_idx=True"),
    *((CONFIG, lambda parts, name=name, size=size: parts.update({name: size}), APART)
      for name, size in (("n_layer", 4), ("n_embd", 16), ("n_head", None), ("n_head", 3))),
    *((TOKENIZER, change, "tokenizer in {folder}") for change in (
        lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
        lambda parts: parts.update(normalizer={"type": "NFC"}),
        lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}),
        lambda parts: parts["model"]["merges"].reverse(),
        lambda parts: parts["model"]["merges"].append(["a", "b"]),
        lambda parts: parts["model"]["vocab"].update({"maçã": 310}),
        lambda parts: parts["model"]["vocab"].pop("<|endoftext|>"),
        lambda parts: parts.pop("model")))]


@pytest.mark.parametrize("name, change, words", ANOTHER)
def test_a_folder_of_another_kind_is_refused(tmp_path, portuguese, name, change, words):
    saved(tmp_path, n_head=2, vocab_size=311)
    portuguese.save(str(tmp_path / TOKENIZER))
    parts = json.loads((tmp_path / name).read_text())
    change(parts)
    (tmp_path / name).write_text(json.dumps(parts))
    with refused(words.format(folder=tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b""),
    ("model.safetensors", b""), ("model.safetensors", b"\xff" * 100),
    *(("best.pt", checkpoint) for checkpoint in (
        {"format": FORMAT}, {"format": 2, "model": 3, "model_config": 3, "tokenizer": 3},
        {"model": 3, "model_args": 3}, {"model": {}, "model_args": {}, "config": 3},
        {"model": {}, "model_args": {"zzz": 1}}, {"model": {}, "model_args": {"n_layer": 1}},
        {1: 2}))], ids=str)
def test_a_file_that_is_damaged_or_only_looks_right_is_refused(tmp_path, name, content):
    saved(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with refused(str(tmp_path)):
        load_model(str(tmp_path))


@pytest.mark.parametrize("rows", [50257, 50304])
def test_what_is_assumed_of_tokens_is_said_and_can_be_overridden(tmp_path, capsys, data_dir, rows):
    theirs = oracle("gelu", n_layer=1, n_head=1, n_embd=8, vocab_size=rows)
    write_nanogpt(tmp_path, theirs, dataset="lost")
    argv = command_line(dict(out_dir=tmp_path, data_dir=data_dir, num_samples=1, max_new_tokens=5,
                             device="cpu", start="ab"))
    sample.main(argv)
    assert f"{rows} rows are taken to be those of GPT-2's" in capsys.readouterr().err
    alphabet = prepare_data.read_meta(data_dir / "tiny_char")["tokenizer"]["alphabet"]
    sample.main([*argv, "--dataset=tiny_char"])
    captured = capsys.readouterr()
    assert captured.err == "" and set(captured.out.split("\n")[0]) <= set(alphabet)


# ---- checkpoints of nanoGPT and of version 3 -----------------------------------------------------

@pytest.mark.parametrize("prefix, bias", [
    ("", True), ("_orig_mod.", False), ("module._orig_mod.", True)])
def test_a_nanogpt_checkpoint_comes_in(tmp_path, prefix, bias):
    theirs = oracle("gelu", biases=bias, **SHAPE)
    write_nanogpt(tmp_path, theirs, prefix=prefix, bias=bias)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        ours = load_model(str(source))
        assert ours.config.bias == bias and ours.config.dropout == 0
        assert_same_model(ours, theirs)


def test_a_nanogpt_checkpoint_samples_and_trains_on(run, texts, tmp_path, data_dir):
    theirs = oracle("gelu", **OF_TINY)
    write_nanogpt(tmp_path, theirs)
    alphabet = prepare_data.read_meta(data_dir / "tiny_char")["tokenizer"]["alphabet"]
    ids = theirs.generate(torch.tensor([[3]]), max_new_tokens=100, do_sample=False)[0]
    assert texts(out_dir=tmp_path, data_dir=data_dir, max_new_tokens=100, temperature=0,
                 start=alphabet[3]) == ["".join(alphabet[i] for i in ids)]
    run("on", init_from=tmp_path / "ckpt.pt", block_size=64, qk_dim=64, max_iters=3, dropout=0)
    ids = torch.from_numpy(ids_of(data_dir / "tiny_char", "val").astype("int64"))
    count = (len(ids) - 1) // 64
    x, y = ids[:count * 64].view(count, 64), ids[1:count * 64 + 1].view(count, 64)
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    first = comparable(tmp_path / "on")[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(expected, abs=1e-4)
    last = load_checkpoint(tmp_path / "on" / "last.pt")
    assert last["step"] == 3 and last["model_config"]["block_size"] == 64


def test_a_nanogpt_alphabet_is_asked_for_and_checked(tmp_path, data_dir):
    theirs = oracle("gelu", n_layer=1, n_head=1, n_embd=8, vocab_size=11)
    argv = [f"--init_from={tmp_path / 'ckpt.pt'}", f"--data_dir={data_dir}"]
    for dataset, words, option in (
            ("lost", "lost/meta.json: run", []), (None, "do not say what their tokens are", []),
            ("lost", "and the weights have 11", ["--dataset=tiny_char"])):
        write_nanogpt(tmp_path, theirs, dataset)
        with refused(words):
            sample.main(argv + option)


@pytest.mark.parametrize("system", [system for system in SYSTEMS
                                    if system["block"] in ("gpt2", "dva")], ids=str)
def test_a_checkpoint_of_version_3_samples(system, tmp_path):
    model = shaken(tiny(**system))
    state = model.state_dict()
    if system["block"] == "gpt2":
        # W_q, W_k and, without a bank, W_v were one matrix
        for name in [name for name in state if ".attn.c_q." in name]:
            parts = [state.pop(name.replace("c_q", f"c_{part}"), None) for part in "qkv"]
            state[name.replace("c_q", "c_attn")] = torch.cat([p for p in parts if p is not None])
    # Version 3 stored these settings as they were resolved, and its gate
    config = asdict(model.config) | {"gate": "plain", "value_dim": 24,
                                     "rotary": model.config.is_rotary}
    alphabet = {"kind": "char", "alphabet": "".join(chr(97 + i) for i in range(37))}
    saved = {"format": 3, "model": state, "model_config": config, "config": {"dataset": "x"},
             "tokenizer": alphabet, "step": 9}
    torch.save(saved, tmp_path / "best.pt")
    idx = tokens(2, 16)
    assert torch.equal(load_model(tmp_path)(idx), model(idx))
    config["gate"] = "open"
    torch.save(saved, tmp_path / "best.pt")
    with refused("unknown settings, as of another version: gate"):
        load_model(tmp_path)


# ---- our own, and starting from any --------------------------------------------------------------

def test_only_settings_that_mean_something_else_contradict_the_weights(run, tmp_path):
    run(block="dva", max_iters=1)
    given = dict(init_from=tmp_path / "out", block="dva")
    for same in (dict(rotary=True), dict(value_dim=16)):
        assert start_from(train.TrainConfig, given | same)
    for other, words in ((dict(rotary=False), "rotary=False"), (dict(value_dim=8), "value_dim=8")):
        with refused(f"{words} contradicts the weights"):
            start_from(train.TrainConfig, given | other)


def test_a_folder_that_is_called_gpt2_is_the_folder(run, texts, tmp_path, monkeypatch, hub):
    hub("gpt2", n_layer=4, n_head=1, n_embd=8, vocab_size=50257)
    monkeypatch.chdir(tmp_path)
    run("gpt2", max_iters=2)
    assert load_model(Path("gpt2")).config.n_layer == load_model("./gpt2").config.n_layer == 2
    assert load_model("gpt2").config.n_layer == 4
    # Two characters of the run's alphabet and 20 more, or 20 longer tokens
    assert len(texts(out_dir="gpt2")[0]) == 22 < len(texts(init_from="gpt2")[0])


def test_more_banks_than_the_default_has_layers(tmp_path):
    saved(tmp_path, n_layer=24, n_embd=4)
    given = dict(init_from=tmp_path, block="dva", qk_dim=2, block_size=8, bank_layers=16)
    cfg, _ = start_from(train.TrainConfig, given)
    assert (cfg.n_layer, cfg.bank_layers) == (24, 16)


def test_a_longer_window_where_weights_hold_no_positions(tmp_path):
    save_run(tmp_path, shaken(tiny(block="dva", rotary="only")), None)
    short, long, idx = load_model(tmp_path), load_model(tmp_path, block_size=64), tokens(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(short(idx[:, :16]), long(idx)[:, :16], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("error", [ValueError("too many values"), RuntimeError("size mismatch"),
                                   KeyError("zzz")], ids=repr)
def test_a_mistake_in_a_readers_block_keeps_its_traceback(run, tmp_path, monkeypatch, error):
    class Mistaken(BLOCKS["mean"]):
        def __init__(self, *args):
            super().__init__(*args)
            raise error
    run(block="mean", max_iters=1)
    monkeypatch.setitem(BLOCKS, "mean", Mistaken)
    for action in (lambda: load_model(tmp_path / "out"),
                   lambda: sample.main([f"--out_dir={tmp_path / 'out'}"]),
                   lambda: run("other", block="mean"),
                   lambda: run("on", init_from=tmp_path / "out", block="mean")):
        with pytest.raises(type(error)) as caught:
            action()
        assert caught.value is error


def test_a_text_in_gives_a_text_out(trained, texts):
    model = load_model(trained)
    assert [generate(model, "ab", 20, temperature=0)] == texts(temperature=0)
    torch.manual_seed(1)
    three = generate(model, "ab", 20, num_samples=3)
    assert len(set(three)) == 3 and all(text.startswith("ab") for text in three)
    with pytest.raises(ValueError, match="the prompt is empty: give at least one character"):
        generate(model, "")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_refused_before_anything_is_written(run, finished, tmp_path, number):
    """As a training that diverged leaves them."""
    path = tmp_path / "out" / "best.pt"
    broken = load_checkpoint(path)
    broken["model"]["transformer.ln_f.weight"][3] = number
    torch.save(broken, path)
    for command in (lambda: sample.main([f"--out_dir={path.parent}"]),
                    lambda: explain.main([f"--out_dir={path.parent}"]),
                    lambda: run("new", init_from=path)):
        with refused("transformer.ln_f.weight holds numbers that are not finite",
                     "take an earlier checkpoint"):
            command()
    assert not (tmp_path / "new").exists() and not (path.parent / "explain.html").exists()


def test_the_pages_lines_of_python_do_what_they_say(run, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "interop.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    run("out-demo", block="dva", rotary=True, max_iters=2, value_norm=False)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("ROMEO:", "abc"), names)
    assert capsys.readouterr().out.startswith("abc")
    # What the block adds is W_o of the gated, weighted sum of the values
    attn, x, rotary = names["attn"], names["x"], names["rotary"]
    mixed = names["weights"] @ attn.c_v(x) * names["gates"]
    ids = torch.tensor([names["model"].tokenizer.encode("abc")])
    expected = attn(x[None], ids, rotary)[0]
    torch.testing.assert_close(attn.c_proj(mixed), expected, atol=1e-6, rtol=1e-4)


def test_training_goes_on_with_the_tokens_of_the_weights(tmp_path, data_dir, portuguese, capsys):
    for kind in ("gpt2", "gpt2:50250"):
        prepare_data.main([kind.replace(":", "-"), f"--input={data_dir / 'tiny.txt'}",
                           "--val_fraction=0.2", f"--tokenizer={kind}", f"--data_dir={tmp_path}"])
    saved(tmp_path / "theirs", vocab_size=50257)
    argv = command_line(dict(init_from=tmp_path / "theirs", data_dir=tmp_path, block_size=16,
                             eval_only=True, eval_iters=1, batch_size=2, device="cpu",
                             dtype="float32", out_dir=tmp_path / "out"))
    # What is only assumed gives way to a data set whose tokens fit the table
    for dataset in ("gpt2", "gpt2-50250"):
        _, out = ending_of(train.main, [*argv, f"--dataset={dataset}"], capsys)
        assert "rows are taken to be those of GPT-2's" in out and "val loss" in out
    with refused("another tokenizer"):
        train.main([*argv, "--dataset=tiny_char", f"--data_dir={data_dir}"])
    # But the folder's own tokens do not
    portuguese.save(str(tmp_path / "theirs" / "tokenizer.json"))
    with refused("another tokenizer"):
        train.main([*argv, "--dataset=gpt2"])


def test_a_data_set_in_the_tokens_of_a_folder(run, tmp_path, portuguese):
    from transformers import AutoTokenizer
    text = "A maçã não é do menino. " * 200
    (tmp_path / "text.txt").write_text(text)
    saved(tmp_path / "theirs", n_layer=2, n_head=2, n_embd=16, vocab_size=310)
    prepare = ["maca", f"--input={tmp_path / 'text.txt'}", f"--tokenizer={tmp_path / 'theirs'}",
               f"--data_dir={tmp_path}"]
    with refused("has neither tokenizer.json nor vocab.json"):
        prepare_data.main(prepare)
    portuguese.save(str(tmp_path / "theirs" / "tokenizer.json"))
    prepare_data.main(prepare)
    ids = ids_of(tmp_path / "maca", "train").tolist()
    assert ids == portuguese.encode(text[:int(0.9 * len(text))]).ids
    # Fine-tune on it, and give the result back
    run(init_from=tmp_path / "theirs", qk_dim=64, dataset="maca", data_dir=tmp_path, max_iters=1)
    convert.main([str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in WORDS:
        assert theirs(text)["input_ids"] == portuguese.encode(text).ids
    assert theirs.eos_token_id == load_model(tmp_path / "hf").tokenizer.end_of_text == 1


def test_gpt2_with_another_block_keeps_embeddings_positions_and_final_norm(run, tmp_path):
    old = saved(tmp_path / "gpt2", **OF_TINY).transformer
    run(init_from=tmp_path / "gpt2", block="dva", bank_layers=1, n_layer=3, max_iters=1,
        learning_rate=0, min_lr=0, weight_decay=0)
    state = load_checkpoint(tmp_path / "out" / "last.pt")["model"]
    assert torch.equal(state["transformer.wte.weight"], old.wte.weight)
    assert torch.equal(state["transformer.wpe.weight"], old.wpe.weight[:16])
    assert torch.equal(state["transformer.ln_f.bias"], old.ln_f.bias)
    assert not state["transformer.h.0.attn.c_q.bias"].any()
    # The bank was made from these embeddings
    embedded = F.layer_norm(old.wte.weight, (16,))
    table = state["transformer.h.2.attn.bank.table"]
    w_v = torch.linalg.lstsq(embedded, table).solution
    torch.testing.assert_close(embedded @ w_v, table, atol=1e-5, rtol=0)
    # Where rotary positions stand alone, the learned ones are left behind
    run("only", init_from=tmp_path / "gpt2", block="dva", rotary="only", max_iters=1)
    state = load_checkpoint(tmp_path / "only" / "last.pt")["model"]
    assert "transformer.wte.weight" in state and "transformer.wpe.weight" not in state
