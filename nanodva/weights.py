"""
Weights of every origin: our own runs, nanoGPT's, OpenAI's GPT-2, and any GPT-2 in Hugging Face
format. Nothing is ever unpickled.

    from weights import load_model
    model = load_model("out-demo")                # or "gpt2", or a folder from the hub
"""
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import GPT, ConfigError, ModelConfig
from nanodva.checkpoints import FORMAT, load_file
from nanodva.errors import UserError, fail
from nanodva.settings import build

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# GPT-2's vocabulary, and the table of a multiple of 64 rows that nanoGPT makes for it
TOKENS, PADDED = 50257, 50304
# What config.json in Hugging Face format may say for a model to be this one. Where it says
# nothing, transformers takes the first.
HUGGING_FACE = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True],
    "add_cross_attention": [False]}


def load_model(source, **changes):
    """
    The GPT, in evaluation mode, whose weights `source` names, see read_weights. `changes` are
    settings to change: dropout, gelu, a smaller block_size. Raises UserError, which is a
    ValueError, for a source that cannot be read and for changes that contradict the weights.
    """
    weights = read_weights(source)
    config = build(ModelConfig, weights["model_config"] | changes)
    try:
        weights["model"] = fit_weights(weights, config)
    except ValueError as error:
        fail(f"{source}: {error}")
    return build_model(config, weights).eval()


def build_model(config, weights=None):
    """
    A GPT with the settings in config and, if given, with what fit_weights() left of weights.
    Blocks that it left out start fresh. Raises UserError for settings that the block refuses.
    """
    try:
        model = GPT(config)
    except ConfigError as error:
        fail(error)
    if weights:
        missing, _ = model.load_state_dict(weights["model"], strict=False)
        if missing:
            for bank in model.banks():
                bank.align(model.transformer.wte.weight)
    return model


def start_from(cls, given):
    """
    (cfg, weights) of a new run from the weights that given["init_from"] names, with their
    architecture. Another kind of block takes over embeddings, positions and the final norm.
    """
    build(cls, given)                       # mistakes come to light before a long download
    weights = read_weights(given["init_from"])
    theirs = weights["model_config"]
    if given.get("block", theirs["block"]) != theirs["block"]:
        shared = ("n_layer", "n_embd", "block_size", "vocab_size", "bias")
        theirs = {name: theirs[name] for name in shared}
    cfg = build(cls, theirs | given)
    try:
        weights["model"] = fit_weights(weights, cfg)
    except ValueError as error:
        name = str(error).partition("=")[0]
        origin = given.origin.get(name, "among the defaults")
        fail(f"init_from={cfg.init_from}: {error} ({name} is set {origin})")
    return cfg, weights


