"""
Checkpoints: our own written and read, and weights from elsewhere: OpenAI's GPT-2, anything in its Hugging Face format,
nanoGPT's checkpoints.

train.py and sample.py take them with --init_from, tools/convert.py as its argument, Python code through
GPT.from_pretrained. Nothing is ever unpickled, and nothing guessed: what GPT-2 has not, is refused in one line.
"""
import json
import os
import pickle
import re
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from config import fail
from model import GPT, ModelConfig

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENS, PADDED = 50257, 50304                          # GPT-2's vocabulary, and the table that nanoGPT makes for it
# What config.json in Hugging Face format may say for a model to be this one; where it is silent it means the first
FORMAT = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
          "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
          "tie_word_embeddings": [True], "add_cross_attention": [False]}


def save(checkpoint, path):
    """Write aside, flush to the disk, rename: path holds the old checkpoint or the new one, never half of one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:                           # torch puts its own around the disk's
        aside.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        fail(f"cannot write {path}: {reason}; the checkpoint before it is untouched")


def load_file(path):
    """What torch.save wrote, on the CPU. Tensors, numbers and text only: code in it is refused, never run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():           # torch.load does not compare the checksums
                raise ValueError(f"{damaged} in it has another checksum than when it was saved")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        fail(f"{path} is refused: it calls for {code[1] if code else 'more'}, and only tensors, numbers and text are read")
    except Exception as error:                         # zipfile and torch raise a dozen kinds
        fail(f"{path} is not a checkpoint, or a damaged one: {str(error)[:200]}")


def load_checkpoint(path):
    """The checkpoint of ours at path, on the CPU."""
    if not path.exists():
        fail(f"no {path}: train first, or give the run's folder as --out_dir")
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != 1:
        fail(f"{path} is not a nanoDVA checkpoint of format 1")
    return checkpoint


def read_weights(source):
    """
    {"model": state dict, "model_config": fields of ModelConfig, "tokenizer": its spec} of what `source` names:

      gpt2, gpt2-medium, gpt2-large, gpt2-xl    OpenAI's, from the Hugging Face hub or its cache on this disk
      OUT_DIR, or a .pt file                    a run of ours or of nanoGPT's (best.pt, last.pt, ckpt.pt)
      a folder with config.json                 and model.safetensors: Hugging Face's, or from tools.convert

    The spec is None where only the data set knows it; "dataset" is then the name that a nanoGPT checkpoint gives.
    What can't be read ends in one line and exit status 2.
    """
    path = Path(source)
    files = [path] if path.is_file() else [path / name for name in ("best.pt", "last.pt", "ckpt.pt")]
    checkpoint = next((file for file in files if file.exists()), None)
    if source in OPENAI:
        weights = read_folder(fetch(f"openai-community/{source}", "config.json", "model.safetensors"))
    elif checkpoint:
        weights = read_checkpoint(checkpoint)
    elif (path / "config.json").is_file():
        weights = read_folder(path)
    else:
        fail(f"no {path / 'best.pt'}: train first, or name another run's folder, a nanoGPT ckpt.pt, a folder with "
             f"config.json and model.safetensors, or one of {', '.join(OPENAI)}")
    try:
        # A compiled model has a prefix, an old one its masks, and of tied weights safetensors keeps one
        state = {name.removeprefix("_orig_mod."): p for name, p in weights["model"].items()
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        before = {"rotary": False} if weights["model_config"].get("block") == "dva" else {}    # what ours didn't always have
        config = asdict(ModelConfig(**before | weights["model_config"] | {"dropout": 0.0}))
        with torch.device("meta"):                     # each name and shape as the settings have it, at no cost
            GPT(ModelConfig(**config)).load_state_dict(state, assign=True)
        del config["dropout"]                          # a matter of the run
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"{source}: weights and settings do not belong together: {str(error)[:300]}")
    return weights | {"model": state, "model_config": config}


