"""
Weights out: a run of ours, or anything else that --init_from takes, as a folder that other
programs read.

    python -m tools.convert out-gpt2 --to=hf --dest=gpt2-hf                for transformers
    python -m tools.convert out-demo --to=safetensors --dest=demo-plain    any block

The first is a GPT2LMHeadModel for AutoModelForCausalLM, with its tokenizer for AutoTokenizer unless
its tokens are characters. The second holds the weights under their own names, and config.json.
Either folder also goes back in: --init_from=FOLDER.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# So that python tools/convert.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

from model import ModelConfig
from nanodva.errors import fail, run_script
from nanodva.settings import check, load_settings
from nanodva.tokenizer import END_OF_TEXT, Tokenizer
from nanodva.weights import read_weights


@dataclass
class ConvertConfig:
    source: str = ""         # the first argument: a run's folder, or what else --init_from takes
    to: str = "hf"           # hf: transformers' GPT-2; safetensors: weights under their own names
    dest: str = ""           # folder to write, new or empty

    def __post_init__(self):
        check(self, choices=dict(to=["hf", "safetensors"]))
        if not self.source or not self.dest:
            fail("say what goes where:  python -m tools.convert OUT_DIR --to=hf --dest=FOLDER")


def to_hugging_face(weights):
    """
    (config.json, state dict) of transformers' GPT2LMHeadModel for what read_weights() gave.
    Raises UserError for a model that GPT-2 cannot express.
    """
    model, spec = ModelConfig(**weights["model_config"]), weights["tokenizer"]
    gpt2 = {"block": "gpt2", "bank_layers": 0, "rotary": False}
    for name, value in gpt2.items():
        if getattr(model, name) != value:
            fail(f"{name}={getattr(model, name)!r} cannot go to hf: transformers' GPT-2 has no "
                 f"such layers, and would compute something else; use --to=safetensors")
    rows, end = model.vocab_size, None
    if spec:
        tokenizer = Tokenizer(spec)
        rows, end = tokenizer.vocab_size, tokenizer.end_of_text
    state = {}
    for name, p in weights["model"].items():
        if name == "lm_head.weight":
            # It is tied to the token table
            continue
        # transformers' Conv1D keeps its matrices as (in, out)
        is_conv1d = name.startswith("transformer.h.") and p.dim() == 2
        state[name] = p.T if is_conv1d else p
        is_embedding = name in ("transformer.wte.weight", "transformer.wpe.weight")
        if name.endswith(".weight") and not is_embedding:
            # There everything has a bias. If ours has one, it comes later and takes this place.
            bias = name.removesuffix("weight") + "bias"
            state.setdefault(bias, torch.zeros(p.size(0)))
    # Padded rows of the table are no tokens, and would take part in the softmax
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:rows]
    settings = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": rows,
        "n_positions": model.block_size, "n_embd": model.n_embd, "n_layer": model.n_layer,
        "n_head": model.n_head, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end,
        "nanodva_tokenizer": spec}
    return settings, state


def write_bpe_tokenizer(folder, tokenizer):
    """Write vocab.json, merges.txt and tokenizer_config.json, from which AutoTokenizer is made."""
    tokens = [tokenizer.bpe.decode_single_token_bytes(i) for i in range(tokenizer.end_of_text)]
    # GPT-2's files write each byte as one visible character: its own where it has one, and else
    # one of those from 256 on
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in visible}
    invisible = sorted(set(range(256)) - set(visible))
    letters |= {byte: chr(256 + i) for i, byte in enumerate(invisible)}
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    words = ["".join(letters[byte] for byte in token) for token in tokens]
    merges = []
    for rank in range(256, len(tokens)):
        left, right = last_merge(tokens[rank], rank, rank_of)
        merges.append(f"{words[rank_of[left]]} {words[rank_of[right]]}")
    vocabulary = {word: rank for rank, word in enumerate(words)}
    vocabulary[END_OF_TEXT] = tokenizer.end_of_text
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "#version: 0.2\n" + "\n".join(merges) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer"} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def last_merge(token, rank, rank_of):
    """
    The two tokens that byte-pair encoding joins last when it makes `token`. It starts from single
    bytes and joins the pair of the lowest rank first, and only pairs of a lower rank than `rank`.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        ranks = [rank_of.get(pair, rank) for pair in pairs]
        first = ranks.index(min(ranks))
        parts[first:first + 2] = [pairs[first]]
    return parts


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--source={argv[0]}"
    cfg = load_settings(ConvertConfig, argv)
    try:
        from safetensors.torch import save_file
    except ImportError:
        fail("this needs the package safetensors:  pip install safetensors")
    weights, folder = read_weights(cfg.source), Path(cfg.dest)
    if cfg.to == "hf":
        settings, state = to_hugging_face(weights)
    else:
        settings = {key: value for key, value in weights.items() if key != "model"}
        # safetensors keeps one of two tied weights
        state = {name: p for name, p in weights["model"].items() if name != "lm_head.weight"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        if names:
            fail(f"dest={cfg.dest!r} is not empty, it holds {', '.join(names[:5])}: name a new "
                 f"folder")
        spec = weights["tokenizer"]
        if cfg.to == "hf" and spec and spec["kind"] != "char":
            write_bpe_tokenizer(folder, Tokenizer(spec))
        state = {name: p.contiguous() for name, p in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        fail(f"dest={cfg.dest!r} cannot be written: {error.strerror or error}")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    run_script(main)
