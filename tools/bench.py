"""
Time training steps, sampling, attention and data loading, at any size.

    python -m tools.bench                                         GPT-2's 124M shape, batch 1
    python -m tools.bench --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
    python -m tools.bench --what=train,sample --contenders=gpt2,dva:qk_dim=768,dva+bank
    python -m tools.bench --what=transformers --contenders=gpt2   sampling, beside transformers'
    python -m tools.bench --what=gpu --json=gpu.json              all that a GPU is asked for

A contender is a block, perhaps with +bank (a bank in the last third of its layers), perhaps with
settings of train.py: dva+bank:qk_dim=32:optimizer=muon. Figures are medians, and ratios are to the
first contender. On a CPU, whose speed drifts, contenders take turns step by step; on a GPU, whose
memory is short, each is gone before the next one comes.
"""
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

# So that python tools/bench.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from model import Cache, ModelConfig, explicit_attention, stream
from nanodva.errors import fail, run_script
from nanodva.machine import DTYPES, autocast, pick_device
from nanodva.optimizers import build_optimizers
from nanodva.settings import build, change, check, read_settings
from nanodva.weights import build_model
from train import get_batch

PARTS = ("train", "sample", "data", "attention", "transformers")
# The settings that a contender has from this tool, unless it names its own
SHARED = ("batch_size", "gradient_accumulation_steps", "optimizer")
# Steps before the timed ones, in which memory is found and kernels are compiled
WARM_UP = 2
# What --what=gpu runs: these parts, first at GPT-2's 124M shape, then at that of nanoGPT's preset
# for characters
GPU_PARTS = [dict(what="attention"), dict(what="sample,train", compiles="False"),
             dict(what="train", compiles="True")]
GPU_CONTENDERS = ("gpt2,gpt2:rotary=True,dva,dva:qk_dim={C},"
                  "gpt2+bank,gpt2+bank:rotary=True,dva+bank,dva+bank:qk_dim={C}")
GPU_SHAPES = [dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304,
                   batch_size=12, contenders=GPU_CONTENDERS.format(C=768)),
              dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65,
                   batch_size=64, contenders=GPU_CONTENDERS.format(C=384))]


@dataclass
class BenchConfig(ModelConfig):
    contenders: str = "gpt2,dva:qk_dim=768,dva,gpt2+bank,dva+bank"   # the first is the reference
    what: str = "train,sample,data"          # these, attention, transformers; or gpu alone
    batch_size: int = 1                      # sequences per micro-batch
    gradient_accumulation_steps: int = 1     # micro-batches per step
    optimizer: str = "adamw"                 # adamw or muon
    dtypes: str = "float32,bfloat16"         # types to time, with commas between
    compiles: str = "False,True"             # without torch.compile and with it
    rounds: int = 5                          # timed steps of each, after two to warm up
    max_new_tokens: int = 512                # sampled in a timing
    num_samples: int = 8                     # texts in a batch, beside one alone
    device: str = "auto"                     # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1
    json: str = ""                           # write all figures to this file

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(batch_size=1, gradient_accumulation_steps=1, rounds=1,
                               max_new_tokens=2, num_samples=1),
              choices=dict(optimizer=["adamw", "muon"]))
        lists = dict(what=[*PARTS, "gpu"], dtypes=DTYPES, compiles=["False", "True"])
        for name, options in lists.items():
            for part in getattr(self, name).split(","):
                if part not in options:
                    fail(f"{name}: {part!r} is none of {', '.join(options)}")
        if "gpu" in self.what and self.what != "gpu":
            fail(f"what={self.what!r}: gpu stands alone, it has parts of its own")


# ---- contenders --------------------------------------------------------------------------------

def own_settings(text):
    """The settings, as a dict, that a contender such as 'dva+bank:qk_dim=32' names for itself."""
    pairs = text.split(":")[1:]
    for pair in pairs:
        if "=" not in pair:
            fail(f"contender {text!r}: it is a block, then +bank or nothing, then :setting=value "
                 f"as often as you like")
    own = read_settings(train.TrainConfig, [f"--{pair}" for pair in pairs])
    if "block" in own:
        fail(f"contender {text!r}: its block stands in front, without 'block='")
    return dict(own)


