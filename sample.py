"""
Sample text from a trained model, streamed as it is made. A checkpoint is enough: its tokenizer is inside.

    python sample.py --out_dir=out-demo --start="ROMEO:"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=3 --temperature=0.8
"""
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from config import check, fail, load
from model import GPT, ModelConfig
from prepare_data import Tokenizer
from train import load_checkpoint, pick_device, pick_dtype


@dataclass
class SampleConfig:
    init_from: str = "resume"       # resume: the checkpoint in out_dir
    out_dir: str = "out"            # the run's folder: its best.pt, or else last.pt
    start: str = "\n"               # prompt, or FILE:prompt.txt
    num_samples: int = 10           # how many texts
    max_new_tokens: int = 500       # tokens in each
    temperature: float = 0.8        # 1: as the model says; lower: safer; 0: always the likeliest token
    top_k: int = 200                # draw from the k likeliest tokens only; 0: from all
    stop_token: int = -1            # token id that ends a text; -1: none
    seed: int = 1337                # the same seed gives the same text
    device: str = "auto"            # auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # auto, float32, bfloat16, float16
    compile: bool | str = "auto"    # True: compile the model first; auto: don't

    def __post_init__(self):
        check(self, least=dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0, stop_token=-1, seed=0),
              choices=dict(init_from=["resume"], dtype=["auto", "float32", "bfloat16", "float16"], compile=[True, False, "auto"]))


def read_prompt(start):
    """The prompt's text: start itself, or the contents of FILE:path."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read the prompt {start.removeprefix('FILE:')}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"the prompt {start.removeprefix('FILE:')} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}")


def main(argv=None):
    cfg = load(SampleConfig, argv)
    device = pick_device(cfg.device)
    best, last = Path(cfg.out_dir, "best.pt"), Path(cfg.out_dir, "last.pt")
    checkpoint = load_checkpoint(best if best.exists() else last)
    model = GPT(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    model.eval().to(device)
    if cfg.compile is True:
        model.compile()
    dtype = pick_dtype(cfg.dtype, device, model.config.n_embd)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    tokenizer = Tokenizer(checkpoint["tokenizer"])
    prompt = read_prompt(cfg.start)
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        fail(error)
    if not ids:
        fail("start is empty: give at least one character, or leave it out for a new line")
    torch.manual_seed(cfg.seed)
    idx = torch.tensor([ids], device=device)                           # (1, T)
    try:
        for _ in range(cfg.num_samples):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
            print(prompt, end="", flush=True)
            with autocast:
                for new in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.stop_token,
                                        num_tokens=tokenizer.vocab_size):
                    print(decoder.decode(tokenizer.decode(new[0].tolist())), end="", flush=True)
            print("\n---------------", flush=True)
    except KeyboardInterrupt:
        print()
        raise SystemExit(130)


if __name__ == "__main__":
    main()
