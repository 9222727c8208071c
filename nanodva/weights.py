"""
Weights of every origin: our own runs, nanoGPT's, OpenAI's GPT-2, and any GPT-2 in Hugging Face
format. Nothing is ever unpickled.

    from model import generate
    from nanodva.weights import load_model
    model = load_model("out-demo")                # or "gpt2", or a folder from the hub
    print(generate(model, "ROMEO:", 200))
"""
import json
import re
import sys
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

import torch

from model import GPT, ConfigError, ModelConfig
from nanodva.checkpoints import FORMAT, load_file
from nanodva.errors import UserError, fail
from nanodva.settings import build, coerce
from nanodva.tokenizer import Tokenizer, read_tokenizer

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# GPT-2's vocabulary, and the table of a multiple of 64 rows that nanoGPT makes for it
TOKENS, PADDED = 50257, 50304
# What config.json may say of a GPT-2 that this is; if it says nothing, transformers takes the first
CONFIG = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True],
    "add_cross_attention": [False]}
# Settings with a word for "by default", and the properties that tell what they resolve to
RESOLVED = {"rotary": ["is_rotary", "has_learned_positions"], "value_dim": ["value_width"]}


def load_model(source, **changes):
    """
    The GPT, in evaluation mode, whose weights `source` names, see read_weights. Its attribute
    `tokenizer` is the Tokenizer of these weights, or None if they do not name it. `changes` are
    settings to change: dropout, gelu, a smaller block_size. Raises UserError, a ValueError, for a
    source that cannot be read and for changes that contradict the weights.
    """
    unknown = ", ".join(changes.keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        fail(f"load_model() knows no settings {unknown}: see ModelConfig in model.py")
    weights = read_weights(source)
    if weights["assumed"]:
        print(weights["assumed"], file=sys.stderr)
    config = build(ModelConfig, weights["model_config"] | changes)
    weights["model"] = fit_weights(weights, config)
    model = build_model(config, weights, LoadedGPT).eval()
    model.tokenizer_spec = weights["tokenizer"]
    return model


class LoadedGPT(GPT):
    """The GPT of load_model(). Its Tokenizer is made at its first use: logits need none."""

    @cached_property
    def tokenizer(self):
        return Tokenizer(self.tokenizer_spec) if self.tokenizer_spec else None


def build_model(config, weights=None, kind=GPT):
    """
    A GPT with the settings in config and, if given, the weights that fit_weights() returned. Blocks
    without weights are initialised. Raises UserError for settings that the block refuses.
    """
    try:
        model = kind(config)
    except ConfigError as error:
        fail(error)
    if weights:
        missing, _ = model.load_state_dict(weights["model"], strict=False)
        if missing:
            for bank in model.banks():
                bank.align(model.transformer.wte.weight)
    return model


def outline(config):
    """
    The GPT with these settings on the meta device, where it has sizes but takes no memory. Raises
    UserError for settings that the block refuses.
    """
    with torch.device("meta"):
        return build_model(config)


def start_from(cls, given):
    """
    (cfg, weights) of a new run from the weights that given["init_from"] names, with their
    architecture. Another kind of block keeps embeddings, positions and the final norm.
    """
    # Check the settings before a long download; bank_layers can only be checked after it
    build(cls, given | {"bank_layers": 0})
    weights = read_weights(given["init_from"])
    theirs = weights["model_config"]
    if given.get("block", theirs["block"]) != theirs["block"]:
        shared = ("n_layer", "n_embd", "block_size", "vocab_size", "bias")
        theirs = {name: theirs[name] for name in shared}
    cfg = build(cls, theirs | given)
    weights["model"] = fit_weights(weights, cfg)
    return cfg, weights


def fit_weights(weights, config):
    """
    The state dict of read_weights() for the ModelConfig `config`: its first block_size positions,
    and without the blocks if config asks for another kind. dropout and gelu have no weights and
    may differ. Raises UserError for a setting that contradicts the weights.
    """
    theirs, state = ModelConfig(**weights["model_config"]), dict(weights["model"])
    fixed = [field.name for field in fields(ModelConfig)
             if field.name not in ("block_size", "dropout", "gelu")]
    if config.block != theirs.block:
        fixed = ["n_embd", "vocab_size", "bias"]
        state = {name: p for name, p in state.items() if not name.startswith("transformer.h.")}

    def refuse(name, reason):
        fail(f"{name}={getattr(config, name)!r} contradicts the weights of {weights['source']}: "
             f"they have {reason}")

    for name in fixed:
        resolved = RESOLVED.get(name, [name])
        if any(getattr(config, each) != getattr(theirs, each) for each in resolved):
            refuse(name, f"{name}={getattr(theirs, name)!r}; leave it out, or train from scratch")
    positions = "transformer.wpe.weight"
    if config.rotary == "only":
        state.pop(positions, None)
    if positions in state:
        state[positions] = state[positions][:config.block_size]
        if len(state[positions]) < config.block_size:
            refuse("block_size", f"{len(state[positions])} positions, and more cannot be invented; "
                                 f"use at most that many")
    return state


# ---- reading ------------------------------------------------------------------------------------

def read_weights(source):
    """
    The weights that `source` names, as a dict:

      model           state dict, with the names and shapes that model_config asks for
      model_config    fields of ModelConfig, without dropout, which is a matter of the run
      tokenizer       spec for Tokenizer, or None if only the data set has it
      assumed         "", or a sentence if the spec was only inferred from the number of tokens
      dataset         the name of the data set, if a checkpoint tells it, or None
      source          as given, for messages

    A source is a run of ours or of nanoGPT's (its folder or a .pt file), or a folder with
    config.json that transformers or tools.convert saved. The texts gpt2, gpt2-medium, gpt2-large
    and gpt2-xl name OpenAI's models on the Hugging Face hub or in its cache; a Path never does.
    Raises UserError for what cannot be read.
    """
    path = Path(source)
    names = ["best.pt", "last.pt", "ckpt.pt"]
    found = [path] if path.is_file() else [path / name for name in names if (path / name).exists()]
    if source in OPENAI:
        weights = read_folder(download(f"openai-community/{source}"))
        weights["tokenizer"] = {"kind": "gpt2"}
    elif found:
        weights = read_checkpoint(found[0])
    elif (path / "config.json").is_file():
        weights = read_folder(path)
    else:
        fail(f"no {(path / 'best.pt').absolute()}: train first, or name another run's folder, a "
             f"nanoGPT ckpt.pt, a folder with config.json and model.safetensors, or with "
             f"--init_from one of {', '.join(OPENAI)}")
    state = plain_names(weights["model"])
    try:
        config = asdict(config_of(state, weights["model_config"]))
    except UserError as error:
        fail(f"{source}: weights and settings do not belong together: {error}")
    for name, p in state.items():
        # The smallest and the largest number: a mask of all of them would take more memory
        if not torch.stack(p.aminmax()).isfinite().all():
            fail(f"{source}: {name} holds numbers that are not finite, as after a training that "
                 f"diverged: take an earlier checkpoint, or train with a lower --learning_rate")
    del config["dropout"]
    spec, assumed, rows = weights["tokenizer"], "", config["vocab_size"]
    if spec is None and TOKENS <= rows <= PADDED:
        spec = {"kind": "gpt2"}
        assumed = (f"{source} does not say what its tokens are: {rows} rows are taken to be those "
                   f"of GPT-2's {TOKENS} tokens; --dataset=NAME takes a data set's tokens instead")
    return {"model": state, "model_config": config, "tokenizer": spec, "assumed": assumed,
            "dataset": weights.get("dataset"), "source": str(source)}


def config_of(state, settings):
    """The ModelConfig of these settings, which must be those of the state dict's weights."""
    kinds = {field.name: field.type for field in fields(ModelConfig)}
    # Version 3 had another gate
    settings = {name: value for name, value in settings.items()
                if (name, value) != ("gate", "plain")}
    unknown = ", ".join(settings.keys() - kinds.keys())
    if unknown:
        fail(f"unknown settings, as of another version: {unknown}")
    settings = {name: coerce(name, value, kinds[name], "in them")
                for name, value in settings.items()}
    config = build(ModelConfig, settings | {"dropout": 0.0})
    model = outline(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        fail(str(error)[:400])
    return config


def plain_names(state):
    """
    A state dict with the names of model.py: without the prefixes of torch.compile and
    DistributedDataParallel and the causal masks of old models, with the tied weight that
    safetensors leaves out, and with GPT-2's c_attn cut into c_q, c_k and c_v.
    """
    plain = {}
    for name, p in state.items():
        # A mask is (1, 1, T, T); masked_bias is the score of a masked position
        is_mask = name.endswith(".attn.bias") and p.dim() == 4
        if not is_mask and not name.endswith(".attn.masked_bias"):
            plain[re.sub(r"^(module\.|_orig_mod\.)+", "", name)] = p
    if "transformer.wte.weight" in plain:
        plain.setdefault("lm_head.weight", plain["transformer.wte.weight"])
        # W_q, W_k and W_v were one matrix; in a bank layer of version 3 there was no W_v
        C = plain["transformer.wte.weight"].size(1)
        for name in [name for name in plain if ".attn.c_attn." in name]:
            for part, p in zip("qkv", plain.pop(name).split(C), strict=False):
                plain[name.replace("c_attn", f"c_{part}")] = p
    return plain


def read_checkpoint(path):
    """read_weights() of a .pt file, ours or nanoGPT's."""
    found = load_file(path)
    try:
        run = dict(found.get("config") or {})
        weights = {"model": dict(found["model"]), "dataset": run.get("dataset"), "tokenizer": None}
        if found.get("format") in (3, FORMAT):
            return weights | {"model_config": dict(found["model_config"]),
                              "tokenizer": found["tokenizer"]}
        # nanoGPT's first checkpoints had biases without saying so
        config = {"bias": True, **found["model_args"], "gelu": "exact"}
        return weights | {"model_config": config}
    except (AttributeError, LookupError, TypeError, ValueError):
        fail(f"{path} is neither a nanoDVA checkpoint of format 3 or {FORMAT} nor one of nanoGPT")


# ---- GPT-2 in Hugging Face format ----------------------------------------------------------------

def download(repository):
    """The folder in the hub's cache that holds a repository's config.json and weights."""
    from huggingface_hub import constants, hf_hub_download
    try:
        paths = [hf_hub_download(repository, name) for name in ("config.json", "model.safetensors")]
    except Exception as error:
        # The network, a proxy or the disk may raise anything here
        fail(f"cannot fetch {repository} from {constants.ENDPOINT} ({type(error).__name__}): where "
             f"there is a network, run  hf download {repository} --local-dir=FOLDER  and come back "
             f"with --init_from=FOLDER")
    return Path(paths[0]).parent


def read_folder(folder):
    """
    {"model", "model_config", "tokenizer"} of a folder that transformers or tools.convert saved. The
    last is None if the folder has no tokenizer. Raises UserError.
    """
    try:
        theirs, state = dict(json.loads((folder / "config.json").read_bytes())), read_state(folder)
    except ImportError:
        fail(f"{folder} needs the package safetensors:  pip install safetensors")
    except Exception as error:
        # json, safetensors and torch raise a dozen kinds of error for a damaged file
        fail(f"{folder} is damaged, or no model in Hugging Face format: {str(error)[:200]}")
    if "model_config" in theirs:
        state = {name.removeprefix("gpt."): p for name, p in state.items()}
        return {"model": state, "model_config": theirs["model_config"],
                "tokenizer": read_tokenizer(folder)}
    for key, allowed in CONFIG.items():
        if theirs.get(key, allowed[0]) not in allowed:
            fail(f"{folder}/config.json: {key}={theirs[key]!r} is not GPT-2: it has "
                 f"{' or '.join(map(repr, allowed))}")
    weights = {}
    for name, p in state.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        # transformers' Conv1D keeps its matrices as (in, out)
        is_conv1d = name.startswith("transformer.h.") and p.dim() == 2
        weights[name] = p.T if is_conv1d else p
    rows = theirs.get("vocab_size")
    spec = read_tokenizer(folder, rows)
    if rows == PADDED and (spec is None or spec["kind"] == "gpt2"):
        # Padded rows are no tokens, and would take part in the softmax
        rows = TOKENS
        for name in weights.keys() & {"transformer.wte.weight", "lm_head.weight"}:
            weights[name] = weights[name][:TOKENS]
    config = {"n_layer": theirs.get("n_layer"), "n_head": theirs.get("n_head"),
              "n_embd": theirs.get("n_embd"), "block_size": theirs.get("n_positions"),
              "vocab_size": rows, "bias": True,
              "gelu": "exact" if theirs.get("activation_function") == "gelu" else "tanh"}
    return {"model": weights, "model_config": config, "tokenizer": spec}


def read_state(folder):
    """The state dict in a folder, from one file or from several with an index."""
    from safetensors.torch import load_file as load_safetensors
    for name, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_file)):
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if (folder / files[0]).exists():
            return {key: p for file in files for key, p in load(folder / file).items()}
    raise FileNotFoundError("no model.safetensors and no pytorch_model.bin")
