"""
See it think: one HTML page that holds a trained model, runs it in the browser, and shows what each
token of a text gave to each prediction, exactly.

    python -m tools.explain --out_dir=out-demo --start="ROMEO:"
    python -m tools.explain --out_dir=out-demo --start=FILE:scene.txt --against=out-demo-gpt2

tools/explain.html is the page, with the model in JavaScript; here the weights are put into it. The
terminal gets the five tokens that gave most to what is expected after the prompt.
"""
import base64
import functools
import json
import math
import re
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

# So that python tools/explain.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, check_new, fail, replacing, run_script

# isort: split
import numpy as np
import torch

from model import ModelConfig, rotate
from nanodva.settings import PathName, check, load_settings
from nanodva.tokenizer import END_OF_TEXT, Tokenizer, same_tokenizer
from nanodva.weights import build_model, read_weights
from prepare_data import read_meta
from sample import encode_prompt, find_tokenizer, read_prompt

HERE = Path(__file__).parent
BLOCKS_OF_THE_PAGE = ("dva", "gpt2")
# What a reader calls the data sets that prepare_data.py knows
TITLES = {"plays_char": "Shakespeare's plays", "plays": "Shakespeare's plays",
          "shakespeare_char": "Tiny Shakespeare", "shakespeare": "Tiny Shakespeare"}
# Characters of the text that a page holds, to learn them: 0.5 MB of the page
LONGEST_TEXT = 10**6
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


# ---- contributions -----------------------------------------------------------------------------

def hold(model):
    """
    Make the gradient treat attention weights, gates and the norms' scales as constants: the model
    computes what it always does, but is linear for the gradient. What a block does that the page
    does not know cannot be held. Returns the list to which each pass adds the inputs that come from
    tokens: embeddings (B, T, C) and rows of banks (B, T, M).
    """
    inputs = []

    def entered(module, given, out):
        inputs.append(out.detach().requires_grad_())
        return inputs[-1]

    def normalized(module, given, out):
        x = given[0] - given[0].mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + module.eps).detach()
        return x * scale * module.weight + (0 if module.bias is None else module.bias)

    def multiplied(module, given, out):
        # RMSNorm and GELU multiply each channel by a number, which is held
        return given[0] * torch.where(given[0] == 0, 0, out / given[0]).detach()

    def held(module, given, out):
        return out.detach()

    hooks = {"wte": entered, "bank": entered}
    if model.config.block in BLOCKS_OF_THE_PAGE:
        hooks |= dict(norm=multiplied, gelu=multiplied, ln_1=normalized, ln_2=normalized,
                      ln_f=normalized, c_q=held, c_k=held, c_gate=held)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in hooks:
            module.register_forward_hook(hooks[name.rpartition(".")[2]])
    return inputs


def parts_of(model, ids, token):
    """
    (parts (T), logit) of the logit that the model gives to `token` after the T token ids `ids`: one
    backward pass says what each of them contributed. Positions and biases contributed the rest; in
    a block that the page does not know, so did what gradient times input does not see.
    """
    inputs = hold(model)
    logit = model(torch.tensor([ids]))[0, -1, token]
    gradients = zip(inputs, torch.autograd.grad(logit, inputs), strict=True)
    parts = [(x * gradient)[0].sum(dim=-1) for x, gradient in gradients]
    return sum(parts).detach(), logit.item()


def attention_weights(model, ids):
    """For each attention layer of model.py's kind a list of heads: the last position's weights."""
    found = []

    def record(attn, mix, q, k, *rest):
        heads = [x.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for x in (q, k)]
        if rest[1] is not None:
            heads = rotate(torch.stack(heads), rest[1])
        scores = heads[0][:, :, -1:] @ heads[1].mT / math.sqrt(heads[0].size(-1))  # (1, H, 1, T)
        found.append(scores.softmax(dim=-1)[0, :, 0].tolist())
        return mix(q, k, *rest)

    for attn in model.attentions():
        attn.mix = functools.partial(record, attn, attn.mix)
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