def read_weights(source):
    """
    {"model": state dict, "model_config": fields of ModelConfig, "tokenizer": its spec} of:

      gpt2, gpt2-medium, gpt2-large, gpt2-xl    OpenAI's, from the Hugging Face hub or its cache
      OUT_DIR, or a .pt file                    a run of ours or of nanoGPT's
      a folder with config.json                 and model.safetensors: Hugging Face's, or ours
                                                from tools.convert

    The spec is None where only the data set knows it; "dataset" is then the name that a nanoGPT
    checkpoint gives. Raises UserError for what cannot be read.
    """
    path = Path(source)
    files = [path]
    if not path.is_file():
        files = [path / name for name in ("best.pt", "last.pt", "ckpt.pt")]
    files = [file for file in files if file.exists()]
    if source not in OPENAI and not files and not (path / "config.json").is_file():
        fail(f"no {path / 'best.pt'}: train first, or name another run's folder, a nanoGPT "
             f"ckpt.pt, a folder with config.json and model.safetensors, or one of "
             f"{', '.join(OPENAI)}")
    if source in OPENAI:
        files = []
        path = download(f"openai-community/{source}", "config.json", "model.safetensors")
    try:
        weights = read_checkpoint(files[0]) if files else read_folder(path)
        # A compiled model's names have a prefix, an old model's masks are no weights, and of the
        # two tied weights safetensors keeps one
        state = {name.removeprefix("_orig_mod."): p for name, p in weights["model"].items()
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        config = asdict(ModelConfig(**weights["model_config"] | {"dropout": 0.0}))
        # On the meta device each name and shape is compared at no cost
        with torch.device("meta"):
            GPT(ModelConfig(**config)).load_state_dict(state, assign=True)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{source}: weights and settings do not belong together: {str(error)[:300]}")
    # How much to drop out is a matter of the run, not of the weights
    del config["dropout"]
    return weights | {"model": state, "model_config": config}


def read_checkpoint(path):
    """read_weights() of a .pt file, ours or nanoGPT's."""
    checkpoint = load_file(path)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT:
        return {key: checkpoint[key] for key in ("model", "model_config", "tokenizer")}
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        fail(f"{path} is neither a nanoDVA checkpoint of format {FORMAT} nor one of nanoGPT")
    # nanoGPT's first checkpoints had biases without saying so
    config = {"bias": True} | checkpoint["model_args"] | {"gelu": "exact"}
    return {"model": checkpoint["model"], "model_config": config,
            "tokenizer": gpt2_tokenizer(config.get("vocab_size")),
            "dataset": checkpoint.get("config", {}).get("dataset")}


def gpt2_tokenizer(vocab_size):
    return {"kind": "gpt2"} if vocab_size in (TOKENS, PADDED) else None


def download(repository, *names):
    """The folder of the Hugging Face hub's cache that holds these files of a repository."""
    # datasets brings huggingface_hub along
    from huggingface_hub import constants, hf_hub_download
    try:
        paths = [Path(hf_hub_download(repository, name)) for name in names]
    except Exception as error:
        # whatever the network, a proxy or the disk come up with
        fail(f"cannot fetch {repository} from {constants.ENDPOINT} ({type(error).__name__}): where "
             f"there is a network, run  hf download {repository} --local-dir=FOLDER  and come back "
             f"with --init_from=FOLDER")
    return paths[0].parent


def read_folder(folder):
    """read_weights() of a folder that transformers saved, or tools.convert."""
    try:
        from safetensors.torch import load_file as load_safetensors
    except ImportError:
        fail(f"{folder} needs the package safetensors:  pip install safetensors")
    try:
        theirs = dict(json.loads((folder / "config.json").read_bytes()))
        state = load_safetensors(folder / "model.safetensors")
    except Exception as error:
        # safetensors has a class of its own
        fail(f"cannot read config.json and model.safetensors in {folder}: {error}")
    if "model_config" in theirs:
        return theirs | {"model": state}
    for key, allowed in HUGGING_FACE.items():
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
    if rows == PADDED:
        # Padded rows are no tokens, and would take part in the softmax
        rows = TOKENS
        for name in ("transformer.wte.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:TOKENS]
    config = {"n_layer": theirs.get("n_layer"), "n_head": theirs.get("n_head"),
              "n_embd": theirs.get("n_embd"), "block_size": theirs.get("n_positions"),
              "vocab_size": rows, "bias": True,
              "gelu": "exact" if theirs.get("activation_function") == "gelu" else "tanh"}
    tokenizer = theirs.get("nanodva_tokenizer") or gpt2_tokenizer(rows)
    return {"model": weights, "model_config": config, "tokenizer": tokenizer}


def fit_weights(weights, config):
    """
    The state dict of read_weights() for the ModelConfig `config`: its first block_size positions,
    and without the blocks where those are to be of another kind. dropout and gelu have no
    weights, so they are free. Raises ValueError for a setting that contradicts the weights.
    """
    theirs, state = ModelConfig(**weights["model_config"]), dict(weights["model"])
    free = ("block_size", "dropout", "gelu")
    fixed = [field.name for field in fields(ModelConfig) if field.name not in free]
    if config.block != theirs.block:
        fixed = ["n_embd", "vocab_size", "bias"]
        state = {name: p for name, p in state.items() if not name.startswith("transformer.h.")}
    for name in fixed:
        ours, weights_have = getattr(config, name), getattr(theirs, name)
        if ours != weights_have:
            raise ValueError(f"{name}={ours!r} contradicts the weights, which have "
                             f"{name}={weights_have!r}: leave it out, or train from scratch")
    if config.block_size > theirs.block_size:
        raise ValueError(f"block_size={config.block_size}: the weights have {theirs.block_size} "
                         f"positions, and more cannot be made up: use at most that many")
    positions = "transformer.wpe.weight"
    if positions in state:
        state[positions] = state[positions][:config.block_size]
    if config.rotary == "only":
        state.pop(positions, None)
    return state