def contender(text, settings):
    """
    The TrainConfig that 'dva+bank:qk_dim=32' stands for, with the dict `settings` where it says
    nothing. These are settings as they were given: in a finished ModelConfig the positions are
    already decided, for another block. Raises UserError where the text stands for none.
    """
    own = own_settings(text)
    block, plus, bank = text.partition(":")[0].partition("+")
    if plus and bank != "bank":
        fail(f"contender {text!r}: behind the + stands bank")
    settings = settings | own | {"block": block}
    if plus:
        n_layer = settings.get("n_layer", ModelConfig.n_layer)
        settings |= {"bank_layers": n_layer - 2 * n_layer // 3} | own
    cfg = build(train.TrainConfig, settings)
    # On the meta device a block says at no cost what it refuses
    with torch.device("meta"):
        build_model(cfg)
    return cfg


# ---- timing ------------------------------------------------------------------------------------

def timed(device, function, *arguments):
    """Milliseconds that function(*arguments) takes."""
    synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def compile_or_fail():
    """
    Let torch.compile fail where it would give up. It does so without a word once it has seen
    eight versions of a function, and GPT.forward has some for every model: what is called
    compiled would not be.
    """
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def machine_name(device):
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def training_step(cfg, device):
    """
    A function that does one step of training as train.py does it, always on the same tokens, and
    returns the loss.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")                         # TF32 on CUDA
    model = build_model(cfg).to(device)
    optimizers = build_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    forward = torch.compile(model, dynamic=False) if cfg.compile else model
    shape = (cfg.batch_size, cfg.block_size + 1)
    tokens = torch.randint(cfg.vocab_size, shape, device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()     # (B, T)

    def step():
        for _ in range(cfg.gradient_accumulation_steps):
            with autocast(device, cfg.dtype):
                _, loss = forward(x, y)
            scaler.scale(loss / cfg.gradient_accumulation_steps).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        scaler.update()
        model.zero_grad()
        return loss.item()

    return step


def time_steps(contenders, device, rounds):
    """
    {name: milliseconds of each of `rounds` training steps} of contenders {name: TrainConfig},
    whose dtype and compile are decided. Raises RuntimeError where one does not fit into memory.
    """
    compile_or_fail()
    if device.type != "cuda":
        return take_turns(contenders, device, rounds)
    times = {}
    for name, cfg in contenders.items():
        times |= take_turns({name: cfg}, device, rounds)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return times


def take_turns(contenders, device, rounds):
    """time_steps() with all contenders in memory together, step by step."""
    steps = {name: training_step(cfg, device) for name, cfg in contenders.items()}
    times = {name: [] for name in contenders}
    for turn in tqdm(range(WARM_UP + rounds), "timing", leave=False, delay=2, disable=None):
        for name, step in steps.items():
            ms = timed(device, step)
            if turn >= WARM_UP:
                times[name].append(round(ms, 4))
    return times


# ---- the parts ---------------------------------------------------------------------------------

def bench_training(contenders, cfg, device):
    """Rows of figures, one for each contender, dtype and way to run."""
    rows = []
    for dtype in cfg.dtypes.split(","):
        for compiled in cfg.compiles.split(","):
            group = {name: change(entry, dtype=dtype, compile=compiled == "True")
                     for name, entry in contenders.items()}
            times = time_steps(group, device, cfg.rounds)
            first_ms = statistics.median(next(iter(times.values())))
            for name, entry in group.items():
                rows.append(training_row(name, entry, times[name], first_ms))
    return rows


def training_row(name, entry, steps_ms, first_ms):
    """The figures of a contender whose steps took steps_ms; the first one's took first_ms."""
    with torch.device("meta"):
        model = build_model(entry)
    tokens = entry.gradient_accumulation_steps * entry.batch_size * entry.block_size
    ms, flops = statistics.median(steps_ms), model.flops_per_token()
    return {"training": name, "dtype": entry.dtype, "compile": entry.compile,
            "parameters": model.num_params(), "FLOPs per token": flops, "ms per step": ms,
            "ratio to the first": ms / first_ms, "tokens/s": tokens / ms * 1e3,
            "GFLOP/s": tokens * flops / ms / 1e6, "steps_ms": steps_ms}


@torch.no_grad()
def bench_sampling(contenders, cfg, device):
    """
    Rows of tokens per second for one text, for num_samples at once, and without a cache, and of
    the bytes that the cache holds for each token; one for each contender and dtype.
    """
    rows = []
    for name, entry in contenders.items():
        torch.manual_seed(0)
        model = build_model(entry).to(device).eval()
        size = entry.block_size
        length = min(cfg.max_new_tokens, size)

        def sample(count, length, model=model):
            start = torch.zeros(count, 1, dtype=torch.long, device=device)
            for _ in stream(model, start, length):
                continue

        for dtype in cfg.dtypes.split(","):
            # As sample.py does: the weights are cast once, and not at every token
            model.to(getattr(torch, dtype))
            timed(device, sample, 1, min(length, 8))                   # warms up
            one_ms = timed(device, sample, 1, length) / length
            many_ms = timed(device, sample, cfg.num_samples, length) / length
            # Without the cache a token costs a window as long as the text is by then. Eight
            # lengths stand for all.
            idx = torch.zeros(1, size, dtype=torch.long, device=device)
            ends = np.linspace(1, length, 8).astype(int)
            uncached_ms = [timed(device, model, idx[:, :end]) for end in ends]
            cache = Cache(size)
            model(idx[:, :2], cache=cache)
            held = [*cache.keys.values(), *cache.values.values()]      # each (B, H, size, width)
            held_bytes = sum(x[0, :, 0].nbytes for x in held) + cache.ids[0, :1].nbytes
            rows.append({"sampling": name, "dtype": dtype, "tokens/s": 1e3 / one_ms,
                         f"tokens/s of {cfg.num_samples} texts": cfg.num_samples * 1e3 / many_ms,
                         "tokens/s without cache": 1e3 / statistics.fmean(uncached_ms),
                         "cache bytes per token": held_bytes})
    return rows


@torch.no_grad()
def bench_transformers(contenders, cfg, device):
    """
    Rows of tokens per second of the first contender, a gpt2, and of Hugging Face's model of its
    shape, each writing one text with its own cache, greedily, in turn; one row for each dtype.
    """
    if not importlib.util.find_spec("transformers"):
        fail("what=transformers needs the package transformers:  pip install transformers")
    from transformers import GPT2Config, GPT2LMHeadModel
    name, entry = next(iter(contenders.items()))
    if entry.block != "gpt2" or entry.bank_layers:
        fail(f"what=transformers: the first contender is {name}, and transformers has gpt2 alone")
    shape = {key: getattr(entry, key) for key in ("n_layer", "n_head", "n_embd")}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=entry.vocab_size, eos_token_id=None,
                                        n_positions=entry.block_size, **shape))
    ours = build_model(entry)
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    length = min(cfg.max_new_tokens, entry.block_size - 1)

    def write():
        for _ in stream(ours, start, length, temperature=0):
            continue

    def write_theirs():
        theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=length,
                        do_sample=False, pad_token_id=0)

    rows = []
    for dtype in cfg.dtypes.split(","):
        for model in (ours, theirs):
            model.to(device, getattr(torch, dtype)).eval()
        ms = [(timed(device, write), timed(device, write_theirs)) for _ in range(cfg.rounds + 1)]
        ours_ms, theirs_ms = (statistics.median(times) for times in zip(*ms[1:], strict=True))
        ratio = statistics.median(mine / other for mine, other in ms[1:])
        rows.append({"sampling": name, "dtype": dtype, "tokens/s": length * 1e3 / ours_ms,
                     "transformers' tokens/s": length * 1e3 / theirs_ms, "ratio of times": ratio})
    return rows


