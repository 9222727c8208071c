"""
Train a GPT, on one process or on many.

    python train.py config/demo.py                                a preset
    python train.py config/demo.py --block=gpt2 --max_iters=500   and changes to it
    python train.py config/demo.py --dry_run                      how long would it take?
    python train.py --init_from=resume --out_dir=out-demo         continue a run as it was
    torchrun --standalone --nproc_per_node=8 train.py config/train_dva.py     eight GPUs
"""
import importlib.util
import math
import platform
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, fail, only_writer, run_script

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from model import ModelConfig
from nanodva import checkpoints, machine
from nanodva.dataset import open_data, read_meta, table_rows
from nanodva.machine import DTYPES, RANK, WORLD, Stop, say
from nanodva.optimizers import build_optimizer, learning_rate, set_learning_rate
from nanodva.settings import PathName, build, change, check, read_settings
from nanodva.tokenizer import same_tokenizer
from nanodva.weights import OPENAI, build_model, outline, start_from


@dataclass
class TrainConfig(ModelConfig):
    out_dir: PathName = "out"                # where checkpoints and metrics go
    overwrite: bool = False                  # replace the run that out_dir holds
    init_from: PathName = "scratch"          # scratch, resume, auto, gpt2, gpt2-xl ..., or a path
    dataset: str = "openwebtext"             # folder in data_dir, made by prepare_data.py
    data_dir: PathName = "data"              # where data sets live
    batch_size: int = 12                     # sequences per micro-batch
    gradient_accumulation_steps: int = 40    # micro-batches per step, of all processes together
    max_iters: int = 600000                  # steps in all
    dry_run: bool = False                    # take ten steps, say what all would take, save nothing
    optimizer: str = "adamw"                 # adamw, or muon: Muon on the blocks' matrices
    learning_rate: float = 6e-4              # the highest, reached after warm-up
    weight_decay: float = 1e-1               # on matrices and embeddings, never on vectors
    embedding_lr: float = 1.0                # rate of the embeddings, a multiple of learning_rate
    bank_lr: float = 32.0                    # rate of the banks' tables, a multiple, too
    momentum: float = 0.95                   # Muon
    beta1: float = 0.9                       # AdamW
    beta2: float = 0.95                      # AdamW
    grad_clip: float = 1.0                   # clip the gradient's norm to this; 0: no clipping
    decay_lr: bool = True                    # warm-up, then a cosine down to min_lr
    warmup_iters: int = 2000                 # steps of linear warm-up
    lr_decay_iters: int = 600000             # the step at which min_lr is reached
    min_lr: float = 6e-5                     # the schedule's end; usually learning_rate / 10
    eval_interval: int = 2000                # steps between evaluations, each followed by a save
    eval_iters: int = 200                    # batches per evaluation, evenly over each split
    eval_tokens: int = 0                     # instead of eval_iters: tokens per evaluation; 0: off
    eval_train: bool = True                  # evaluate on the train split, too
    eval_only: bool = False                  # evaluate once and stop
    patience: int = 0                        # stop after N evaluations without a better one; 0: no
    log_interval: int = 1                    # steps between lines in metrics.jsonl
    always_save_checkpoint: bool = True      # save after every evaluation, not only the best
    save_interval_s: float = 15.0            # seconds between other saves of last.pt; 0: none
    seed: int = 1337                         # weights, batches and dropout follow from it
    device: str = "auto"                     # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1
    dtype: str = "auto"                      # auto, float32, bfloat16, float16
    compile: bool | str = "auto"             # True, False, or auto: if it pays
    backend: str = "auto"                    # of torch.distributed: auto, nccl, gloo
    wandb_log: bool = False                  # log to Weights & Biases, too
    wandb_project: str = "owt"               # its project
    wandb_run_name: str = "gpt2"             # its run

    def __post_init__(self):
        super().__post_init__()
        numbers = [field.name for field in fields(self) if field.type in (int, float)]
        at_least_1 = dict(batch_size=1, gradient_accumulation_steps=1, eval_interval=1,
                          eval_iters=1, log_interval=1)
        check(self, least=dict.fromkeys(numbers, 0) | at_least_1,
              choices=dict(optimizer=["adamw", "muon"], backend=["auto", "nccl", "gloo"],
                           dtype=["auto", *DTYPES], compile=[True, False, "auto"]))
        for name in ("out_dir", "dataset", "data_dir"):
            if not getattr(self, name):
                fail(f"{name} is empty: give a name, as in --{name}={getattr(TrainConfig, name)}")
        for name in ("momentum", "beta1", "beta2"):
            if getattr(self, name) >= 1:
                fail(f"{name}={getattr(self, name)}: it must be below 1")
        if self.decay_lr and self.min_lr > self.learning_rate:
            fail(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower it, or "
                 f"say --decay_lr=False")
        if self.init_from not in ("scratch", "resume", "auto", *OPENAI):
            if not Path(self.init_from).exists():
                fail(f"init_from={self.init_from!r}: choose from scratch, resume, auto, "
                     f"{', '.join(OPENAI)}, or a path that exists")


