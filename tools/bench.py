"""
Time training steps, attention and sampling at any size, and see where a step's time goes.

    python -m tools.bench                                         GPT-2's 124M shape, batch 1
    python -m tools.bench --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
    python -m tools.bench --what=train,sample --contenders=gpt2,dva:qk_dim=768,dva+bank
    python -m tools.bench --what=profile --contenders=gpt2,dva    products, attention, head ...
    python -m tools.bench --what=attention                        ways to compute one layer's
    python -m tools.bench --what=transformers                     sampling, in turn with theirs
    python -m tools.bench --what=gpu --minutes=10                 all that a GPU is asked for

A contender is a block, perhaps with +bank (a bank in the last third of its layers), perhaps with
settings of train.py: dva+bank:dtype=float32:compile=True. Times of steps are medians, and ratios
are to the first contender. On a CPU, whose speed drifts, contenders take turns step by step; on a
GPU, whose memory is short, each runs alone, and its row tells the most memory that it held.

--what=gpu is for a GPU's first ten minutes: 124M, batches of 12, bfloat16; the most important part
first. Each part is a process of its own, so that one which fails, hangs or runs out of memory costs
itself alone. What no longer fits into the minutes is left out.
"""
import gc
import importlib.util
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# So that python tools/bench.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import check_new, fail, run_script

# isort: split
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.utils import clip_grad_norm_
from torch.profiler import profile, record_function
from tqdm import tqdm

from model import Cache, ModelConfig, attend, attend_in_heads, explicit_attention, stream
from nanodva.machine import DTYPES, autocast, pick_compile, pick_device, pick_dtype
from nanodva.optimizers import build_optimizer
from nanodva.settings import build, change, check, read_settings
from nanodva.weights import build_model, outline
from tools.report import markdown, write_json
from train import TrainConfig

# The settings that a contender has from this tool, unless it names its own
SHARED = ("batch_size", "gradient_accumulation_steps", "optimizer", "dtype", "compile")
# Steps before the timed ones, in which memory is found and kernels are compiled
WARM_UP = 2
# What --what=gpu runs, in this order
GPU_SETTINGS = ["--batch_size=12", "--dtype=bfloat16", "--rounds=10"]
GPU_PARTS = [["--what=train", "--compile=True", "--contenders=gpt2,dva"],
             ["--what=attention"],
             ["--what=attention", "--compile=True"],
             ["--what=profile", "--compile=True", "--contenders=gpt2,dva"],
             ["--what=train", "--contenders=gpt2,dva"],
             ["--what=train", "--compile=True", "--contenders=gpt2:rotary=True,dva+bank"],
             ["--what=sample", "--contenders=gpt2,dva,dva+bank"]]


@dataclass
class BenchConfig(ModelConfig):
    contenders: str = "gpt2,dva:qk_dim=768,dva,gpt2+bank,dva+bank"   # the first is the reference
    what: str = "train,sample"               # these, profile, attention, transformers; or gpu alone
    batch_size: int = 1                      # sequences per micro-batch
    gradient_accumulation_steps: int = 1     # micro-batches per step
    optimizer: str = "adamw"                 # adamw or muon
    dtype: str = "auto"                      # auto, float32, bfloat16, float16
    compile: bool = False                    # use torch.compile
    rounds: int = 5                          # timed steps of each, after two to warm up
    max_new_tokens: int = 512                # sampled in a timing
    num_samples: int = 8                     # texts in a batch, in addition to one alone
    minutes: float = 10.0                    # gpu: the time that it may take
    device: str = "auto"                     # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1
    json: str = ""                           # write all figures to this file; gpu: to gpu.json

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(batch_size=1, gradient_accumulation_steps=1, rounds=1,
                               max_new_tokens=2, num_samples=1, minutes=0),
              choices=dict(optimizer=["adamw", "muon"], dtype=["auto", *DTYPES]))
        if self.what != "gpu" and not set(self.what.split(",")) <= PARTS.keys():
            fail(f"what={self.what!r}: name one or more of {', '.join(PARTS)} with commas between, "
                 f"or gpu alone")
        if self.json:
            check_new("json", self.json, ".json")


# ---- contenders --------------------------------------------------------------------------------