def read_checkpoint(path):
    checkpoint = load_file(path)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == 1:
        return {key: checkpoint[key] for key in ("model", "model_config", "tokenizer")}
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        fail(f"{path} is neither a nanoDVA checkpoint of format 1 nor one of nanoGPT")
    config = {"bias": True} | checkpoint["model_args"] | {"gelu": "exact"}     # the first had biases without saying so
    return {"model": checkpoint["model"], "model_config": config, "tokenizer": gpt2_tokenizer(config.get("vocab_size")),
            "dataset": checkpoint.get("config", {}).get("dataset")}


def gpt2_tokenizer(vocab_size):
    return {"kind": "gpt2"} if vocab_size in (TOKENS, PADDED) else None


def fetch(repository, *names):
    """The folder of the Hugging Face hub's cache that holds these files of a repository."""
    from huggingface_hub import constants, hf_hub_download             # datasets brings it
    try:
        return [Path(hf_hub_download(repository, name)) for name in names][0].parent
    except Exception as error:                         # whatever the network, a proxy or the disk come up with
        fail(f"cannot fetch {repository} from {constants.ENDPOINT} ({type(error).__name__}): where there is a network, "
             f"run  hf download {repository} --local-dir=FOLDER  and come back with --init_from=FOLDER")


def read_folder(folder):
    """A GPT2LMHeadModel or GPT2Model as transformers saves it, or what tools.convert wrote with --to=safetensors."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        fail(f"{folder} needs the package safetensors:  pip install safetensors")
    try:
        theirs, state = json.loads((folder / "config.json").read_bytes()), load_file(folder / "model.safetensors")
    except Exception as error:                         # safetensors has a class of its own
        fail(f"cannot read config.json and model.safetensors in {folder}: {error}")
    if "model_config" in theirs:
        return theirs | {"model": state}
    said = {key: theirs.get(key, allowed[0]) for key, allowed in FORMAT.items()}
    for key, allowed in FORMAT.items():
        if said[key] not in allowed:
            fail(f"{folder}/config.json: {key}={said[key]!r} is not GPT-2: it has {' or '.join(map(repr, allowed))}")
    state = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p
             for name, p in state.items()}
    for name, p in state.items():
        if name.startswith("transformer.h.") and p.dim() == 2:
            state[name] = p.T                          # Conv1D keeps (in, out)
    rows = theirs.get("vocab_size")
    return {"model": state, "tokenizer": theirs.get("nanodva_tokenizer") or gpt2_tokenizer(rows), "model_config": {
        "n_layer": theirs.get("n_layer"), "n_head": theirs.get("n_head"), "n_embd": theirs.get("n_embd"),
        "block_size": theirs.get("n_positions"), "vocab_size": rows, "num_tokens": TOKENS if rows == PADDED else 0,
        "bias": True, "gelu": "exact" if said["activation_function"] == "gelu" else "tanh"}}


def fit_weights(weights, config):
    """
    The state dict of read_weights() as the ModelConfig `config` takes it: its first block_size positions, and without
    the blocks where those are to be of another kind. dropout and gelu have no weights, so they are free.
    Raises ValueError for a setting that contradicts the weights.
    """
    theirs, state = ModelConfig(**weights["model_config"]), dict(weights["model"])
    fixed = [f.name for f in fields(ModelConfig) if f.name not in ("block_size", "dropout", "gelu")]
    if config.block != theirs.block:
        fixed = ["n_embd", "vocab_size", "num_tokens", "bias"]
        state = {name: p for name, p in state.items() if not name.startswith("transformer.h.")}
    for name in fixed:
        if getattr(config, name) != getattr(theirs, name):
            raise ValueError(f"{name}={getattr(config, name)!r} contradicts the weights, which have {name}="
                             f"{getattr(theirs, name)!r}: leave --{name} out, or train from scratch")
    if config.block_size > theirs.block_size:
        raise ValueError(f"block_size={config.block_size}: the weights have {theirs.block_size} positions, and more cannot be "
                         f"made up: use at most --block_size={theirs.block_size}")
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:config.block_size]
    return state
