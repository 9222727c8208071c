"""
Sample text from a checkpoint, which holds its tokenizer. The first text is printed while it is
sampled; the others, which the model samples at the same time, follow.

    python sample.py --out_dir=out-demo --start="ROMEO:"
    python sample.py --out_dir=out-demo --interactive       prompt after prompt; Ctrl-D ends
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=3 --temperature=0.8
    python sample.py --init_from=gpt2-xl --start=- --top_p=0.9 < prompt.txt
"""
import codecs
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, fail, naming_file, run_script

# isort: split
import torch

from model import ModelConfig, stream
from nanodva.dataset import read_meta
from nanodva.machine import DTYPES, naming_memory, pick_device, pick_sampling_dtype
from nanodva.readers import decode_text
from nanodva.settings import PathName, build, check, read_settings
from nanodva.tokenizer import Tokenizer
from nanodva.weights import build_model, read_weights

RULE = "---------------"


@dataclass
class SampleConfig:
    init_from: PathName = "resume"  # resume: the run in out_dir; or gpt2, gpt2-xl ..., or a path
    out_dir: PathName = "out"       # the run's folder, with best.pt, last.pt or ckpt.pt
    dataset: str = ""               # whose tokenizer to use, for weights that name none
    data_dir: PathName = "data"     # where data sets are
    start: str = "\n"               # prompt (\n ends a line), FILE:prompt.txt, or - for stdin
    interactive: bool = False       # each line of standard input is a prompt, until Ctrl-D
    num_samples: int = 10           # how many texts; with interactive 1 by default
    max_new_tokens: int = 500       # tokens in each
    temperature: float = 0.8        # 1: as the model says; lower: safer; 0: the most probable
    top_k: int = 200                # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0              # nucleus sampling: from the most probable share; 1: off
    stop: str = ""                  # a text that ends each sample, such as \n\n; empty: none
    stop_token: int = -1            # token id that ends a text; -1: none
    seed: int = 1337                # the same seed gives the same texts
    device: str = "auto"            # auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # auto, float32, bfloat16, float16
    compile: bool = False           # compile the model first

    def __post_init__(self):
        check(self, least=dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0,
                               stop_token=-1, seed=0),
              choices=dict(dtype=["auto", *DTYPES]))
        if not 0 < self.top_p <= 1:
            fail(f"top_p={self.top_p}: it must be above 0 and at most 1")
        if self.interactive and self.start != SampleConfig.start:
            fail("start: with --interactive prompts come from standard input; leave one out")


def read_prompt(start, tokenizer):
    """
    The prompt: start itself, the text of FILE:path, or standard input for -. If the alphabet lacks
    the default, a new line, it is a space or the alphabet's first character.
    """
    if start == "\n" and tokenizer.bpe is None:
        alphabet = tokenizer.spec["alphabet"]
        return next((c for c in "\n " if c in alphabet), alphabet[0])
    if start == "-":
        return decode_text(sys.stdin.buffer.read(), "the prompt standard input")
    if start.startswith("FILE:"):
        path = Path(os.path.expanduser(start.removeprefix("FILE:")))
        with naming_file("read the prompt", path, "name a text, as in --start=FILE:prompt.txt"):
            return decode_text(path.read_bytes(), f"the prompt {path}")
    return line_ends(start)


