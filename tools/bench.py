"""
Time training steps and sampling at any size, and see where a step's time goes.

    python -m tools.bench                                         GPT-2's 124M shape, batch 1
    python -m tools.bench --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
    python -m tools.bench --what=train,sample --contenders=gpt2,dva:qk_dim=768,dva+bank
    python -m tools.bench --what=profile --contenders=gpt2,dva    operations, the slowest first
    python -m tools.bench --what=transformers                     sampling, in turn with theirs

A contender is a block, perhaps with +bank (a bank in the last third of its layers) and settings of
train.py: dva+bank:dtype=float32:compile=True. Times of steps are medians, ratios are to the first
contender. On a CPU, whose speed drifts, contenders take turns step by step; on a GPU each runs
alone, and its row has its peak memory. docs/speed.md has the figures so far.
"""
import gc
import importlib.util
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# So that python tools/bench.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import fail, run_script

# isort: split
import torch
from torch.nn.utils import clip_grad_norm_
from torch.profiler import profile
from tqdm import tqdm

from model import Cache, ModelConfig, stream
from nanodva.machine import DTYPES, autocast, naming_memory, pick_compile, pick_device, pick_dtype
from nanodva.optimizers import build_optimizer
from nanodva.settings import build, change, check, read_settings
from nanodva.weights import build_model, outline
from tools.report import markdown
from train import TrainConfig

# Steps before the timed ones, in which memory is found and kernels are compiled
WARM_UP = 2


@dataclass
class BenchConfig(ModelConfig):
    contenders: str = "gpt2,dva:qk_dim=768,dva,gpt2+bank,dva+bank"   # the first is the reference
    what: str = "train,sample"               # some of train, sample, profile, transformers
    batch_size: int = 1                      # sequences per micro-batch
    gradient_accumulation_steps: int = 1     # micro-batches per step
    optimizer: str = "adamw"                 # adamw or muon
    dtype: str = "auto"                      # auto, float32, bfloat16, float16
    compile: bool = False                    # use torch.compile
    rounds: int = 5                          # timed steps of each, after two to warm up
    max_new_tokens: int = 512                # sampled in a timing
    num_samples: int = 8                     # texts in a batch, in addition to one alone
    device: str = "auto"                     # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(batch_size=1, gradient_accumulation_steps=1, rounds=1,
                               max_new_tokens=2, num_samples=1),
              choices=dict(optimizer=["adamw", "muon"], dtype=["auto", *DTYPES]))
        if not set(self.what.split(",")) <= PARTS.keys():
            fail(f"what={self.what!r}: name one or more of {', '.join(PARTS)} with commas between")


# ---- contenders --------------------------------------------------------------------------------

def contender(text, settings):
    """
    The TrainConfig of a contender such as 'dva+bank:qk_dim=32': its own settings, else those of
    the dict `settings`. Raises UserError for a contender that cannot be.
    """
    name, *pairs = text.split(":")
    block, plus, bank = name.partition("+")
    if plus and bank != "bank":
        fail(f"contender {text!r}: only bank can follow the +")
    if not all("=" in pair for pair in pairs):
        fail(f"contender {text!r}: it is a block, then +bank or nothing, then :setting=value as "
             f"often as you like")
    own = read_settings(TrainConfig, [f"--{pair}" for pair in pairs], without=("block",))
    if "auto" in (own.get("dtype"), own.get("compile")):
        fail(f"contender {text!r}: say outright which dtype, and whether to compile")
    cfg = build(TrainConfig, settings | own | {"block": block})
    if plus and "bank_layers" not in own:
        cfg = change(cfg, bank_layers=cfg.n_layer - 2 * cfg.n_layer // 3)
    outline(cfg)
    return cfg


# ---- timing ------------------------------------------------------------------------------------

def timed(device, function, *arguments):
    """Milliseconds that function(*arguments) takes."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else (lambda device: None)
    wait(device)
    start = time.perf_counter()
    function(*arguments)
    wait(device)
    return (time.perf_counter() - start) * 1e3


def peak_memory(device):
    """{"peak MB": the most memory that tensors held since the last call}; empty but on CUDA."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak MB": round(peak / 1e6)}