def own_settings(text):
    """The settings, as a dict, that a contender such as 'dva+bank:qk_dim=32' names for itself."""
    pairs = text.split(":")[1:]
    for pair in pairs:
        if "=" not in pair:
            fail(f"contender {text!r}: it is a block, then +bank or nothing, then :setting=value "
                 f"as often as you like")
    own = read_settings(TrainConfig, [f"--{pair}" for pair in pairs])
    if "block" in own:
        fail(f"contender {text!r}: its block stands in front, without 'block='")
    if "auto" in (own.get("dtype"), own.get("compile")):
        fail(f"contender {text!r}: say outright which dtype, and whether to compile")
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
        fail(f"contender {text!r}: only bank can follow the +")
    settings = settings | own | {"block": block}
    if plus:
        n_layer = settings.get("n_layer", ModelConfig.n_layer)
        settings |= {"bank_layers": n_layer - 2 * n_layer // 3} | own
    cfg = build(TrainConfig, settings)
    outline(cfg)
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
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device):
    """{"peak MB": the most memory that tensors held since the last call}; nothing but on CUDA."""
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
    Let torch.compile fail where it would give up. It does so without a word once it has seen
    eight versions of a function, and GPT.forward has some for every model: what is called
    compiled would not be. These are the names that torch 2.6 has, too.
    """
    torch._dynamo.config.cache_size_limit = 1000
    torch._dynamo.config.accumulated_cache_size_limit = 10000
    torch._dynamo.config.fail_on_cache_limit_hit = True


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
        with record_function("optimizer"):                             # the profile's name for it
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            optimizer.step()
            scaler.update()
            model.zero_grad()
        return loss.item()

    return step


def time_steps(contenders, device, rounds):
    """
    Yield (name, milliseconds of each of `rounds` training steps) of contenders {name: TrainConfig},
    whose dtype and compile are decided: in turn, but on a GPU one contender after another. Raises
    RuntimeError where one does not fit into memory.
    """
    compile_or_fail()
    groups = [[name] for name in contenders] if device.type == "cuda" else [list(contenders)]
    for group in groups:
        steps = {name: training_step(contenders[name], device) for name in group}
        times = {name: [] for name in group}
        for turn in tqdm(range(WARM_UP + rounds), "timing", leave=False, delay=2, disable=None):
            for name in group:
                ms = timed(device, steps[name])
                if turn >= WARM_UP:
                    times[name].append(round(ms, 4))
        del steps
        release()
        yield from times.items()


# ---- the parts: each yields rows {heading: value} ----------------------------------------------

def bench_training(contenders, cfg, device):
    """Step times, one row for each contender."""
    first_ms = None
    peak_memory(device)
    for name, times in time_steps(contenders, device, cfg.rounds):
        entry, model = contenders[name], outline(contenders[name])
        ms, flops = statistics.median(times), model.flops_per_token()
        first_ms = first_ms or ms
        tokens = entry.gradient_accumulation_steps * entry.batch_size * entry.block_size
        yield {"training": name, "dtype": entry.dtype, "compile": entry.compile,
               "parameters": model.num_params(), "FLOPs per token": flops, "ms per step": ms,
               "ratio to the first": ms / first_ms, "tokens/s": tokens / ms * 1e3,
               "GFLOP/s": tokens * flops / ms / 1e6, **peak_memory(device), "steps_ms": times}


# Which part of a step an operation belongs to, by its name; the first that fits counts. A kernel
# that torch.compile made is named after all the operations that it does.
PARTS_OF_A_STEP = {"head and loss": r"log_softmax|logsumexp|gather|scatter|nll_loss|embedding",
                   "attention": r"attention|softmax|bmm",
                   "products": r"aten::(mm|addmm|linear)|mkl",
                   "norms, gate, sums": r"aten::|fused"}


def bench_profile(contenders, cfg, device):
    """
    Where the milliseconds of a training step go: the device's time in the operations of each part
    of the step, and the rest, in which the device waits for launches and for Python.
    """
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # Let the kernels that are made for a CPU be named, too
    torch._inductor.config.cpp.enable_kernel_profile = True
    for name, entry in contenders.items():
        step = training_step(entry, device)
        ms = [timed(device, step) for _ in range(WARM_UP + cfg.rounds)][WARM_UP:]
        with profile(record_shapes=True) as profiler:
            for _ in range(cfg.rounds):
                step()
        parts = dict.fromkeys([*PARTS_OF_A_STEP, "optimizer", ""], 0.0)
        for event in profiler.events():
            parts[part_of_step(event, entry.vocab_size)] += getattr(event, time_of)
        parts = {part: us / 1e3 / cfg.rounds for part, us in parts.items() if part}
        rest = max(0.0, statistics.median(ms) - sum(parts.values()))
        yield {"profile": name, "dtype": entry.dtype, "compile": entry.compile,
               "ms per step": statistics.median(ms), **parts, "launches, waiting": rest}
        del step
        release()


def part_of_step(event, vocab_size):
    """The part of a step that a profiler's event belongs to; "" for none of them."""
    # A kernel counts for the operation that launched it, since that one tells its shapes
    if event.device_type != DeviceType.CPU:
        return ""
    caller = event.cpu_parent
    while caller is not None:
        if caller.name == "optimizer":
            return "optimizer"
        caller = caller.cpu_parent
    fitting = [part for part, names in PARTS_OF_A_STEP.items() if re.search(names, event.name)]
    if fitting and any(vocab_size in shape for shape in event.input_shapes if shape):
        return "head and loss"
    return fitting[0] if fitting else ""