def read_lines(tokenizer):
    """Yield each line of standard input as a prompt. A terminal shows > before it."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal and importlib.util.find_spec("readline"):
        # Arrow keys for input()
        importlib.import_module("readline")
    # A byte that is not UTF-8 becomes a character that no alphabet has
    sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            return
        yield line_ends(line) or read_prompt(SampleConfig.start, tokenizer)


def line_ends(text):
    """The text with line ends for \\n, which a shell cannot easily write, but not in \\nabla."""
    return re.sub(r"\\n(?![A-Za-z])", "\n", text)


def find_tokenizer(weights, cfg):
    """The tokenizer of the weights or, if they do not name it, of --dataset or their data set."""
    spec, assumed = weights["tokenizer"], weights["assumed"]
    if spec and cfg.dataset and not assumed:
        fail(f"dataset={cfg.dataset!r}: these weights bring their own tokens; leave it out")
    if spec and not cfg.dataset:
        if assumed:
            print(assumed, file=sys.stderr)
        return Tokenizer(spec)
    dataset = cfg.dataset or weights["dataset"]
    if not dataset:
        fail("these weights do not say what their tokens are: name the data set that they were "
             "trained on, --dataset=NAME")
    tokenizer = Tokenizer(read_meta(Path(cfg.data_dir, dataset))["tokenizer"])
    rows = weights["model_config"]["vocab_size"]
    # nanoGPT's default table of 50304 rows serves any smaller vocabulary
    if tokenizer.vocab_size > rows or tokenizer.vocab_size < rows and not assumed:
        fail(f"{cfg.data_dir}/{dataset} has {tokenizer.vocab_size} tokens, and the weights have "
             f"{rows}: name the data set that they were trained on, --dataset=NAME")
    return tokenizer


def encode_prompt(prompt, tokenizer, block_size=None):
    """
    The prompt's token ids, at least one; <|endoftext|> alone is GPT-2's token of that name. Says if
    there are more than a window of block_size, of which the model reads the newest.
    """
    if prompt == "<|endoftext|>" and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    ids = tokenizer.encode(prompt)
    if not ids:
        fail("start is empty: give at least one character, or leave it out for a new line")
    if block_size and len(ids) > block_size:
        print(f"the prompt has {len(ids):,} tokens: the model reads the newest {block_size:,}, its "
              f"window", file=sys.stderr)
    return ids


def write(model, tokenizer, prompt, ids, cfg):
    """Print the prompt with each continuation of its ids, the first of them token by token."""
    count, stop = cfg.num_samples, line_ends(cfg.stop)
    idx = torch.tensor([ids] * count, device=model.lm_head.weight.device)          # (count, T)
    # A token may end inside a character, whose rest comes with the next one
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(count)]
    texts, ended = [prompt] * count, [False] * count
    print(prompt, end="", flush=True)
    try:
        for new in stream(model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                          cfg.stop_token, tokenizer.vocab_size):
            for row, (token,) in enumerate(new.tolist()):
                if ended[row]:
                    continue
                text = decoders[row].decode(tokenizer.decode([token]))
                place = (texts[row] + text).find(stop, len(prompt)) if stop else -1
                if place >= 0:
                    # The last token may hold more than the end of the stop text
                    text = text[:place + len(stop) - len(texts[row])]
                ended[row] = token == cfg.stop_token or place >= 0
                texts[row] += text
                if row == 0:
                    print(text, end="", flush=True)
            if all(ended):
                break
    except FloatingPointError as error:
        fail(error)
    finally:
        # After Ctrl-C, too: each text as far as it is written
        print("\n".join(["", RULE, *(f"{text}\n{RULE}" for text in texts[1:])]))


def main(argv=None):
    given = read_settings(SampleConfig, argv)
    cfg = build(SampleConfig, ({"num_samples": 1} if given.get("interactive") else {}) | given)
    device = pick_device(cfg.device)
    weights = read_weights(Path(cfg.out_dir) if cfg.init_from == "resume" else cfg.init_from)
    model = build_model(ModelConfig(**weights["model_config"]), weights).eval()
    dtype = pick_sampling_dtype(cfg.dtype, device, model.num_params())
    model.to(device, getattr(torch, dtype))
    if cfg.compile:
        model.compile()
    tokenizer = find_tokenizer(weights, cfg)
    if cfg.stop_token >= tokenizer.vocab_size:
        fail(f"stop_token={cfg.stop_token}: the last id is {tokenizer.vocab_size - 1}")

    torch.manual_seed(cfg.seed)
    for prompt in read_lines(tokenizer) if cfg.interactive else [read_prompt(cfg.start, tokenizer)]:
        try:
            ids = encode_prompt(prompt, tokenizer, model.config.block_size)
            with naming_memory(f"lower --num_samples={cfg.num_samples}"):
                write(model, tokenizer, prompt, ids, cfg)
        except (UserError, KeyboardInterrupt) as error:
            if not cfg.interactive:
                raise
            print(f"error: {error}" if str(error) else "stopped", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
