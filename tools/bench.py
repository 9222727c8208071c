"""
Time training steps, sampling and data loading of the blocks, each at its own best setting.

    python -m tools.bench                                                   GPT-2 124M shapes, batch 1
    python -m tools.bench --n_layer=4 --n_embd=128 --n_head=4 --block_size=64 --batch_size=12 --vocab_size=65
    python -m tools.bench --contenders=gpt2,dva:qk_dim=768,dva+bank --dtypes=bfloat16 --profile=True
    python -m tools.bench --what=sample,data

A contender is a block, perhaps with +bank (the last third of its layers), perhaps with settings: dva+bank:qk_dim=32:shift=False.
Contenders and settings take turns, step by step, so that a machine whose speed drifts treats them alike; figures are
medians, and ratios are to the first contender.
"""
import json
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model as model_module
import train
from config import build, check, fail, load, read
from model import GPT, Cache, ModelConfig, attend
from optimizers import build_optimizers, clip_gradients


@dataclass
class BenchConfig(ModelConfig):
    vocab_size: int = 50304         # rows of the token table
    contenders: str = "gpt2,dva:qk_dim=768,dva,gpt2+bank,dva+bank"   # what is timed, against the first of them
    what: str = "train,sample,data" # parts, with commas between
    batch_size: int = 1             # sequences per micro-batch
    gradient_accumulation_steps: int = 1 # micro-batches per step
    optimizer: str = "adamw"        # adamw or muon
    dtypes: str = "float32,bfloat16" # types to try
    compiles: str = "False,True"    # without torch.compile and with it
    attentions: str = "attend"      # ways to compute attention: attend chooses between fused and explicit
    rounds: int = 5                 # timed steps of each, after two for warming up
    max_new_tokens: int = 512       # sampled in a timing
    num_samples: int = 8            # texts in a batch, beside one alone
    device: str = "auto"            # auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps
    profile: bool = False           # print where a step's time goes, by operator
    json: str = ""                  # write all figures to this file

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(vocab_size=1, batch_size=1, gradient_accumulation_steps=1, rounds=1, max_new_tokens=2, num_samples=1),
              choices=dict(optimizer=["adamw", "muon"]))
        for name, allowed in dict(what=["train", "sample", "data"], dtypes=["float32", "bfloat16", "float16"],
                                  compiles=["False", "True"], attentions=["attend", "fused", "explicit"]).items():
            for part in getattr(self, name).split(","):
                if part not in allowed:
                    raise ValueError(f"{name}: {part!r} is none of {', '.join(allowed)}")


