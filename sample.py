"""
Sample text from a trained model: all texts together, the first before your eyes. A checkpoint is enough: its tokenizer is inside.

    python sample.py --out_dir=out-demo --start="ROMEO:"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=3 --temperature=0.8
    python sample.py --init_from=gpt2-xl --start=- --top_p=0.9 < prompt.txt
"""
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import read_weights
from config import check, fail, load
from model import GPT, ModelConfig
from prepare_data import Tokenizer, read_meta
from train import pick_device, pick_dtype


@dataclass
class SampleConfig:
    init_from: str = "resume"       # resume: the run in out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path
    out_dir: str = "out"            # the run's folder: its best.pt, or else last.pt, or nanoGPT's ckpt.pt
    dataset: str = ""               # whose alphabet nanoGPT's weights take; by default that of the set they name
    data_dir: str = "data"          # where data sets live
    start: str = "\n"               # prompt, or FILE:prompt.txt, or - for standard input; <|endoftext|>: GPT-2's token
    num_samples: int = 10           # how many texts
    max_new_tokens: int = 500       # tokens in each
    temperature: float = 0.8        # 1: as the model says; lower: safer; 0: always the likeliest token
    top_k: int = 200                # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0              # draw from the fewest likeliest tokens with this probability together; 1: from all
    stop_token: int = -1            # token id that ends a text; -1: none
    seed: int = 1337                # the same seed gives the same text
    device: str = "auto"            # auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # auto, float32, bfloat16, float16
    compile: bool | str = "auto"    # True: compile the model first; auto: don't

    def __post_init__(self):
        check(self, least=dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0, stop_token=-1, seed=0),
              choices=dict(dtype=["auto", "float32", "bfloat16", "float16"], compile=[True, False, "auto"]))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must be above 0 and at most 1")


def read_prompt(start):
    """The prompt's text: start itself, or the contents of FILE:path, or with - of standard input."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    try:
        if start == "-":
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
            return sys.stdin.read()
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read the prompt {name}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"the prompt {name} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}")


def find_tokenizer(weights, cfg):
    """The tokenizer that the weights bring; nanoGPT's for characters bring none, but their data set has it."""
    if weights["tokenizer"]:
        return Tokenizer(weights["tokenizer"])
    dataset, rows = cfg.dataset or weights.get("dataset"), weights["model_config"]["vocab_size"]
    if not dataset:
        fail("these weights do not say what their tokens are: name the data set they were trained on, --dataset=NAME")
    tokenizer = Tokenizer(read_meta(Path(cfg.data_dir, dataset))["tokenizer"])
    if tokenizer.vocab_size != rows:
        fail(f"{cfg.data_dir}/{dataset} has {tokenizer.vocab_size} tokens, the weights have {rows}: name the data set "
             f"they were trained on, --dataset=NAME")
    return tokenizer


def main(argv=None):
    cfg = load(SampleConfig, argv)
    device = pick_device(cfg.device)
    weights = read_weights(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from)
    model = GPT(ModelConfig(**weights["model_config"]))
    model.load_state_dict(weights["model"])
    model.eval().to(device)
    if cfg.compile is True:
        model.compile()
    # A token at a time a CPU has nothing to gain by casts: four texts of a small model took 3.7 s in float32, 5.5 s in bfloat16
    dtype = pick_dtype("float32" if (cfg.dtype, device.type) == ("auto", "cpu") else cfg.dtype, device, model.config.n_embd)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    tokenizer = find_tokenizer(weights, cfg)
    prompt = read_prompt(cfg.start)
    try:
        alone = prompt == "<|endoftext|>" and tokenizer.end_of_text
        ids = [tokenizer.end_of_text] if alone else tokenizer.encode(prompt)
    except ValueError as error:
        fail(error)
    if not ids:
        fail("start is empty: give at least one character, or leave it out for a new line")
    torch.manual_seed(cfg.seed)
    idx = torch.tensor([ids] * cfg.num_samples, device=device)         # (B, T): all texts are made together
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in idx]                   # a token may end inside a character
    texts, stopped = ["" for _ in idx], 0
    try:
        print(prompt, end="", flush=True)
        with autocast:
            for new in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.stop_token,
                                    tokenizer.vocab_size, cfg.top_p):
                for row, (token,) in enumerate(new.tolist()):
                    if decoders[row]:
                        text = decoders[row].decode(tokenizer.decode([token]))
                        texts[row] += text
                        if row == 0:
                            print(text, end="", flush=True)
                    if token == cfg.stop_token:
                        decoders[row] = None                           # this text ends here, others may go on
    except KeyboardInterrupt:
        stopped = 130
    print("\n---------------", *(f"{prompt}{text}\n---------------" for text in texts[1:]), sep="\n", flush=True)
    if stopped:
        raise SystemExit(stopped)


if __name__ == "__main__":
    main()