def bench_attention(contenders, cfg, device):
    """
    Milliseconds of one layer's attention, forward and backward, in each way to compute it. A way
    that fails says why in its row.
    """
    for name, (function, heads, *widths) in ways_of_attention(cfg).items():
        row = {"attention": name, "dtype": cfg.dtype, "compile": cfg.compile}
        peak_memory(device)
        try:
            row["ms"] = attention_ms(function, heads, *widths, cfg, device)
        except RuntimeError as error:
            row["ms"] = str(error).strip().partition("\n")[0]
        yield row | peak_memory(device)


def ways_of_attention(cfg):
    """
    {name: (function, heads, widths of all their queries, of all their values)}: gpt2's heads; then
    dva's one head, its value in pieces (pieces x their width) or the softmax written out for so
    many rows at a time.
    """
    H, C, D, M = cfg.n_head, cfg.n_embd, cfg.qk_dim, cfg.value_dim
    ways = {f"gpt2, {H} x {C // H}": (attend, H, C, C)}
    if M % D == 0:
        ways[f"{M // D} x {D}"] = (attend_in_heads, 1, D, M)
    if M % 128 == 0:
        ways[f"{M // 128} x ({D}, 128), not padded"] = (unpadded_pieces, 1, D, M)
    for rows in sorted({256, 512, cfg.block_size}):
        ways[f"explicit, {rows} rows"] = (partial(explicit_attention, rows=rows), 1, D, M)
    return ways


def attention_ms(function, heads, qk_width, value_width, cfg, device):
    """Median milliseconds of a forward and backward pass of function(q, k, v), as in training."""
    # Launches overlap with the work before them, as they do in a step of many layers
    calls = 50 if device.type == "cuda" else 1
    q, k, v = inputs = [torch.randn(cfg.batch_size, cfg.block_size, width, device=device,
                                    dtype=getattr(torch, cfg.dtype), requires_grad=True)
                        for width in (qk_width, qk_width, value_width)]
    upstream = torch.randn_like(v)

    def layer(*inputs):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in inputs)
        return function(q, k, v).transpose(1, 2).flatten(2)

    forward = torch.compile(layer, dynamic=False) if cfg.compile else layer

    def both_ways():
        for _ in range(calls):
            with autocast(device, cfg.dtype):
                y = forward(*inputs)
            torch.autograd.grad(y, inputs, upstream)

    times = [timed(device, both_ways) for _ in range(WARM_UP + cfg.rounds)]
    return statistics.median(times[WARM_UP:]) / calls