def contender(text, cfg):
    """
    The TrainConfig that 'dva+bank:qk_dim=32:optimizer=muon' stands for, all else as in cfg where it has it. Exits with
    status 2 where it stands for none.
    """
    head, *pairs = text.split(":")
    block, plus, bank = head.partition("+")
    if bank != "bank"[:4 * len(plus)]:
        fail(f"contender {text!r}: a block, then +bank or nothing, then :setting=value as often as you like")
    settings = {f.name: getattr(cfg, f.name) for f in fields(train.TrainConfig) if hasattr(cfg, f.name)} | {"block": block}
    settings |= read(train.TrainConfig, [f"--{pair}" for pair in pairs])
    if bank:
        settings["bank_layers"] = max(1, settings["n_layer"] // 3)
    return build(train.TrainConfig, settings)


def timed(device, work, *args):
    """Seconds that work(*args) takes."""
    synchronize = getattr(torch, device.type).synchronize              # nothing to wait for on a CPU, but the call is there
    synchronize()
    start = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - start


def bench_training(contenders, device, dtypes, compiles, attentions=("attend",), rounds=5, profile=False):
    """
    Rows of {contender, dtype, compile, attention, params, flops_per_token, ms_per_step, steps_ms, tokens_per_s, flops_per_s}, one for
    each of contenders {name: TrainConfig}, dtypes and compiles (as a TrainConfig has them), and attentions of model.py.
    """
    runs = []
    for name, cfg in contenders.items():
        torch.manual_seed(0)
        model = GPT(cfg).to(device)
        optimizers = build_optimizers(model, cfg)
        tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
        for dtype in dtypes:
            for setting in compiles:
                compiled = train.pick_compile(replace(cfg, compile=setting), device, model.flops_per_token())
                forward = torch.compile(model, dynamic=False) if compiled else model
                runs += [dict(contender=name, dtype=train.pick_dtype(dtype, device, cfg.n_embd), compile=compiled, cfg=cfg,
                              attention=getattr(model_module, attention), model=model, forward=forward, optimizers=optimizers,
                              x=tokens[:, :-1].contiguous(), y=tokens[:, 1:].contiguous(), steps_ms=[])
                         for attention in attentions]

    def step(run):
        model_module.attend = run["attention"]                         # the blocks look it up at every call
        for _ in range(run["cfg"].gradient_accumulation_steps):
            with torch.autocast(device.type, run["dtype"], enabled=run["dtype"] != torch.float32):
                _, loss = run["forward"](run["x"], run["y"])
            loss.backward()
        clip_gradients(run["model"], run["cfg"].grad_clip)
        for optimizer in run["optimizers"]:
            optimizer.step()
            optimizer.zero_grad()

    for run in tqdm(runs * (rounds + 2), desc="timing", unit="step", disable=None):
        run["steps_ms"].append(timed(device, step, run) * 1e3)
    for run in runs if profile else []:
        with torch.profiler.profile() as operators:
            step(run)
        print(f"\n{run['contender']}, {run['dtype']}{', compiled' if run['compile'] else ''}")
        print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))
    model_module.attend, rows = attend, []
    for run in runs:
        cfg, flops, steps_ms = run["cfg"], run["model"].flops_per_token(), run["steps_ms"][2:]        # two to warm up
        ms = statistics.median(steps_ms)
        rate = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size / ms * 1e3
        rows.append(dict(contender=run["contender"], dtype=str(run["dtype"]).removeprefix("torch."), compile=run["compile"],
                         attention=run["attention"].__name__, params=run["model"].num_params(), flops_per_token=flops, ms_per_step=ms, steps_ms=steps_ms,
                         tokens_per_s=rate, flops_per_s=rate * flops))
    return rows


def bench_sampling(cfg, contenders, device):
    """Rows of {contender, dtype, tokens_per_s, batched_tokens_per_s, uncached_tokens_per_s, cache_bytes_per_token, ...}."""
    rows, length = [], min(cfg.max_new_tokens, cfg.block_size)
    for name, model_config in contenders.items():
        torch.manual_seed(0)
        model = GPT(model_config).to(device).eval()

        def sample(count, length):
            for _ in model.stream(torch.zeros(count, 1, dtype=torch.long, device=device), length):
                continue

        for dtype in cfg.dtypes.split(","):
            model.to(getattr(torch, dtype))
            weight = model.lm_head.weight.detach()                     # the machine's bandwidth: read one table, many times
            reads = statistics.median(timed(device, torch.mv, weight, weight[0]) for _ in range(20))
            bandwidth = weight.numel() * weight.element_size() / reads
            timed(device, sample, 1, 8)                                # warm up
            alone, batch = (count * length / timed(device, sample, count, length) for count in (1, cfg.num_samples))
            # without the cache, a token costs a window as long as the text then is: eight lengths stand for all
            idx = torch.zeros(1, length, dtype=torch.long, device=device)
            cache = Cache(cfg.block_size)
            with torch.no_grad():
                uncached = [timed(device, model, idx[:, :end]) for end in np.linspace(1, length, 8).astype(int)]
                model(idx[:, :2], cache=cache)
            held = sum(t[:, 0].numel() * t.element_size() for memory in cache.memory.values() for t in memory)
            look_ups = [bank.weight for bank in model.banks()] + [model.transformer.wpe.weight]   # a row is read, no more
            weights = (model.num_params() - sum(t.numel() for t in look_ups)) * weight.element_size()
            rows.append(dict(contender=name, dtype=dtype, tokens_per_s=alone, batched_tokens_per_s=batch,
                             uncached_tokens_per_s=8 / sum(uncached), cache_bytes_per_token=held,
                             weight_bytes_per_token=weights, bandwidth=bandwidth, of_bandwidth=alone * weights / bandwidth))
    return rows


