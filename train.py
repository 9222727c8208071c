"""
Train a GPT, on one process or on many.

    python train.py config/demo.py                                    a preset
    python train.py config/demo.py --block=gpt2 --max_iters=500       and changes to it
    python train.py --init_from=resume --out_dir=out-demo             continue a run, with the settings it had
    torchrun --standalone --nproc_per_node=8 train.py config/train_dva.py        eight GPUs
"""
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_data
from checkpoints import OPENAI, fit_weights, load_checkpoint, read_weights, save
from config import build, check, fail, read
from model import GPT, ModelConfig
from optimizers import build_optimizers, clip_gradients, learning_rate

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # torchrun sets them


@dataclass
class TrainConfig(ModelConfig):
    out_dir: str = "out"                     # where checkpoints and metrics go
    overwrite: bool = False                  # start anew in an out_dir that holds a run
    init_from: str = "scratch"               # scratch, resume, weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path
    dataset: str = "openwebtext"             # folder in data_dir, made by prepare_data.py
    data_dir: str = "data"                   # where data sets live
    batch_size: int = 12                     # sequences per micro-batch
    gradient_accumulation_steps: int = 40    # micro-batches per step, over all processes together
    max_iters: int = 600000                  # steps in all
    optimizer: str = "adamw"                 # adamw, or muon: Muon on the blocks' matrices, AdamW on the rest
    learning_rate: float = 6e-4              # at its highest
    weight_decay: float = 1e-1               # on matrices and embeddings; never on vectors and banks
    bank_lr: float = 1.0                     # learning rate of the banks' tables, as a multiple of learning_rate
    beta1: float = 0.9                       # AdamW
    beta2: float = 0.95                      # AdamW
    grad_clip: float = 1.0                   # largest norm of the gradient; 0: any
    decay_lr: bool = True                    # warm-up, then a cosine down to min_lr; otherwise constant
    warmup_iters: int = 2000                 # steps of linear warm-up
    lr_decay_iters: int = 600000             # the step at which min_lr is reached
    min_lr: float = 6e-5                     # the schedule's end; usually learning_rate / 10
    eval_interval: int = 2000                # steps between evaluations, each followed by a save
    eval_iters: int = 200                    # batches per evaluation, spread evenly over each split: at most all of it
    eval_train: bool = True                  # evaluate on the train split, too, which takes as long as on val
    eval_only: bool = False                  # evaluate once and stop
    log_interval: int = 1                    # steps between lines in metrics.jsonl
    always_save_checkpoint: bool = True      # save after every evaluation, not only after the best so far
    seed: int = 1337                         # weights, batches and dropout follow from it
    device: str = "auto"                     # auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps
    dtype: str = "auto"                      # auto, float32, bfloat16, float16
    compile: bool | str = "auto"             # True, False, or auto: on CUDA, and for long runs on a CPU
    backend: str = "auto"                    # of torch.distributed: auto, nccl, gloo
    wandb_log: bool = False                  # log to Weights & Biases too
    wandb_project: str = "owt"               # its project
    wandb_run_name: str = "gpt2"             # its run

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(batch_size=1, gradient_accumulation_steps=1, eval_interval=1, eval_iters=1, log_interval=1,
                               max_iters=0, warmup_iters=0, lr_decay_iters=0, min_lr=0, learning_rate=0, weight_decay=0,
                               grad_clip=0, bank_lr=0, beta1=0, beta2=0, seed=0),
              choices=dict(optimizer=["adamw", "muon"], backend=["auto", "nccl", "gloo"],
                           dtype=["auto", "float32", "bfloat16", "float16"], compile=[True, False, "auto"]))
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: both must be below 1")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower it, or --decay_lr=False")
        if self.wandb_log and not importlib.util.find_spec("wandb"):
            raise ValueError("wandb_log=True needs the package wandb:  pip install wandb")
        if self.init_from not in ("scratch", "resume", *OPENAI) and not Path(self.init_from).exists():
            raise ValueError(f"init_from={self.init_from!r}: there are scratch, resume, {', '.join(OPENAI)}, or a path")


# ---- the machine ----------------------------------------------------------------------------------------------------

