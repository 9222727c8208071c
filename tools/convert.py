"""
Weights out: a run of ours, or another folder that --init_from takes, for other programs.

    python -m tools.convert out-gpt2 --to=hf --dest=gpt2-hf                for transformers
    python -m tools.convert out-demo --to=safetensors --dest=demo-plain    weights alone

The first writes a folder for transformers, with the tokenizer: plain GPT-2 if the model is one,
otherwise with model.py, for trust_remote_code=True. The second writes the weights under their own
names, and config.json. --init_from=FOLDER reads both. ONNX takes three lines: docs/interop.md.
"""
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# So that python tools/convert.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import fail, run_script

# isort: split
import torch

from model import ModelConfig
from nanodva.settings import PathName, check, load_settings
from nanodva.tokenizer import Tokenizer, write_tokenizer
from nanodva.weights import read_weights

ROOT = Path(__file__).parents[1]


@dataclass
class ConvertConfig:
    source: PathName = ""    # the first argument: a run's folder, or another that --init_from takes
    to: str = "hf"           # hf: for transformers; safetensors: weights under their own names
    dest: PathName = ""      # folder to write, new or empty

    def __post_init__(self):
        check(self, choices=dict(to=["hf", "safetensors"]))
        if not self.source or not self.dest:
            fail("say what goes where:  python -m tools.convert OUT_DIR --to=hf --dest=FOLDER")


def to_gpt2(model, state, spec):
    """
    (settings, state dict) of transformers' GPT2LMHeadModel for those of a plain GPT-2: a
    ModelConfig, a state dict and the spec of its tokenizer.
    """
    ours, state = dict(state), {}
    for name in [name for name in ours if ".attn.c_q." in name]:
        # GPT-2 has W_q, W_k and W_v in one matrix
        parts = [ours.pop(name.replace("c_q", f"c_{part}")) for part in "qkv"]
        ours[name.replace("c_q", "c_attn")] = torch.cat(parts)
    for name, p in ours.items():
        # transformers' Conv1D keeps its matrices as (in, out)
        is_conv1d = name.startswith("transformer.h.") and p.dim() == 2
        state[name] = p.T if is_conv1d else p
        is_embedding = name in ("transformer.wte.weight", "transformer.wpe.weight")
        if name.endswith(".weight") and not is_embedding:
            # In transformers everything has a bias. If ours has one, it replaces this later.
            bias = name.removesuffix("weight") + "bias"
            state.setdefault(bias, torch.zeros(p.size(0)))
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": model.block_size,
        "n_embd": model.n_embd, "n_layer": model.n_layer, "n_head": model.n_head,
        "layer_norm_epsilon": 1e-5, "nanodva_tokenizer": spec,
        # As in our own class: transformers would train it with 0.1
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu"}, state


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--source={argv[0]}"
    cfg = load_settings(ConvertConfig, argv)
    try:
        from safetensors.torch import save_file
    except ImportError:
        fail("this needs the package safetensors:  pip install safetensors")
    weights, folder, code = read_weights(Path(cfg.source)), Path(cfg.dest), []
    if weights["assumed"]:
        print(weights["assumed"])
    model, spec, state = weights["model_config"], weights["tokenizer"], weights["model"]
    if spec and spec["kind"] == "gpt2" and cfg.to == "hf":
        # Its 0.6 MB of tokens get files of their own
        spec = {"kind": "gpt2"}
    tokenizer = Tokenizer(weights["tokenizer"]) if spec and cfg.to == "hf" else None
    # safetensors keeps one of two tied weights
    del state["lm_head.weight"]
    settings = {"model_config": model, "tokenizer": spec}
    if cfg.to == "hf":
        if tokenizer:
            # Padded rows are no tokens, but transformers would sample them
            model["vocab_size"] = tokenizer.vocab_size
            state = {name: p[:tokenizer.vocab_size] if name.endswith((".wte.weight", ".bank.table"))
                     else p for name, p in state.items()}
        config = ModelConfig(**model)
        if (config.block, config.bank_layers, config.is_rotary) == ("gpt2", 0, False):
            settings, state = to_gpt2(config, state, spec)
        else:
            # transformers has no class for it: the folder gets model.py and a class that calls it
            code = ["model.py", "tools/modeling_nanodva.py"]
            calls = "modeling_nanodva.NanoDVA"
            settings |= {
                "model_type": "nanodva", "architectures": ["NanoDVAForCausalLM"],
                "auto_map": {"AutoConfig": f"{calls}Config", "AutoModel": f"{calls}Model",
                             "AutoModelForCausalLM": f"{calls}ForCausalLM"}}
            state = {f"gpt.{name}": p for name, p in state.items()}
        if tokenizer and tokenizer.bpe is None:
            code.append("tools/tokenization_nanodva.py")
        end = tokenizer.end_of_text if tokenizer else None
        settings |= {"vocab_size": config.vocab_size, "tie_word_embeddings": True,
                     "bos_token_id": end, "eos_token_id": end}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        if names:
            fail(f"dest={cfg.dest!r} is not empty, it holds {', '.join(names[:5])}: name a new "
                 f"folder")
        if tokenizer:
            write_tokenizer(folder, tokenizer, config.block_size)
        for path in code:
            shutil.copy(ROOT / path, folder)
        state = {name: p.contiguous() for name, p in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
        # safetensors 0.8 writes a file that only its owner can read
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
    except OSError as error:
        fail(f"dest={cfg.dest!r} cannot be written: {error.strerror or error}")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    run_script(main)
