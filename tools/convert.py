"""
Weights out: a run of ours, or anything else that --init_from takes, as a folder that other programs read.

    python -m tools.convert out-gpt2 --to=hf --dest=gpt2-hf                for transformers' AutoModelForCausalLM
    python -m tools.convert out-demo --to=safetensors --dest=demo-plain    plain weights and config.json, any block

Either folder also goes back in: --init_from=FOLDER.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import read_weights
from config import check, fail, load
from model import ModelConfig
from prepare_data import Tokenizer


@dataclass
class ConvertConfig:
    source: str = ""         # what to convert, the first argument: a run's folder, or what else --init_from takes
    to: str = "hf"           # hf: transformers' GPT-2; safetensors: the weights under their own names
    dest: str = ""           # folder to write, new or empty

    def __post_init__(self):
        check(self, choices=dict(to=["hf", "safetensors"]))
        if not self.source or not self.dest:
            raise ValueError("say what goes where:  python -m tools.convert OUT_DIR --to=hf --dest=FOLDER")


def to_hugging_face(weights):
    """(config.json, state dict) of transformers' GPT2LMHeadModel. Exits with one line for what GPT-2 cannot express."""
    model, spec = ModelConfig(**weights["model_config"]), weights["tokenizer"]
    for name in ("block", "bank_layers", "shift", "rotary"):
        if getattr(model, name) not in ("gpt2", 0, "auto"):
            fail(f"{name}={getattr(model, name)!r} cannot go to hf: transformers' GPT-2 has no such layers, and would "
                 f"compute something else; use --to=safetensors")
    rows = model.num_tokens or (Tokenizer(spec).vocab_size if spec else model.vocab_size)
    state = {}
    for name, p in weights["model"].items():
        if name == "lm_head.weight":                                   # tied
            continue
        state[name] = p.T if name.startswith("transformer.h.") and p.dim() == 2 else p         # Conv1D keeps (in, out)
        if name.endswith(".weight") and not name.startswith("transformer.w"):                  # all but wte, wpe have a bias
            state.setdefault(name.replace(".weight", ".bias"), torch.zeros(p.size(0)))
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:rows]       # padded rows would compete there
    end = 50256 if spec == {"kind": "gpt2"} else None
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": rows,
            "n_positions": model.block_size, "n_embd": model.n_embd, "n_layer": model.n_layer, "n_head": model.n_head,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu", "tie_word_embeddings": True,
            "bos_token_id": end, "eos_token_id": end, "nanodva_tokenizer": spec}, state


def write_gpt2_tokenizer(folder, tokenizer):
    """vocab.json and merges.txt, as AutoTokenizer wants them: the merges follow from the order of the tokens."""
    tokens = [tokenizer.bpe.decode_single_token_bytes(i) for i in range(tokenizer.end_of_text)]
    # A byte is written as the character of its number, those that don't print as the ones from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    rank = {token: i for i, token in enumerate(tokens)}
    text = ["".join(letter[byte] for byte in token) for token in tokens]
    merges = []
    for i, token in enumerate(tokens[256:], 256):
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:                                          # as BPE does, the earliest pair first
            _, j = min((rank.get(parts[j] + parts[j + 1], i), j) for j in range(len(parts) - 1))
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        merges.append(" ".join(text[rank[part]] for part in parts))
    vocabulary = {word: i for i, word in enumerate(text)} | {"<|endoftext|>": tokenizer.end_of_text}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | special))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = load(ConvertConfig, [f"--source={a}" if not a.startswith("-") and i == 0 else a for i, a in enumerate(argv)])
    try:
        from safetensors.torch import save_file
    except ImportError:
        fail("this needs the package safetensors:  pip install safetensors")
    weights, folder = read_weights(cfg.source), Path(cfg.dest)
    if cfg.to == "hf":
        config, state = to_hugging_face(weights)
    else:
        config = {key: value for key, value in weights.items() if key != "model"}
        state = {name: p for name, p in weights["model"].items() if name != "lm_head.weight"}         # tied
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if there := sorted(path.name for path in folder.iterdir()):
            fail(f"dest={cfg.dest!r} is not empty, it holds {', '.join(there[:5])}: name a new folder")
        if cfg.to == "hf" and weights["tokenizer"] == {"kind": "gpt2"}:
            write_gpt2_tokenizer(folder, Tokenizer(weights["tokenizer"]))
        save_file({name: p.contiguous() for name, p in state.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    except OSError as error:
        fail(f"dest={cfg.dest!r} cannot be written: {error.strerror or error}")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