def print_parts(model, ids, tokenizer):
    """Print what the model expects after the ids, and the five tokens that contributed most."""
    def shown(ids):
        return json.dumps(tokenizer.decode(ids).decode(errors="replace"), ensure_ascii=False)

    with torch.no_grad():
        token = model(torch.tensor([ids]))[0, -1, :tokenizer.vocab_size].argmax().item()
    parts, logit = parts_of(model, ids, token)
    print(f"after {shown(ids[-20:])} it expects {shown([token])} most. The largest parts of this "
          f"token's logit, {logit:.3f}, came from")
    for j in parts.abs().topk(min(5, len(parts))).indices.tolist():
        before = shown(ids[max(0, j - 8):j]) if j else "nothing"
        print(f"  {parts[j]:+8.3f}  {shown([ids[j]])}  (token {j + 1}, after {before})")
    rest = "all positions and biases together"
    if model.config.block not in BLOCKS_OF_THE_PAGE:
        rest = "the rest: these parts are gradient times input, which need not add up to the logit"
    print(f"  {logit - parts.sum():+8.3f}  {rest}")


# ---- the page ----------------------------------------------------------------------------------

def load(source, cfg):
    """(model, tokenizer, the text's name) of what read_weights takes, if a page can hold it."""
    weights = read_weights(Path(source))
    model = build_model(ModelConfig(**weights["model_config"]), weights).eval().float()
    if cfg.against and model.config.block not in BLOCKS_OF_THE_PAGE:
        fail(f"block={model.config.block!r}: the page compares {' and '.join(BLOCKS_OF_THE_PAGE)}; "
             f"leave out --against, or add this one to class Model in tools/read.js and to "
             f"BLOCKS_OF_THE_PAGE")
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


def resolved(config):
    """The settings of a ModelConfig as the page takes them, with nothing left to conclude."""
    rotary = config.is_rotary if config.has_learned_positions else "only"
    return asdict(config) | {"rotary": rotary, "value_dim": config.value_width}


def stored(name, model, dataset, rows, passage):
    """
    A model as the page takes it, with the logits after a window of ids, for it to compare. It was
    not trained on the passage, a text.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (model.config.block_size,), generator=generator)
    with torch.no_grad():
        logits = model(ids[None])[0, -1, :64]
    numbers = b"".join(p.detach().numpy().astype("<f2").tobytes() for p in model.parameters())
    return {"name": name, "dataset": TITLES.get(dataset, dataset), "config": resolved(model.config),
            "passage": passage,
            "parameters": [(path, p.numel()) for path, p in model.named_parameters()],
            "numbers": base64.b64encode(numbers).decode(),
            "check": {"ids": ids.tolist(), "logits": logits.tolist()}}


def recorded(model, ids, tokenizer, cfg):
    """What Python computes for the page of a block that the page does not know."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1, :tokenizer.vocab_size]
    probs, likely = logits.softmax(dim=-1), []
    for token in logits.topk(min(10, len(logits))).indices.tolist():
        # A new copy, without the hooks of the last one
        parts, logit = parts_of(load(cfg.out_dir, cfg)[0], ids, token)
        likely.append(dict(id=token, prob=probs[token].item(), logit=logit, parts=parts.tolist()))
    return {"block": model.config.block, "ids": ids, "likely": likely,
            "weights": attention_weights(load(cfg.out_dir, cfg)[0], ids)}