class BrokenLoss(UserError):
    """Raised when a loss, a gradient or a weight is not finite."""


# ---- batches -----------------------------------------------------------------------------------

def windows(tokens, starts, cfg, device):
    """Inputs and the token that follows each, (B, T) int64, of the windows at starts (B,)."""
    rows = tokens[starts[:, None] + np.arange(cfg.block_size + 1)].astype(np.int64)
    if rows.max() >= cfg.vocab_size:
        fail(f"{cfg.data_dir}/{cfg.dataset} is damaged: it holds token {rows.max()}, beyond "
             f"vocab_size={cfg.vocab_size}; try  python prepare_data.py {cfg.dataset} --check")
    rows = torch.from_numpy(rows)                                      # (B, T + 1)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def get_batch(tokens, cfg, step, micro, device):
    """
    Micro-batch number `micro` of a step, as windows() gives it. It follows from (seed, step,
    micro) alone, so resuming needs no state. The whole step's batch is sampled at once and then
    cut, so any number of processes sees the same tokens.
    """
    rng = np.random.default_rng((cfg.seed, step))
    shape = (cfg.gradient_accumulation_steps, cfg.batch_size)
    starts = rng.integers(len(tokens) - cfg.block_size, size=shape)
    return windows(tokens, starts[micro], cfg, device)


def seed_dropout(cfg, step, micro):
    """Let dropout, too, follow from (seed, step, micro) alone."""
    entropy = np.random.SeedSequence((cfg.seed, step, micro))
    torch.manual_seed(entropy.generate_state(1)[0].item())


# ---- evaluation --------------------------------------------------------------------------------