def pick_device(name):
    """The torch.device called name; auto: cuda, else mps, else cpu. Exits with status 2 where it isn't there."""
    there = ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ["auto", *there]:
        fail(f"device={name!r} is not on this machine: there are {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def pick_dtype(name, device, width):
    """
    auto: on CUDA bfloat16 or, before Ampere, float16; on a CPU with AMX bfloat16 for models at least 128 wide, where a
    step took 0.4 to 0.97 of its time in float32 (tools/bench.py; narrower, DVA gains nothing); float32 elsewhere.
    """
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if amx and width >= 128 else "float32"
    return getattr(torch, name)


def pick_compile(cfg, device, flops_per_token):
    """
    Whether to compile the model. auto: on CUDA; on a CPU for runs of over 3e14 FLOPs, ten minutes of two cores, where g++
    and Python's headers are there: that takes up to a minute, and a step then 0.6 to 0.95 of its time.
    """
    if device.type == "cpu" and cfg.compile == "auto":
        tokens = 0 if cfg.eval_only else cfg.max_iters * cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        return flops_per_token * tokens > 3e14 and bool(shutil.which("g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
    return cfg.compile is True or cfg.compile == "auto" and device.type == "cuda"


# ---- data -----------------------------------------------------------------------------------------------------------

def open_data(cfg):
    """
    (meta, train tokens, val tokens) of the data set, the tokens memory-mapped; cfg.vocab_size, where 0, becomes the data
    set's. Exits with status 2 where they won't do.
    """
    folder = Path(cfg.data_dir, cfg.dataset)
    meta = prepare_data.read_meta(folder)
    cfg.vocab_size = cfg.vocab_size or {50257: 50304}.get(meta["vocab_size"], meta["vocab_size"])     # 64s are faster
    for name in ("train", "val"):
        if meta["tokens"][name] <= cfg.block_size:
            fail(f"{folder / name}.bin holds {meta['tokens'][name]} tokens: block_size={cfg.block_size} needs at least "
                 f"{cfg.block_size + 1}; use a smaller --block_size or more text")
    return meta, *(np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r") for name in ("train", "val"))


def windows(tokens, starts, cfg, device):
    """The windows that begin at starts (B,): inputs and what follows each, (B, T) int64 on the device."""
    rows = tokens[starts[:, None] + np.arange(cfg.block_size + 1)].astype(np.int64)                   # (B, T + 1)
    if rows.max() >= cfg.vocab_size:
        fail(f"{cfg.data_dir}/{cfg.dataset} holds token {rows.max()}, beyond vocab_size={cfg.vocab_size}: "
             f"check it with  python prepare_data.py {cfg.dataset} --check")
    rows = torch.from_numpy(rows)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def get_batch(tokens, cfg, step, micro, device):
    """
    Micro-batch `micro` of a step, as windows() gives it: a pure function of (seed, step, micro), as dropout is, so that
    resuming needs no state. The whole step's batch is drawn at once: any number of processes cuts the same tokens.
    """
    rng = np.random.default_rng((cfg.seed, step))
    starts = rng.integers(len(tokens) - cfg.block_size, size=(cfg.gradient_accumulation_steps, cfg.batch_size))
    return windows(tokens, starts[micro], cfg, device)


@torch.no_grad()
def evaluate(model, tokens, cfg, device, autocast):
    """
    Mean loss over eval_iters x batch_size windows, spread evenly over the split and never overlapping: the same for
    every run, block and number of processes. Each process takes every world-th batch.
    """
    fit = (len(tokens) - 1) // cfg.block_size
    count = min(cfg.eval_iters * cfg.batch_size, fit)
    starts = np.arange(count) * fit // count * cfg.block_size
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    model.eval()
    for first in range(RANK * cfg.batch_size, count, WORLD * cfg.batch_size):
        x, y = windows(tokens, starts[first:first + cfg.batch_size], cfg, device)
        with autocast:
            total += model(x, y)[1].to(total.device, torch.float64) * len(x)
    model.train()
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item() / count


# ---- starting points -------------------------------------------------------------------------------------------------

def resume(given):
    """(cfg, checkpoint) of the run in out_dir: its own settings, but for those given anew, each of which is named."""
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    checkpoint = load_checkpoint(out_dir / "last.pt")
    if "optimizers" not in checkpoint:
        fail(f"{out_dir}/last.pt holds weights to sample from, without the optimizer's state: it cannot be resumed")
    if (out_dir / "best.pt").exists():                                 # saved first: a killed run's may be the newer one
        checkpoint["best_val_loss"] = min(checkpoint["best_val_loss"], load_checkpoint(out_dir / "best.pt")["best_val_loss"])
    saved = checkpoint["config"] | {"overwrite": False, "eval_only": False, "init_from": "resume"}
    saved = {"rotary": False} | saved                                  # what a run from before this setting had
    cfg = build(TrainConfig, saved | given)
    changed = {name: value for name, value in asdict(cfg).items() if value != saved.get(name, value)}
    for name in changed.keys() & ({f.name for f in fields(ModelConfig)} - {"dropout"} | {"optimizer"}):
        fail(f"{name}={changed[name]!r} differs from the checkpoint's {saved[name]!r}: a run keeps its architecture and "
             f"optimizer; leave --{name} out, or train from scratch")
    if RANK == 0:
        print(f"resuming {out_dir} at step {checkpoint['step']}",
              *(f"{name}={value!r} (was {saved[name]!r})" for name, value in changed.items()), sep=", ")
    return cfg, checkpoint


def start_from(given):
    """(cfg, weights) of a new run that begins with the weights init_from names, and has their architecture."""
    build(TrainConfig, {name: given[name] for name in given if not hasattr(ModelConfig, name)})     # before a long download
    weights = read_weights(given["init_from"])
    cfg = build(TrainConfig, weights["model_config"] | given)
    try:
        weights["model"] = fit_weights(weights, cfg)
    except ValueError as error:
        fail(f"init_from={cfg.init_from}: {error}")
    if RANK == 0:
        print(f"starting from the weights of {cfg.init_from}" + ("" if cfg.block == weights["model_config"]["block"] else
              f": embeddings, positions and final norm; the {cfg.n_layer} {cfg.block} blocks start fresh"))
    return cfg, weights


# ---- the loop -------------------------------------------------------------------------------------------------------

def open_metrics(cfg, step):
    """
    out_dir/metrics.jsonl, to append to. A run from its start (step None) makes out_dir: an earlier run in it is an error,
    or with overwrite removed. A resumed run drops the lines from `step` on, and will write them again, the same.
    """
    out_dir = Path(cfg.out_dir)
    path = out_dir / "metrics.jsonl"
    if step is None:
        out_dir.mkdir(parents=True, exist_ok=True)
        there = sorted(p.name for p in out_dir.iterdir())
        if there and not cfg.overwrite:
            fail(f"{out_dir} is not empty: it holds {', '.join(there[:5])}; continue with --init_from=resume, "
                 f"start anew with --overwrite=True, or give another --out_dir")
        for name in ("last.pt", "best.pt", "metrics.jsonl"):
            (out_dir / name).unlink(missing_ok=True)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line).get("step", -1) < step]
    except ValueError as error:
        fail(f"{path} is damaged ({error}): move it away, and resume")
    prepare_data.write_aside(path, b"".join(kept))
    return open(path, "a", buffering=1)


def train(cfg, checkpoint=None, weights=None):
    """
    Train as cfg says, from scratch, from weights, or on from a checkpoint. Returns {step, val_loss, best_val_loss, elapsed_s,
    tokens_per_s, reached, stopped}: `reached` gives for each tenth of validation loss the seconds to the first evaluation at or
    below it, `stopped` is the number of the signal that ended the run early, or 0.
    """
    # -- processes, device, data
    device = pick_device(cfg.device)
    if cfg.gradient_accumulation_steps % WORLD:
        fail(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} does not divide among {WORLD} processes: "
             f"use a multiple of {WORLD}")
    if WORLD > 1:
        if device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group({"auto": "nccl" if device.type == "cuda" else "gloo"}.get(cfg.backend, cfg.backend))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                     # TF32 for what stays in float32
    dtype = pick_dtype(cfg.dtype, device, cfg.n_embd)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    meta, train_tokens, val_tokens = open_data(cfg)
    if (checkpoint or weights or meta)["tokenizer"] not in (meta["tokenizer"], None):
        fail(f"dataset={cfg.dataset!r} was made with another tokenizer than the checkpoint's: its ids stand for other text")

    # -- where it is all written, model and optimizers
    out_dir, writing = Path(cfg.out_dir), RANK == 0 and not cfg.eval_only
    metrics = open_metrics(cfg, checkpoint and checkpoint["step"]) if writing else open(os.devnull, "a")
    torch.manual_seed(cfg.seed)
    architecture = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}
    model = GPT(ModelConfig(**architecture)).to(device)
    optimizers = build_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")
    step, earlier, best_val_loss = 0, 0.0, math.inf
    if weights:
        model.load_weights(weights["model"])
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})  # weight_decay, betas: cfg's
        scaler.load_state_dict(checkpoint["scaler"])
        step, earlier, best_val_loss = (checkpoint[key] for key in ("step", "elapsed_s", "best_val_loss"))
    checkpoint = weights = None                                        # the tensors have been copied: let them go
    flops, batch_tokens = model.flops_per_token(), cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    compiled = torch.compile(model, dynamic=False) if pick_compile(cfg, device, flops) else model    # evaluations differ in shape
    parallel = DistributedDataParallel(compiled) if WORLD > 1 else compiled

    # -- what is said of it
    if metrics.tell() == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        metrics.write(json.dumps({"config": asdict(cfg), "params": model.num_params(), "flops_per_token": flops,
                                  "world_size": WORLD, "versions": versions}) + "\n")
    if wandb := cfg.wandb_log and writing and importlib.import_module("wandb"):
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg))
    bar = tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True,
               disable=not (writing and sys.stderr.isatty()))
    say = bar.write if RANK == 0 else lambda text: None
    say(f"{cfg.block}: {model.num_params() / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOPs and {batch_tokens:,} tokens a step; "
        f"{device.type}, {str(dtype).removeprefix('torch.')}{', compiled' if compiled is not model else ''}; "
        f"{cfg.dataset}: {len(train_tokens):,} + {len(val_tokens):,} tokens")

    # -- the first Ctrl-C or SIGTERM ends the run in good order, the second Ctrl-C at once
    signals = []
    def on_signal(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def log(record):
        metrics.write(json.dumps(record) + "\n")
        if wandb:
            wandb.log(record, step=step)

    def snapshot(**more):
        return {"format": 1, "model": model.state_dict(), "model_config": architecture, "config": asdict(cfg),
                "tokenizer": meta["tokenizer"], "step": step, "best_val_loss": best_val_loss, **more}

    micro_batches = range(RANK, cfg.gradient_accumulation_steps, WORLD)
    x, y = get_batch(train_tokens, cfg, step, RANK, device)
    first_step, logged_step, stopped, val_loss, training_s = step, step, 0, math.nan, 0.0
    reached = {}                                                       # tenths of val loss: seconds to the first at or below it
    start = time.perf_counter() - earlier
    while True:
        # -- schedule
        lr = learning_rate(step, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1)
        last = stopped or cfg.eval_only or step >= cfg.max_iters
        record, improved = {"step": step, "tokens": step * batch_tokens}, False

        # -- evaluate
        if not stopped and (last or step % cfg.eval_interval == 0):
            if cfg.eval_train:
                record["train_eval_loss"] = evaluate(compiled, train_tokens, cfg, device, autocast)
            val_loss = evaluate(compiled, val_tokens, cfg, device, autocast)
            bits = val_loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]      # per byte of text
            record |= {"val_loss": val_loss, "val_bits_per_byte": bits}
            train_loss = f"train loss {record['train_eval_loss']:.4f}, " if cfg.eval_train else ""
            say(f"step {step}: {train_loss}val loss {val_loss:.4f} (perplexity "
                f"{math.exp(min(val_loss, 700)):.2f}, {bits:.3f} bits per byte), after {bar.format_interval(time.perf_counter() - start)}")
            if not math.isfinite(val_loss):
                fail(f"the validation loss is {val_loss} at step {step} (lr {lr:g}); what was saved before is untouched; "
                     f"try a lower --learning_rate")
            improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            if improved:
                reached.setdefault(math.ceil(val_loss * 10) / 10, round(time.perf_counter() - start, 1))

        # -- save
        if writing and (step or last):
            if improved:
                save(snapshot(), out_dir / "best.pt")
            if last or improved or "val_loss" in record and cfg.always_save_checkpoint:
                save(snapshot(optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=scaler.state_dict(),
                              elapsed_s=time.perf_counter() - start), out_dir / "last.pt")
        if last:
            break

        # -- step: forward and backward, the next micro-batch fetched while the device is busy
        began, loss_sum = time.perf_counter(), torch.zeros((), device=device)
        for micro in micro_batches:
            if WORLD > 1:                                              # gradients travel once per step
                parallel.require_backward_grad_sync = micro == micro_batches[-1]
            torch.manual_seed(np.random.SeedSequence((cfg.seed, step, micro)).generate_state(1)[0].item())     # dropout's
            with autocast:
                _, loss = parallel(x, y)
            ahead = divmod(micro + WORLD, cfg.gradient_accumulation_steps)
            x, y = get_batch(train_tokens, cfg, step + ahead[0], ahead[1], device)
            loss_sum += loss.detach() / cfg.gradient_accumulation_steps
            scaler.scale(loss / len(micro_batches)).backward()
            for bank in model.banks():                                 # micro-batches add up row by row, not side by side
                if bank.weight.grad.is_sparse:
                    bank.weight.grad = bank.weight.grad.coalesce()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model, cfg.grad_clip)
        shared = torch.stack((loss_sum, torch.tensor(float(signals[0] if signals else 0), device=device)))
        if WORLD > 1:                                                  # all know the mean loss, and stop at the same step
            dist.all_reduce(shared)
        loss, stopped, norm = *shared.tolist(), grad_norm.item()
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            fail(f"step {step} is broken: loss {loss}, grad norm {norm}, lr {lr:g}; what was saved before is untouched; "
                 f"try a lower --learning_rate")
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        training_s += time.perf_counter() - began

        # -- log
        if step % cfg.log_interval == 0 or "val_loss" in record:
            rate = (step + 1 - logged_step) * batch_tokens / training_s
            logged_step, training_s = step + 1, 0.0
            record |= {"elapsed_s": round(time.perf_counter() - start, 3), "train_loss": loss, "lr": lr, "grad_norm": norm,
                       "tokens_per_s": round(rate, 1)}
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            if bar.disable:
                left = bar.format_interval((cfg.max_iters - step - 1) * batch_tokens / rate)
                say(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} tokens/s, {left} left")
            log(record)
        step += 1
        bar.update()

    # -- the end
    bar.close()
    elapsed = time.perf_counter() - start
    if not stopped:
        log(record | {"elapsed_s": round(elapsed, 3)})
    metrics.close()
    if wandb:
        wandb.finish()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return {"step": step, "val_loss": val_loss, "best_val_loss": best_val_loss, "elapsed_s": elapsed, "reached": reached,
            "tokens_per_s": (step - first_step) * batch_tokens / (elapsed - earlier),
            "stopped": (signals or [signal.SIGTERM])[0] if stopped else 0}           # another process's signal: a SIGTERM


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)                        # lines appear at once in pipes and files, too
    try:
        given = read(TrainConfig, argv)
        checkpoint = weights = None
        match given.get("init_from", "scratch"):
            case "scratch":
                cfg = build(TrainConfig, given)
            case "resume":
                cfg, checkpoint = resume(given)
            case _:
                cfg, weights = start_from(given)
        done = train(cfg, checkpoint, weights)
        if WORLD > 1:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:                                           # out_dir cannot be written, or the disk is full
        fail(f"cannot use {error.filename or cfg.out_dir}: {error.strerror or error}; what was saved before is untouched")
    finally:
        if dist.is_initialized():                                      # a process of many failed: it leaves as it stands, since
            problem = sys.exception()                                  # tidying up may wait for threads that wait for it
            if not isinstance(problem, SystemExit):
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(problem.code if isinstance(problem, SystemExit) else 1)
    if RANK == 0 and not cfg.eval_only:
        for level, seconds in done["reached"].items():
            print(f"val loss {level:.1f} or less after {seconds} s")
        print(f"{'stopped at' if done['stopped'] else 'done:'} step {done['step']}, best val loss {done['best_val_loss']:.4f}, "
              f"{done['tokens_per_s']:,.0f} tokens/s, {tqdm.format_interval(done['elapsed_s'])}; all is in {cfg.out_dir}/")
        print("continue:  python train.py --init_from=resume" if done["stopped"] else "sample:    python sample.py",
              f"--out_dir={cfg.out_dir}")
    if done["stopped"]:
        raise SystemExit(128 + done["stopped"])


if __name__ == "__main__":
    main()