def bench_attention(contenders, cfg, device):
    """
    Rows of milliseconds, forward and backward, for each way to compute the attention of one layer
    on random queries, keys and values: each pair of widths D and M among the contenders, each
    dtype, with torch.compile and without. A way that fails says why in its row.
    """
    compile_or_fail()
    widths = {(entry.qk_dim, entry.value_dim) for entry in contenders.values()}
    B, T, H, C = cfg.batch_size, cfg.block_size, cfg.n_head, cfg.n_embd
    cases = [("gpt2's heads, fused", fused, H, C // H, C // H)]
    for D, M in sorted(widths):
        cases += [("fused", fused, 1, D, M), ("explicit, in blocks", explicit_attention, 1, D, M),
                  ("explicit, one block", explicit_in_one, 1, D, M)]
        if M % D == 0 and M > D:
            cases += [("value in pieces, fused", fused_in_pieces, 1, D, M)]
    rows = []
    for dtype in cfg.dtypes.split(","):
        for compiled in cfg.compiles.split(","):
            for name, function, heads, D, M in cases:
                row = {"attention": name, "heads": heads, "D": D, "M": M, "dtype": dtype,
                       "compile": compiled == "True"}
                q, k, v = (torch.randn(B, heads, T, width, device=device, requires_grad=True,
                                       dtype=getattr(torch, dtype)) for width in (D, D, M))
                if row["compile"]:
                    function = torch.compile(function, dynamic=False)
                try:
                    row["ms"] = time_attention(function, q, k, v, device, cfg.rounds)
                except RuntimeError as error:
                    row["ms"] = str(error).strip().partition("\n")[0]
                rows.append(row)
    return rows


def time_attention(function, q, k, v, device, rounds):
    """Median milliseconds of a forward and backward pass of function(q, k, v)."""
    upstream = torch.randn_like(v)

    def both_ways():
        torch.autograd.grad(function(q, k, v), (q, k, v), upstream)

    return statistics.median([timed(device, both_ways) for _ in range(WARM_UP + rounds)][WARM_UP:])


def fused(q, k, v):
    """torch's kernel, whichever it chooses: q, k (B, H, T, D), v (B, H, T, M) -> (B, H, T, M)"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def explicit_in_one(q, k, v):
    """The textbook's way with the whole (T, T) matrix at once."""
    return explicit_attention(q, k, v, rows=q.size(-2))


def fused_in_pieces(q, k, v):
    """
    One head as M / D heads that share their query and key, each with D of the value's channels:
    so torch's kernel for equal widths applies. The softmax is computed M / D times.
    """
    pieces = v.size(-1) // q.size(-1)
    v = v.squeeze(1).unflatten(-1, (pieces, -1)).transpose(1, 2)       # (B, M / D, T, D)
    y = fused(q.expand(-1, pieces, -1, -1), k.expand(-1, pieces, -1, -1), v)
    return y.transpose(1, 2).flatten(2).unsqueeze(1)                   # (B, 1, T, M)


def bench_data(contenders, cfg, device):
    """One row: milliseconds to fetch the first contender's batch from a million tokens."""
    entry = next(iter(contenders.values()))
    rng = np.random.default_rng(0)
    tokens = rng.integers(entry.vocab_size, size=10**6).astype(np.uint32)
    times = [timed(device, get_batch, tokens, entry, step, 0, device) for step in range(100)]
    return [{"data loading, ms per batch": statistics.median(times)}]


# ---- what is printed ---------------------------------------------------------------------------

def markdown(rows):
    """A table in Markdown of rows {heading: value}, without the lists among the values."""
    headings = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append("| " + " | ".join(readable(row[name]) for name in headings) + " |")
    return "\n".join(lines) + "\n"


def readable(value):
    """A value as text: a number with four digits or more, and commas between thousands."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    if isinstance(value, float) or type(value) is int:
        return f"{value:,.0f}"
    return str(value)


def main(argv=None):
    given = read_settings(BenchConfig, argv, without=("block",))
    cfg = build(BenchConfig, given)
    device = pick_device(cfg.device)
    torch.set_float32_matmul_precision("high")
    jobs = [given]
    if cfg.what == "gpu":
        own = {name: value for name, value in given.items() if name != "what"}
        jobs = [{"dtypes": "bfloat16", "rounds": 10} | shape | part | own
                for part in GPU_PARTS for shape in GPU_SHAPES]
    results = {"machine": machine_name(device), "device": str(device), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "parts": []}
    print(f"{results['machine']}, torch {torch.__version__}")
    parts = {"train": bench_training, "sample": bench_sampling, "data": bench_data,
             "attention": bench_attention, "transformers": bench_transformers}
    for settings in jobs:
        cfg = build(BenchConfig, settings)
        # A contender's defaults are those of this tool, and then those of train.py
        own = {name: getattr(cfg, name) for name in SHARED} | settings
        contenders = {text: contender(text, own) for text in cfg.contenders.split(",")}
        for part in cfg.what.split(","):
            rows = parts[part](contenders, cfg, device)
            print(f"\n{markdown(rows)}", flush=True)
            results["parts"].append({"part": part, "settings": asdict(cfg), "rows": rows})
            if cfg.json:
                # After each part, so that what a kill cuts off is one part and not all
                Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