def release():
    """Free the memory of models and kernels that are no longer used."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def compile_or_fail():
    """
    Let torch.compile fail instead of giving up without a word once it has seen eight versions of a
    function: GPT.forward has some for every model. These are the names that torch 2.6 has, too.
    """
    torch._dynamo.config.cache_size_limit = 1000
    torch._dynamo.config.accumulated_cache_size_limit = 10000
    torch._dynamo.config.fail_on_cache_limit_hit = True


def machine_name(device):
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def training_step(cfg, device):
    """A function that does one step of training as train.py, on the same tokens: its loss."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")                         # TF32 on CUDA
    model = build_model(cfg).to(device)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    forward = torch.compile(model, dynamic=False) if cfg.compile else model
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()     # (B, T)

    def step():
        for _ in range(cfg.gradient_accumulation_steps):
            with autocast(device, cfg.dtype):
                loss = forward(x, y)
            scaler.scale(loss / cfg.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        scaler.update()
        model.zero_grad()
        return loss.item()

    return step


# ---- the parts: each yields rows {heading: value} ----------------------------------------------

def bench_training(contenders, cfg, device):
    """Step times, one row for each contender: in turn, but on a GPU one after another."""
    first_ms = None
    groups = [[name] for name in contenders] if device.type == "cuda" else [list(contenders)]
    peak_memory(device)
    for group in groups:
        steps = {name: training_step(contenders[name], device) for name in group}
        times = {name: [] for name in group}
        for _ in tqdm(range(WARM_UP + cfg.rounds), "timing", leave=False, delay=2, disable=None):
            for name in group:
                times[name].append(timed(device, steps[name]))
        del steps
        release()
        for name in group:
            entry, model = contenders[name], outline(contenders[name])
            ms, flops = statistics.median(times[name][WARM_UP:]), model.flops_per_token()
            first_ms = first_ms or ms
            tokens = entry.gradient_accumulation_steps * entry.batch_size * entry.block_size
            yield {"training": name, "dtype": entry.dtype, "compile": entry.compile,
                   "parameters": model.num_params(), "FLOPs per token": flops, "ms per step": ms,
                   "ratio to the first": ms / first_ms, "tokens/s": tokens / ms * 1e3,
                   "GFLOP/s": tokens * flops / ms / 1e6, **peak_memory(device)}


def bench_profile(contenders, cfg, device):
    """The ten operations, by torch's names for them, in which a training step spends most time."""
    time_of = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    for name, entry in contenders.items():
        step = training_step(entry, device)
        for _ in range(WARM_UP):
            step()
        with profile() as profiler:
            for _ in range(cfg.rounds):
                step()
        us = {event.key: getattr(event, time_of) for event in profiler.key_averages()}
        for operation in sorted(us, key=us.get, reverse=True)[:10]:
            yield {"profile": name, "dtype": entry.dtype, "operation": operation,
                   "ms per step": us[operation] / 1e3 / cfg.rounds,
                   "share": us[operation] / sum(us.values())}
        del step
        release()


def sample(model, count, length, **options):
    """Sample `count` texts of `length` tokens."""
    start = torch.zeros(count, 1, dtype=torch.long, device=model.lm_head.weight.device)
    list(stream(model, start, length, **options))


@torch.no_grad()
def bench_sampling(contenders, cfg, device):
    """
    Tokens per second for one text and for num_samples at once, and the bytes that the KV cache
    holds for each token, one row for each contender.
    """
    for name, entry in contenders.items():
        torch.manual_seed(0)
        # As sample.py does: the weights are cast once, and not at every token
        model = build_model(entry).to(device, getattr(torch, entry.dtype)).eval()
        length = min(cfg.max_new_tokens, entry.block_size)
        sample(model, 1, min(length, 8))                               # warms up
        one_ms = timed(device, sample, model, 1, length) / length
        many_ms = timed(device, sample, model, cfg.num_samples, length) / length
        cache = Cache(1)
        model(torch.zeros(1, 1, dtype=torch.long, device=device), cache=cache)
        held = [*cache.keys.values(), *cache.values.values(), cache.ids]
        yield {"sampling": name, "dtype": entry.dtype, "tokens/s": 1e3 / one_ms,
               f"tokens/s of {cfg.num_samples} texts": cfg.num_samples * 1e3 / many_ms,
               "cache bytes per token": sum(x.nbytes for x in held)}


@torch.no_grad()
def bench_transformers(contenders, cfg, device):
    """Tokens per second of GPT-2 and of transformers' model of its shape, greedily and in turn."""
    if not importlib.util.find_spec("transformers"):
        fail("what=transformers needs the package transformers:  pip install transformers")
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = {key: getattr(cfg, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=cfg.block_size, eos_token_id=None, **shape))
    ours, dtype = build_model(change(cfg, block="gpt2")), getattr(torch, cfg.dtype)
    ours, theirs = ours.to(device, dtype).eval(), theirs.to(device, dtype).eval()
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    length = min(cfg.max_new_tokens, cfg.block_size - 1)
    generate = partial(theirs.generate, start, attention_mask=torch.ones_like(start),
                       max_new_tokens=length, do_sample=False, pad_token_id=0)
    write = partial(sample, ours, 1, length, temperature=0)
    ms = [(timed(device, write), timed(device, generate)) for _ in range(cfg.rounds + 1)][1:]
    ours_ms, theirs_ms = (statistics.median(times) for times in zip(*ms, strict=True))
    yield {"sampling": "gpt2", "dtype": cfg.dtype, "tokens/s": length * 1e3 / ours_ms,
           "transformers' tokens/s": length * 1e3 / theirs_ms,
           "ratio of times": statistics.median(mine / other for mine, other in ms)}


PARTS = {"train": bench_training, "sample": bench_sampling, "profile": bench_profile,
         "transformers": bench_transformers}


# ---- what is printed and written ---------------------------------------------------------------

def readable(value):
    """A value as text: a number with four digits or more, and commas between thousands."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if type(value) in (int, float) else str(value)


def main(argv=None):
    cfg = build(BenchConfig, read_settings(BenchConfig, argv, without=("block",)))
    device = pick_device(cfg.device)
    compile_or_fail()
    cfg = change(cfg, dtype=pick_dtype(cfg.dtype, device, cfg.n_embd),
                 compile=pick_compile(cfg.compile, device, flops=0))
    contenders = {text: contender(text, asdict(cfg)) for text in cfg.contenders.split(",")}
    print(f"{machine_name(device)}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    for part in cfg.what.split(","):
        heading = True
        with naming_memory("choose a smaller shape, or a lower --batch_size or --num_samples"):
            for row in PARTS[part](contenders, cfg, device):
                row = {name: readable(value) for name, value in row.items()}
                lines = markdown([row]).splitlines()
                print("\n".join(["", *lines] if heading else lines[2:]), flush=True)
                heading = False


if __name__ == "__main__":
    run_script(main)