def bench_data(cfg, device):
    """Milliseconds that fetching one batch takes, from a million tokens in memory."""
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=10**6).astype(np.uint16)
    batches = train.TrainConfig(block_size=cfg.block_size, batch_size=cfg.batch_size, vocab_size=cfg.vocab_size,
                                gradient_accumulation_steps=1)
    seconds = [timed(device, train.get_batch, tokens, batches, step, 0, device) for step in range(200)]
    return [dict(ms_per_batch=statistics.median(seconds) * 1e3)]


def show(rows, columns):
    """Print rows as a Markdown table; columns are {heading: function of a row}."""
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(value(row)) for value in columns.values()) + " |")


def main(argv=None):
    cfg = load(BenchConfig, argv)
    device = train.pick_device(cfg.device)
    contenders = {text: contender(text, cfg) for text in cfg.contenders.split(",")}
    first, parts, results = next(iter(contenders)), cfg.what.split(","), {"config": asdict(cfg), "device": str(device)}
    if "train" in parts:
        rows = results["train"] = bench_training(contenders, device, cfg.dtypes.split(","),
                                                 [text == "True" for text in cfg.compiles.split(",")], cfg.attentions.split(","),
                                                 cfg.rounds, cfg.profile)
        best = {name: min((r for r in rows if r["contender"] == name), key=lambda r: r["ms_per_step"]) for name in contenders}
        alike = {(r["dtype"], r["compile"], r["attention"]): r["ms_per_step"] for r in rows if r["contender"] == first}
        for row in rows:
            row["ratio"] = row["ms_per_step"] / alike[row["dtype"], row["compile"], row["attention"]]
            row["best_ratio"] = row["ms_per_step"] / best[first]["ms_per_step"] if row is best[row["contender"]] else None
        show(rows, {"training": lambda r: r["contender"], "parameters": lambda r: f"{r['params'] / 1e6:.2f} M",
                    "MFLOPs/token": lambda r: f"{r['flops_per_token'] / 1e6:.1f}", "dtype": lambda r: r["dtype"],
                    "compiled": lambda r: r["compile"], "attention": lambda r: r["attention"], "ms/step": lambda r: f"{r['ms_per_step']:.1f}",
                    "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}", "GFLOP/s": lambda r: f"{r['flops_per_s'] / 1e9:,.0f}",
                    f"/ {first}, alike": lambda r: f"{r['ratio']:.3f}",
                    "best / best": lambda r: f"{r['best_ratio']:.3f}" if r["best_ratio"] else ""})
    if "sample" in parts:
        rows = results["sample"] = bench_sampling(cfg, contenders, device)
        show(rows, {"sampling": lambda r: r["contender"], "dtype": lambda r: r["dtype"],
                    "tokens/s": lambda r: f"{r['tokens_per_s']:.1f}",
                    f"{cfg.num_samples} texts": lambda r: f"{r['batched_tokens_per_s']:.1f}",
                    "without cache": lambda r: f"{r['uncached_tokens_per_s']:.2f}",
                    "gain": lambda r: f"{r['tokens_per_s'] / r['uncached_tokens_per_s']:.1f}x",
                    "cache bytes/token": lambda r: f"{r['cache_bytes_per_token']:,}",
                    "of the bandwidth": lambda r: f"{r['of_bandwidth']:.2f} of {r['bandwidth'] / 1e9:.1f} GB/s"})
    if "data" in parts:
        results["data"] = bench_data(cfg, device)
        show(results["data"], {"data loading, ms/batch": lambda r: f"{r['ms_per_batch']:.3f}"})
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