def count_windows(tokens, cfg):
    """How many windows an evaluation reads: eval_tokens, or else eval_iters batches, or all."""
    wanted = math.ceil(cfg.eval_tokens / cfg.block_size) or cfg.eval_iters * cfg.batch_size
    return min(wanted, (len(tokens) - 1) // cfg.block_size)


@torch.no_grad()
def evaluate(model, compiled, data, cfg, device, stop):
    """
    {"val": mean loss}, or {"train": ..., "val": ...}; {} if a stop was requested meanwhile.

    The loss is taken over count_windows() windows that are evenly spaced and do not overlap: the
    same ones in every run. Each process takes its share of the batches. The last batch may be
    smaller: the uncompiled model takes it, which need not be compiled again for its shape.
    """
    T, losses = cfg.block_size, {}
    model.eval()
    for split in ("train", "val") if cfg.eval_train else ("val",):
        fit, count = (len(data[split]) - 1) // T, count_windows(data[split], cfg)
        starts = np.arange(count) * fit // count * T
        sums = torch.zeros(2, device=device)                           # of losses, of stops
        batches = range(RANK * cfg.batch_size, count, WORLD * cfg.batch_size)
        for first in machine.bar(batches, f"evaluating on {split}", delay=2):
            x, y = windows(data[split], starts[first:first + cfg.batch_size], cfg, device)
            forward = compiled if len(x) == cfg.batch_size else model
            with machine.autocast(device, cfg.dtype):
                loss = forward(x, y)
            sums[0] += loss.float() * len(x)
            if stop.signal:
                sums[1] += 1
                break
        if WORLD > 1:
            dist.all_reduce(sums)
        total, stops = sums.tolist()
        if stops:
            return {}
        losses[split] = total / count
    model.train()
    return losses


# ---- the run -----------------------------------------------------------------------------------

def distribute(model, compiled, trial):
    """The compiled model for many processes. trial(model) is one forward and backward pass."""
    trial(compiled)
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        fail(f"the loss does not depend on {', '.join(unused)}: many processes need a model "
             f"without unused parameters; remove them, or train in one process")
    parallel = DistributedDataParallel(compiled)
    # The one buffer, the rotary table, is the same in all processes
    parallel.broadcast_buffers = False
    # DDP reorders its gradient buckets after the first backward pass, which changes rounding. One
    # throwaway pass keeps restarted runs bit-identical.
    trial(parallel)
    return parallel


def train(cfg, device, stop, checkpoint=None, weights=None):
    """
    Train as cfg says: from scratch, from weights, or on from a checkpoint of cfg.out_dir. Weights
    and checkpoint are emptied once they are in the model, which frees their memory.

    Returns {"step", "best_val_loss", "elapsed_s", "tokens_per_s", "stopped"}: the throughput of
    the steps that were last logged, and whether a signal ended the run early. Raises UserError if
    something does not fit, before anything is written, and BrokenLoss.
    """
    # -- check all that can be checked
    if cfg.gradient_accumulation_steps % WORLD:
        fail(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} does not divide among "
             f"{WORLD} processes: use a multiple of {WORLD}")
    if cfg.wandb_log and not importlib.util.find_spec("wandb"):
        fail("wandb_log=True needs the package wandb:  pip install wandb")
    step = checkpoint["step"] if checkpoint else 0
    machine.check_equal({"step": step, "seed": cfg.seed}, "out_dir must be on a disk they share")
    data = open_data(cfg)
    meta = data["meta"]
    known = checkpoint or weights or meta
    # If the weights' tokenizer is only a guess, the data set's is used. Padding adds up to 63 rows.
    may_differ = known.get("assumed") and 0 <= cfg.vocab_size - meta["vocab_size"] < 64
    if known["tokenizer"] and not may_differ \
            and not same_tokenizer(known["tokenizer"], meta["tokenizer"]):
        fail(f"dataset={cfg.dataset!r} was made with another tokenizer than the checkpoint: its "
             f"ids stand for other text")
    # On the meta device first, to reject a model that is too large before allocating it
    sketch = outline(cfg)
    machine.check_memory(sketch.num_params(), device)

    # -- rank 0 decides for all, and a resumed run keeps what was decided
    flops, setting = sketch.flops_per_token(), cfg.compile
    batch_tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    first_step = step
    last_step = step if cfg.eval_only else cfg.max_iters
    dtype = machine.pick_dtype(cfg.dtype, device, cfg.n_embd)
    is_compiled = machine.pick_compile(setting, device, flops * batch_tokens * (last_step - step))
    cfg = change(cfg, **machine.from_all({"dtype": dtype, "compile": is_compiled})[0])
    say(f"{cfg.block}: {sketch.num_params() / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOPs a "
        f"token, {batch_tokens:,} tokens a step; {device.type}, {cfg.dtype}"
        f"{', compiled' if cfg.compile else ''}; {cfg.dataset}: {len(data['train']):,} + "
        f"{len(data['val']):,} tokens")
    if cfg.dry_run:
        # One micro-batch per step is enough to time it, and with the optimizer a little too much
        cfg = change(cfg, gradient_accumulation_steps=WORLD, log_interval=9)
        batch_tokens, last_step = WORLD * cfg.batch_size * cfg.block_size, step + 10
    measured_on = {"data": meta["sha256"]["val"], "windows": count_windows(data["val"], cfg),
                   "dtype": cfg.dtype}

    with ExitStack() as held:
        # -- the run's folder: lock it, then look
        folder = None
        if RANK == 0 and not cfg.eval_only and not cfg.dry_run:
            held.enter_context(only_writer(Path(cfg.out_dir)))
            folder = checkpoints.RunFolder(cfg, checkpoint)

        # -- model and optimizer
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")                     # TF32 on CUDA
        model = build_model(cfg, weights).to(device)
        optimizer = build_optimizer(model, cfg)
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
        state = checkpoint or {"tokens": 0, "elapsed_s": 0.0, "started": time.time()}
        tokens, earlier_s, started = state["tokens"], state["elapsed_s"], state["started"]
        evaluated, best = None, (math.inf, step)
        if checkpoint:
            checkpoints.restore(checkpoint, model, optimizer, scaler)
            if checkpoint["measured_on"] == measured_on and not cfg.eval_only:
                evaluated = checkpoint["evaluated"]
            if folder:
                best = folder.best_so_far(checkpoint, measured_on)
            if checkpoint["data"] != meta["sha256"]:
                say(f"from here on it trains on other text, {cfg.dataset!r} as it is now")
        best_val_loss, best_step = machine.from_all(best)[0]

        def trial(model):
            with machine.autocast(device, cfg.dtype):
                loss = model(*get_batch(data["train"], cfg, step, RANK, device))
            if not cfg.eval_only:
                loss.backward()

        compiled = parallel = model
        if cfg.compile:
            compiled = machine.compiled(model, trial, setting, stop)
            cfg = change(cfg, compile=compiled is not model)
        if WORLD > 1 and not cfg.eval_only:
            parallel = distribute(model, compiled, trial)
        model.zero_grad()

        # -- what is written
        logs = [folder.log] if folder else []
        if folder and cfg.wandb_log:
            wandb = importlib.import_module("wandb").init(
                project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg))
            logs.append(lambda record: wandb.log(record, step=record["step"]))

        def log(record):
            record = {"step": step, "tokens": tokens} | record
            record["elapsed_s"] = round(time.perf_counter() - start, 3)
            for each in logs:
                each(record)

        def report_losses(losses):
            if not math.isfinite(sum(losses.values())):
                broken(f"the losses are {losses}")
            bits = losses["val"] / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
            names = {"train": "train_eval_loss", "val": "val_loss"}
            log({names[split]: losses[split] for split in losses} | {"val_bits_per_byte": bits})
            text = ", ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
            say(f"step {step}: {text}, {bits:.3f} bits per byte, after "
                f"{tqdm.format_interval(time.perf_counter() - start)}")

        def report_step(loss, norm, lr, rate):
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                broken(f"loss {loss}, grad norm {norm}, lr {lr:g}")
            memory = machine.peak_memory(device)
            # JSON has no infinity, the norm of a skipped float16 step
            log({"train_loss": loss, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None,
                 "tokens_per_s": round(rate, 1), "peak_gb": round(memory, 3)})
            bar.set_postfix_str(f"loss {loss:.4f}")
            if bar.disable or not sys.stdout.isatty():
                left = tqdm.format_interval((last_step - step - 1) * batch_tokens / rate)
                say(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, grad norm {norm:.2f}, "
                    f"{rate:,.0f} tokens/s, {memory:.2f} GB, {left} left")

        def save(name, **state):
            if not folder:
                return
            if not all(p.isfinite().all() for p in model.parameters()):
                broken("a weight is not finite")
            common = {"format": checkpoints.FORMAT, "step": step, "model": model.state_dict(),
                      "model_config": asdict(build(ModelConfig, asdict(cfg))),
                      "config": asdict(cfg), "tokenizer": meta["tokenizer"],
                      "data": meta["sha256"], "measured_on": measured_on, "started": started,
                      "best_val_loss": best_val_loss}
            folder.save(name, common | state)

        def broken(what):
            raise BrokenLoss(f"step {step} is broken: {what}: try a lower --learning_rate; "
                             f"{checkpoints.saved_so_far(cfg.out_dir)}")

        if folder:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            folder.log({"step": step, "config": asdict(cfg), "params": model.num_params(),
                        "flops_per_token": flops, "world_size": WORLD, "versions": versions,
                        "measured_on": measured_on, "started": started})

        # -- the loop
        is_tuned = weights is not None
        (checkpoint or weights or {}).clear()
        micro_batches = range(RANK, cfg.gradient_accumulation_steps, WORLD)
        bar = held.enter_context(machine.bar(total=last_step, initial=step, unit=" steps"))
        logged_at = time.perf_counter()
        logged_step, rate, start = step, 0.0, logged_at - earlier_s
        x, y = get_batch(data["train"], cfg, step, RANK, device)
        while True:
            stopping, finished = stop.agreed(step), step >= last_step
            lr = learning_rate(step, cfg)
            set_learning_rate(optimizer, lr)

            # -- evaluate
            paused, losses = time.perf_counter(), {}
            is_due = (finished or step % cfg.eval_interval == 0) and step != evaluated
            if is_due and not stopping and not cfg.dry_run:
                losses = evaluate(model, compiled, data, cfg, device, stop)
                stopping = not losses
            if losses:
                evaluated = step
                report_losses(losses)

            # -- save; random weights are not worth it, nor the name of the best
            if step > 0 or finished or is_tuned and losses:
                improved = losses.get("val", math.inf) < best_val_loss
                if improved:
                    best_val_loss, best_step = losses["val"], step
                    save("best.pt")
                finished = finished or 0 < cfg.patience * cfg.eval_interval <= step - best_step
                by_interval = losses and cfg.always_save_checkpoint
                by_clock = folder and folder.is_due(cfg.save_interval_s)
                if stopping or finished or improved or by_interval or by_clock:
                    save("last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         tokens=tokens, evaluated=evaluated, elapsed_s=time.perf_counter() - start)
            if stopping or finished:
                break
            # The throughput is that of the steps alone
            logged_at += time.perf_counter() - paused

            # -- forward and backward
            loss_sum = torch.zeros((), device=device)
            for micro in micro_batches:
                is_last = micro == micro_batches[-1]
                seed_dropout(cfg, step, micro)
                if WORLD > 1:
                    # Processes exchange gradients once per step
                    parallel.require_backward_grad_sync = is_last
                with machine.autocast(device, cfg.dtype):
                    loss = parallel(x, y)
                # Fetch the next batch while the device works
                following = (step + 1, RANK) if is_last else (step, micro + WORLD)
                x, y = get_batch(data["train"], cfg, *following, device)
                loss_sum += loss.detach() / cfg.gradient_accumulation_steps
                scaler.scale(loss / len(micro_batches)).backward()

            # -- step
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            # In float16 a step that overflows is skipped, and the next one scaled down
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            if step == first_step:
                machine.check_replicas(model)

            # -- log; reading numbers stalls the device. What breaks between two logged steps is
            # noticed at the second, at an evaluation or before a save.
            if step % cfg.log_interval == 0:
                if WORLD > 1:
                    dist.all_reduce(loss_sum)
                loss, norm, now = loss_sum.item(), norm.item(), time.perf_counter()
                rate = (step + 1 - logged_step) * batch_tokens / (now - logged_at)
                logged_step, logged_at = step + 1, now
                report_step(loss, norm, lr, rate)
            step += 1
            tokens += batch_tokens
            bar.update()
    return {"step": step, "best_val_loss": best_val_loss, "tokens_per_s": rate,
            "elapsed_s": time.perf_counter() - start, "stopped": stopping}


def read_start(given):
    """(cfg, checkpoint, weights): a run starts from scratch, a checkpoint, or weights."""
    init_from = given.get("init_from", TrainConfig.init_from)
    if init_from == "auto":
        last = Path(given.get("out_dir", TrainConfig.out_dir), "last.pt")
        init_from = "resume" if last.exists() else "scratch"
    if init_from == "resume":
        cfg, checkpoint, changes = checkpoints.resume(TrainConfig, given)
        say(", ".join([f"resuming {cfg.out_dir} at step {checkpoint['step']}", *changes]))
        if cfg.max_iters < checkpoint["step"] and not cfg.eval_only:
            fail(f"max_iters={cfg.max_iters}: the run is at step {checkpoint['step']} already; "
                 f"give a larger one")
        return cfg, checkpoint, None
    if init_from == "scratch":
        cfg = build(TrainConfig, given)
        if "vocab_size" not in given:
            cfg = change(cfg, vocab_size=table_rows(read_meta(Path(cfg.data_dir, cfg.dataset))))
        return cfg, None, None
    cfg, weights = start_from(TrainConfig, given)
    say(f"starting from the weights of {cfg.init_from}")
    if weights["assumed"]:
        say(weights["assumed"])
    return cfg, None, weights


def tell_end(cfg, device, done):
    """Say how the run ended and what to do next."""
    step, stopped, folder = done["step"], done["stopped"], shlex.quote(cfg.out_dir)
    if cfg.dry_run and not stopped:
        tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        seconds = tokens / done["tokens_per_s"]
        say(f"dry run: at most {seconds:.3g} s a step, "
            f"{tqdm.format_interval(seconds * cfg.max_iters)} for {cfg.max_iters} steps without "
            f"evaluations, {machine.peak_memory(device):.2f} GB; nothing was written")
    elif stopped and step == 0:
        say("stopped before the first step: nothing was saved")
    elif not cfg.eval_only and not cfg.dry_run:
        best = done["best_val_loss"]
        say(f"{'stopped at' if stopped else 'done:'} step {step}, "
            f"{'no best' if math.isinf(best) else f'best val loss {best:.4f}'}, after "
            f"{tqdm.format_interval(done['elapsed_s'])}; all is in {folder}/")
        # Whoever is in another folder needs the whole path
        home = Path(__file__).resolve().parent
        home = "" if home == Path.cwd() else f"{home}/"
        if stopped:
            say(f"continue:  python {home}train.py --init_from=resume --out_dir={folder}")
        else:
            say(f"sample:    python {home}sample.py --out_dir={folder}\n"
                f"picture:   python {home}tools/report.py {folder}")


def main(argv=None):
    given = read_settings(TrainConfig, argv)
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    with ExitStack() as held:
        # Lock the folder, then look. A job that was queued again may meet the end of the old one.
        writes = RANK == 0 and not given.get("eval_only") and not given.get("dry_run")
        wait_s = {"auto": 30, "resume": 0}.get(given.get("init_from"))
        if writes and wait_s is not None and out_dir.exists():
            held.enter_context(only_writer(out_dir, wait_s))
        cfg, checkpoint, weights = read_start(given)
        if cfg.decay_lr and not cfg.eval_only and cfg.max_iters != cfg.lr_decay_iters:
            say(f"max_iters={cfg.max_iters} and lr_decay_iters={cfg.lr_decay_iters} differ, so the "
                f"last step's rate is {learning_rate(cfg.max_iters - 1, cfg):.2g}; "
                f"--lr_decay_iters={cfg.max_iters} ends the decay with the run")
        device = machine.pick_device(cfg.device)
        hint = (f"lower --batch_size={cfg.batch_size} (and raise --gradient_accumulation_steps), "
                f"--block_size={cfg.block_size} or the size of the model")
        group, memory = machine.process_group(device, cfg.backend), machine.naming_memory(hint)
        with group, memory, Stop() as stop:
            step = checkpoint["step"] if checkpoint else 0
            if machine.from_all(step)[0] != step:
                # Rank 0 has waited for the last save of the old job, and this process has not
                cfg, checkpoint, weights = read_start(given)
            done = train(cfg, device, stop, checkpoint, weights)
    tell_end(cfg, device, done)
    if done["stopped"]:
        # Another process may have got the signal
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))


if __name__ == "__main__":
    run_script(main)
