"""
See it think: one HTML page that holds a trained model, runs it in the browser, and shows what each
token of a text gave to each prediction, exactly.

    python -m tools.explain --out_dir=out-demo --start="ROMEO:"
    python -m tools.explain --out_dir=out-demo --start=FILE:scene.txt --against=out-demo-gpt2

tools/explain.html is the page, with the model in JavaScript; here the weights are put into it. The
terminal gets the five tokens that gave most to what is expected after the prompt.
"""
import base64
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# So that python tools/explain.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, check_new, fail, replacing, run_script

# isort: split
import numpy as np
import torch

from model import ModelConfig
from nanodva.settings import PathName, check, load_settings
from nanodva.tokenizer import Tokenizer, same_tokenizer
from nanodva.weights import build_model, read_weights
from prepare_data import read_meta
from sample import encode_prompt, find_tokenizer, read_prompt

BLOCKS_OF_THE_PAGE = ("dva", "gpt2")
# A browser multiplies some 1e9 numbers a second
MOST_PARAMETERS = 2**23


@dataclass
class ExplainConfig:
    out_dir: PathName = "out"       # the run's folder, or what else sample.py's init_from takes
    against: PathName = ""          # another run, to see which of the two expected each token
    start: str = "\n"               # prompt, FILE:text.txt, or - for standard input
    max_new_tokens: int = -1        # written when the page opens; -1: 120 to a prompt, 0 to a file
    temperature: float = 0.8        # 1: as the model says; lower: safer; 0: the most probable
    seed: int = 1337                # the same seed gives the same text
    note: str = ""                  # a sentence of yours for the page's last line
    dest: PathName = ""             # file to write; by default explain.html in out_dir
    dataset: str = ""               # where the passage is from, and nanoGPT's alphabet
    data_dir: PathName = "data"     # where data sets live

    def __post_init__(self):
        check(self, least=dict(max_new_tokens=-1, temperature=0, seed=0))


# ---- who gave it -------------------------------------------------------------------------------

def hold(model):
    """
    Make the gradient take strengths, gates and the norms' scales for constants: the model computes
    what it always does, and is linear for the gradient. Returns the list to which each pass adds
    what the tokens put into the network: embeddings (B, T, C) and rows of banks (B, T, M).
    """
    put_in = []

    def entered(module, given, out):
        put_in.append(out.detach().requires_grad_())
        return put_in[-1]

    def normalized(module, given, out):
        x = given[0] - given[0].mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + module.eps).detach()
        return x * scale * module.weight + (0 if module.bias is None else module.bias)

    def multiplied(module, given, out):
        # RMSNorm and GELU multiply each channel by a number, which is held
        return given[0] * torch.where(given[0] == 0, 0, out / given[0]).detach()

    def values_only(module, given, out):
        C = given[0].size(-1)
        return torch.cat((out[..., :2 * C].detach(), out[..., 2 * C:]), dim=-1)

    hooks = {"wte": entered, "bank": entered, "c_attn": values_only, "norm": multiplied,
             "gelu": multiplied, **dict.fromkeys(("ln_1", "ln_2", "ln_f"), normalized),
             **dict.fromkeys(("c_q", "c_k", "c_gate"), lambda module, given, out: out.detach())}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in hooks:
            module.register_forward_hook(hooks[name.rpartition(".")[2]])
    return put_in


def parts_of(model, ids, token):
    """
    (parts (T), logit) of the logit that the model gives to `token` after the T token ids `ids`: one
    backward pass says what each of them gave. Positions and biases gave the rest.
    """
    put_in = hold(model)
    logit = model(torch.tensor([ids]))[0][0, -1, token]
    gradients = zip(put_in, torch.autograd.grad(logit, put_in), strict=True)
    parts = [(x * gradient)[0].sum(dim=-1) for x, gradient in gradients]
    return sum(parts).detach(), logit.item()


def print_givers(model, ids, tokenizer):
    """Print what the model expects after the ids, and the five tokens that gave most to it."""
    def shown(ids):
        return json.dumps(tokenizer.decode(ids).decode(errors="replace"), ensure_ascii=False)

    with torch.no_grad():
        token = model(torch.tensor([ids]))[0][0, -1, :tokenizer.vocab_size].argmax().item()
    parts, logit = parts_of(model, ids, token)
    print(f"after {shown(ids[-20:])} it expects {shown([token])} most. The largest parts of this "
          f"token's logit, {logit:.3f}, came from")
    for j in parts.abs().topk(min(5, len(parts))).indices.tolist():
        before = shown(ids[max(0, j - 8):j]) if j else "nothing"
        print(f"  {parts[j]:+8.3f}  {shown([ids[j]])}  (token {j + 1}, after {before})")
    print(f"  {logit - parts.sum():+8.3f}  all positions and biases together")


# ---- the page ----------------------------------------------------------------------------------