def unpadded_pieces(q, k, v, width=128):
    """attend_in_pieces() for one head with queries and keys as they are: cuDNN takes such pairs."""
    v = v[:, 0].unflatten(-1, (-1, width)).transpose(1, 2)             # (B, pieces, T, width)
    q, k = (x.expand(-1, v.size(1), -1, -1) for x in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)[:, None]


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

        def sample(count, length, model=model):
            start = torch.zeros(count, 1, dtype=torch.long, device=device)
            for _ in stream(model, start, length):
                continue

        timed(device, sample, 1, min(length, 8))                       # warms up
        one_ms = timed(device, sample, 1, length) / length
        many_ms = timed(device, sample, cfg.num_samples, length) / length
        cache = Cache(2)
        model(torch.zeros(1, 2, dtype=torch.long, device=device), cache=cache)
        held = [*cache.keys.values(), *cache.values.values(), cache.ids]
        yield {"sampling": name, "dtype": entry.dtype, "tokens/s": 1e3 / one_ms,
               f"tokens/s of {cfg.num_samples} texts": cfg.num_samples * 1e3 / many_ms,
               "cache bytes per token": sum(x.nbytes for x in held) // 2}


@torch.no_grad()
def bench_transformers(contenders, cfg, device):
    """
    Tokens per second of GPT-2 and of Hugging Face's model of the same shape, each writing one text
    with its own cache, greedily, in turn; one row.
    """
    if not importlib.util.find_spec("transformers"):
        fail("what=transformers needs the package transformers:  pip install transformers")
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = {key: getattr(cfg, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=cfg.block_size, eos_token_id=None, **shape))
    ours = build_model(cfg)
    for model in (ours, theirs):
        model.to(device, getattr(torch, cfg.dtype)).eval()
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    length = min(cfg.max_new_tokens, cfg.block_size - 1)

    def write():
        for _ in stream(ours, start, length, temperature=0):
            continue

    def write_theirs():
        theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=length,
                        do_sample=False, pad_token_id=0)

    ms = [(timed(device, write), timed(device, write_theirs)) for _ in range(cfg.rounds + 1)][1:]
    ours_ms, theirs_ms = (statistics.median(times) for times in zip(*ms, strict=True))
    yield {"sampling": "gpt2", "dtype": cfg.dtype, "tokens/s": length * 1e3 / ours_ms,
           "transformers' tokens/s": length * 1e3 / theirs_ms,
           "ratio of times": statistics.median(mine / other for mine, other in ms)}


PARTS = {"train": bench_training, "profile": bench_profile, "attention": bench_attention,
         "sample": bench_sampling, "transformers": bench_transformers}


# ---- what is printed and written ---------------------------------------------------------------

def readable(value):
    """A value as text: a number with four digits or more, and commas between thousands."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    if isinstance(value, float) or type(value) is int:
        return f"{value:,.0f}"
    return str(value)


def run_gpu_parts(cfg, given):
    """
    Run GPU_PARTS with the user's own settings, `given`, each for a third of the minutes at most,
    and gather their figures in one file, which is written after each.
    """
    path, end = Path(cfg.json or "gpu.json"), time.monotonic() + 60 * cfg.minutes
    own = [f"--{name}={value}" for name, value in given.items() if name not in ("what", "json")]
    report = {"parts": [], "outcomes": []}
    for part in GPU_PARTS:
        seconds = min(end - time.monotonic(), 20 * cfg.minutes)
        outcome = {"part": " ".join(part), "outcome": "left out: the minutes are over"}
        print(f"\n{outcome['part']}, for {max(0, seconds):.0f} s at most", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder, "figures.json")
            command = [sys.executable, __file__, *GPU_SETTINGS, *part, *own, f"--json={figures}"]
            try:
                if seconds > 0:
                    status = subprocess.run(command, timeout=seconds).returncode
                    outcome["outcome"] = f"failed, exit status {status}" if status else "done"
            except subprocess.TimeoutExpired:
                outcome["outcome"] = "stopped: it took too long"
            if figures.exists():
                found = json.loads(figures.read_bytes())
                report |= found | {"parts": report["parts"] + found["parts"]}
        report["outcomes"].append(outcome)
        write_json(report, path)
    print(f"\n{markdown(report['outcomes'])}\nall is in {path}")


def main(argv=None):
    given = read_settings(BenchConfig, argv, without=("block",))
    cfg = build(BenchConfig, given)
    if cfg.what == "gpu":
        run_gpu_parts(cfg, given)
        return
    device = pick_device(cfg.device)
    compile_or_fail()
    cfg = change(cfg, dtype=pick_dtype(cfg.dtype, device, cfg.n_embd),
                 compile=pick_compile(cfg.compile, device, flops=0))
    # A contender's defaults are those of this tool, and then those of train.py
    own = given | {name: getattr(cfg, name) for name in SHARED}
    contenders = {text: contender(text, own) for text in cfg.contenders.split(",")}
    report = {"machine": machine_name(device), "device": str(device), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "parts": []}
    print(f"{report['machine']}, torch {torch.__version__}")
    for part in cfg.what.split(","):
        rows = []
        report["parts"].append({"part": part, "settings": asdict(cfg), "rows": rows})
        for row in PARTS[part](contenders, cfg, device):
            rows.append(row)
            texts = {name: readable(row[name]) for name in row if name != "steps_ms"}
            lines = markdown([texts]).splitlines()
            print("\n".join(lines[2:] if len(rows) > 1 else ["", *lines]), flush=True)
            if cfg.json:
                write_json(report, cfg.json)


if __name__ == "__main__":
    run_script(main)