def texts(dataset, size, cfg):
    """
    (unseen, passage, library) of a data set: 3,000 tokens of its validation split, from a paragraph
    on; the first `size` of them; and a text for the page to learn, the start of its training split,
    deflated. All are empty without the data set.
    """
    folder = Path(cfg.data_dir, dataset)
    try:
        meta = read_meta(folder)
    except UserError:
        print(f"no data set in {folder}: the page comes without a passage to be tested on and "
              f"without a text to learn; paste your own")
        return "", "", b""
    tokenizer = Tokenizer(meta["tokenizer"])

    def documents(split, count):
        """The texts of a split's first `count` tokens, without the end-of-text between them."""
        ids = np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"], count=count).tolist()
        text = tokenizer.decode(ids).decode(errors="ignore")
        # Characters have no such token
        return [text] if tokenizer.end_of_text is None else text.split(END_OF_TEXT)

    # The page has no end-of-text, so the passage is of one document
    longest = max(documents("val", 8000), key=len)
    rest = longest.partition("\n\n")[2]
    ids = tokenizer.encode(rest if len(rest) > len(longest) / 2 else longest)
    parts = [tokenizer.decode(ids[:count]).decode(errors="ignore") for count in (3000, size)]
    library = "\n".join(documents("train", LONGEST_TEXT))[:LONGEST_TEXT]
    return *parts, zlib.compress(library.encode(), 9)


def main(argv=None):
    cfg = load_settings(ExplainConfig, argv)
    runs = {name: load(name, cfg) for name in (cfg.out_dir, cfg.against) if name}
    model, tokenizer, dataset = runs[cfg.out_dir]
    if not all(same_tokenizer(other.spec, tokenizer.spec) for _, other, _ in runs.values()):
        fail(f"against={cfg.against}: its tokens are not those of {cfg.out_dir}, so the two cannot "
             f"be compared on one text")
    is_known = model.config.block in BLOCKS_OF_THE_PAGE
    start = read_prompt(cfg.start, tokenizer)
    ids, size = encode_prompt(start, tokenizer), model.config.block_size
    if len(ids) > size:
        print(f"the prompt has {len(ids)} tokens: the model reads the newest {size}")
    added = cfg.max_new_tokens
    if added == -1:
        added = 0 if cfg.start == "-" or cfg.start.startswith("FILE:") else 120
    tokens = tokenizer.spec.get("alphabet") or [
        tokenizer.decode([i]).decode("latin-1") for i in range(tokenizer.vocab_size - 1)]
    window = min(model.config.block_size for model, _, _ in runs.values())
    unseen, passage, library = texts(dataset, min(256, window), cfg)
    names = list(runs) if cfg.against else ["The model"]
    data = {"models": [stored(name, model, of, tokenizer.vocab_size,
                              passage if of == dataset else "")
                       for name, (model, _, of) in zip(names, runs.values(), strict=True)
                       if is_known],
            "recorded": None if is_known else recorded(model, ids[-size:], tokenizer, cfg),
            "kind": tokenizer.spec["kind"], "tokens": list(tokens), "size": tokenizer.vocab_size,
            "start": start, "write": added, "temperature": cfg.temperature, "seed": cfg.seed,
            "foot": cfg.note, "unseen": unseen, "passage": passage,
            "title": TITLES.get(dataset, dataset),
            "kernels": [base64.b64encode((HERE / f"{name}.wasm").read_bytes()).decode()
                        for name in ("kernel_relaxed", "kernel")]}
    # No text in the data can end the script element that holds it
    parts = {"DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
             "LIBRARY": base64.b64encode(library).decode(),
             **{path.stem.upper(): path.read_text(encoding="utf-8")
                for path in HERE.glob("*.js")}}
    template = (HERE / "explain.html").read_text(encoding="utf-8")
    page = re.sub(r"{{([A-Z]+)}}", lambda found: parts[found[1]], template)
    folder = cfg.out_dir if Path(cfg.out_dir).is_dir() else ""
    dest = Path(cfg.dest or Path(folder, "explain.html"))
    check_new("dest", dest, ".html")
    with replacing(dest) as file:
        file.write(page.encode())
    print_parts(model, ids[-size:], tokenizer)
    print(f"open in a browser: {dest} ({dest.stat().st_size / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run_script(main)