def load(source, cfg):
    """(model, tokenizer, data set's name) of what read_weights takes, if a page can hold it."""
    weights = read_weights(Path(source))
    model = build_model(ModelConfig(**weights["model_config"]), weights).eval().float()
    if model.config.block not in BLOCKS_OF_THE_PAGE:
        fail(f"block={model.config.block!r}: the page can run {' and '.join(BLOCKS_OF_THE_PAGE)}; "
             f"add this one to class Model in tools/explain.html and to BLOCKS_OF_THE_PAGE")
    if model.num_params() > MOST_PARAMETERS:
        fail(f"{source} has {model.num_params() / 1e6:.1f} M parameters, and a page holds up to "
             f"{MOST_PARAMETERS / 1e6:.1f} M: train a smaller one, or sample.py's text must do")
    with torch.no_grad():
        for name, p in model.named_parameters():
            # The page stores 16 bits a weight, and what it computes with is computed with here, too
            p.copy_(p.half())
            if not p.isfinite().all():
                fail(f"{source}: {name} has numbers above 65504, too large for 16 bits: has its "
                     f"training diverged? Train with a lower learning rate")
    tokenizer = find_tokenizer(weights, cfg)
    if tokenizer.end_of_text not in (None, tokenizer.vocab_size - 1):
        fail(f"{source}: the page expects <|endoftext|> to be the last token, as GPT-2 has it, and "
             f"here it is number {tokenizer.end_of_text}")
    return model, tokenizer, cfg.dataset or weights["dataset"] or ""


def stored(name, model, dataset, ids):
    """A model as the page takes it, with the logits after some ids for the page to compare."""
    ids = ids[-min(16, model.config.block_size):]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, -1, :64]
    weights, C = {}, model.config.n_embd
    for path, p in model.named_parameters():
        # GPT-2 has W_q, W_k and W_v in one matrix
        parts = zip("qkv", p.split(C), strict=False) if "c_attn" in path else [("", p)]
        weights |= {path.replace("c_attn", f"c_{part}"): piece for part, piece in parts}
    numbers = b"".join(p.detach().numpy().astype("<f2").tobytes() for p in weights.values())
    return {"name": name, "config": asdict(model.config), "dataset": dataset,
            "parameters": [(path, p.numel()) for path, p in weights.items()],
            "numbers": base64.b64encode(numbers).decode(),
            "check": {"ids": ids, "logits": logits.tolist()}}


def passage(dataset, size, cfg):
    """`size` tokens of the data set's validation split, from a paragraph on; "" without it."""
    folder = Path(cfg.data_dir, dataset)
    try:
        meta = read_meta(folder)
    except UserError:
        print(f"no data set in {folder}: paste a passage that it was not trained on into the page")
        return ""
    tokenizer = Tokenizer(meta["tokenizer"])
    ids = np.fromfile(folder / "val.bin", dtype=meta["dtype"], count=8 * size).tolist()
    text = tokenizer.decode(ids).decode(errors="ignore")
    ids = tokenizer.encode(text.partition("\n\n")[2] or text)[:size]
    return tokenizer.decode(ids).decode(errors="ignore")


def main(argv=None):
    cfg = load_settings(ExplainConfig, argv)
    runs = {name: load(name, cfg) for name in (cfg.out_dir, cfg.against) if name}
    model, tokenizer, dataset = runs[cfg.out_dir]
    if not all(same_tokenizer(other.spec, tokenizer.spec) for _, other, _ in runs.values()):
        fail(f"against={cfg.against}: its tokens are not those of {cfg.out_dir}, so the two cannot "
             f"be compared on one text")
    start = read_prompt(cfg.start, tokenizer)
    ids = encode_prompt(start, tokenizer)
    added = cfg.max_new_tokens
    if added == -1:
        added = 0 if cfg.start == "-" or cfg.start.startswith("FILE:") else 120
    tokens = tokenizer.spec.get("alphabet") or [
        tokenizer.decode([i]).decode("latin-1") for i in range(tokenizer.vocab_size - 1)]
    window = min(model.config.block_size for model, _, _ in runs.values())
    data = {"models": [stored(name, model, of, ids) for name, (model, _, of) in runs.items()],
            "kind": tokenizer.spec["kind"], "tokens": tokens, "size": tokenizer.vocab_size,
            "start": start, "write": added, "temperature": cfg.temperature, "seed": cfg.seed,
            "foot": cfg.note, "passage": passage(dataset, min(256, window), cfg)}
    # No text in the data can end the script element that holds it
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    dest = Path(cfg.dest or Path(cfg.out_dir if Path(cfg.out_dir).is_dir() else "", "explain.html"))
    check_new("dest", dest, ".html")
    with replacing(dest) as file:
        template = Path(__file__).with_suffix(".html").read_bytes()
        file.write(template.replace(b"{{DATA}}", text.encode()))
    print_givers(model, ids[-model.config.block_size:], tokenizer)
    print(f"open in a browser: {dest} ({dest.stat().st_size / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run_script(main)
