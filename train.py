"""
Train a GPT, on one process or on many.

    python train.py config/demo.py                                a preset
    python train.py config/demo.py --block=gpt2 --max_iters=500   and changes to it
    python train.py --init_from=resume --out_dir=out-demo         continue a run as it was
    torchrun --standalone --nproc_per_node=8 train.py config/train_dva.py     eight GPUs
"""
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

# First of all, since it says in one line which package is missing
from nanodva.errors import UserError, fail, run_script

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
    overwrite: bool = False                  # start anew in an out_dir that holds a run
    init_from: PathName = "scratch"          # scratch, resume, auto, gpt2, gpt2-xl ..., or a path
    dataset: str = "openwebtext"             # folder in data_dir, made by prepare_data.py
    data_dir: PathName = "data"              # where data sets live
    batch_size: int = 12                     # sequences per micro-batch
    gradient_accumulation_steps: int = 40    # micro-batches per step, of all processes together
    max_iters: int = 600000                  # steps in all
    optimizer: str = "adamw"                 # adamw, or muon: Muon on the blocks' matrices
    learning_rate: float = 6e-4              # the highest, reached after warm-up
    weight_decay: float = 1e-1               # on matrices and embeddings, never on vectors
    embedding_lr: float = 1.0                # of the embeddings, in learning_rates
    bank_lr: float = 32.0                    # of the banks' tables, in learning_rates
    momentum: float = 0.95                   # Muon
    beta1: float = 0.9                       # AdamW
    beta2: float = 0.95                      # AdamW
    grad_clip: float = 1.0                   # gradient clipping: its largest norm; 0: no clipping
    decay_lr: bool = True                    # warm-up, then a cosine down to min_lr
    warmup_iters: int = 2000                 # steps of linear warm-up
    lr_decay_iters: int = 600000             # the step at which min_lr is reached
    min_lr: float = 6e-5                     # the schedule's end; usually learning_rate / 10
    eval_interval: int = 2000                # steps between evaluations, each followed by a save
    eval_iters: int = 200                    # batches per evaluation, evenly over each split
    eval_train: bool = True                  # evaluate on the train split, too
    eval_only: bool = False                  # evaluate once and stop
    patience: int = 0                        # stop after N evaluations without a better one; 0: no
    log_interval: int = 1                    # steps between lines in metrics.jsonl
    always_save_checkpoint: bool = True      # save after every evaluation, not only the best
    seed: int = 1337                         # weights, batches and dropout follow from it
    device: str = "auto"                     # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1
    dtype: str = "auto"                      # auto, float32, bfloat16, float16
    compile: bool | str = "auto"             # True, False, or auto: where it pays
    backend: str = "auto"                    # of torch.distributed: auto, nccl, gloo
    wandb_log: bool = False                  # log to Weights & Biases, too
    wandb_project: str = "owt"               # its project
    wandb_run_name: str = "gpt2"             # its run

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(batch_size=1, gradient_accumulation_steps=1, eval_interval=1,
                               eval_iters=1, log_interval=1, max_iters=0, warmup_iters=0,
                               lr_decay_iters=0, min_lr=0, learning_rate=0, weight_decay=0,
                               grad_clip=0, embedding_lr=0, bank_lr=0, momentum=0, beta1=0,
                               beta2=0, seed=0, patience=0),
              choices=dict(optimizer=["adamw", "muon"], backend=["auto", "nccl", "gloo"],
                           dtype=["auto", *DTYPES], compile=[True, False, "auto"]))
        for name in ("out_dir", "dataset", "data_dir"):
            if not getattr(self, name):
                fail(f"{name} is empty: give a name, as in --{name}={getattr(TrainConfig, name)}")
        if max(self.beta1, self.beta2) >= 1:
            fail(f"beta1={self.beta1}, beta2={self.beta2}: both must be below 1")
        if self.decay_lr and self.min_lr > self.learning_rate:
            fail(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower it, or "
                 f"say --decay_lr=False")
        if self.wandb_log and not importlib.util.find_spec("wandb"):
            fail("wandb_log=True needs the package wandb:  pip install wandb")
        if self.init_from not in ("scratch", "resume", "auto", *OPENAI):
            if not Path(self.init_from).exists():
                fail(f"init_from={self.init_from!r}: choose from scratch, resume, auto, "
                     f"{', '.join(OPENAI)}, or a path that exists")


class BrokenLoss(UserError):
    """A loss or a gradient is no longer a finite number."""


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
    micro) alone, so resuming needs no state. The whole step's batch is drawn at once and then
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
    """How many windows of these tokens an evaluation takes: eval_iters batches, or all it has."""
    return min(cfg.eval_iters * cfg.batch_size, (len(tokens) - 1) // cfg.block_size)


@torch.no_grad()
def evaluate(model, compiled, data, splits, cfg, device, stop):
    """
    {"train": mean loss, "val": mean loss} of the splits that are named; None where a stop was
    asked for meanwhile. Raises BrokenLoss.

    The loss is taken over eval_iters x batch_size windows that lie evenly over the split and do
    not overlap: with a given batch_size and block_size the same ones in every run. Each process
    takes its share of the batches. The last batch may be smaller. It goes through the uncompiled
    model, because the compiled one would have to be compiled again for its shape.
    """
    T, losses = cfg.block_size, {}
    model.eval()
    for split in splits:
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
            break
        losses[split] = total / count
        if not math.isfinite(total):
            raise BrokenLoss(f"the loss on {split} is {total}; what was saved before is untouched; "
                             f"try a lower --learning_rate")
    model.train()
    return None if stops else losses


# ---- the run -----------------------------------------------------------------------------------

def open_wandb(cfg):
    """The log function of a Weights & Biases run; where none is wanted, one that does nothing."""
    if not cfg.wandb_log or cfg.eval_only or RANK > 0:
        return lambda record, step: None
    wandb = importlib.import_module("wandb")
    return wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg)).log


def train(cfg, device, stop, checkpoint=None, weights=None, data=None):
    """
    Train as cfg says: from scratch, from weights, or on from a checkpoint. `data` can take the
    place of open_data(cfg); a split "test" in it, as tools/race.py has one, is evaluated, too.

    Returns {"step", "best_val_loss", "elapsed_s", "tokens_per_s", "stopped"}, where stopped tells
    whether a signal ended the run early. Raises UserError where something does not fit, before
    anything is written or removed, and BrokenLoss.
    """
    # -- check all that can be checked
    if cfg.gradient_accumulation_steps % WORLD:
        fail(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} does not divide among "
             f"{WORLD} processes: use a multiple of {WORLD}")
    step, earlier_s = (checkpoint["step"], checkpoint["elapsed_s"]) if checkpoint else (0, 0.0)
    machine.check_equal({"step": step, "seed": cfg.seed}, "out_dir must be on a disk they share")
    out_dir, writing = Path(cfg.out_dir), RANK == 0 and not cfg.eval_only
    if writing and not checkpoint:
        checkpoints.check_out_dir(out_dir, cfg.overwrite)
    data = data or open_data(cfg)
    meta = data["meta"]
    known = checkpoint or weights or meta
    # What is only assumed of weights gives way to a data set. Padding adds fewer than 64 rows.
    gives_way = known.get("assumed") and 0 <= cfg.vocab_size - meta["vocab_size"] < 64
    if known["tokenizer"] and not gives_way \
            and not same_tokenizer(known["tokenizer"], meta["tokenizer"]):
        fail(f"dataset={cfg.dataset!r} was made with another tokenizer than the checkpoint: its "
             f"ids stand for other text")

    # -- model and optimizers
    # A model without numbers, so that what is too large is told before it is made
    sketch = outline(cfg)
    batch_tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops = sketch.flops_per_token()
    # Rank 0 decides for all, and a resumed run keeps what was decided
    steps = 0 if cfg.eval_only else cfg.max_iters - step
    dtype = machine.pick_dtype(cfg.dtype, device, cfg.n_embd)
    is_compiled = machine.pick_compile(cfg.compile, device, flops * batch_tokens * steps)
    cfg = change(cfg, **machine.from_rank_0({"dtype": dtype, "compile": is_compiled}))
    needed = machine.check_memory(sketch, cfg, device)
    if device.type == "cpu" and needed > 1e9:
        machine.return_large_tensors()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")                         # TF32 on CUDA
    model = build_model(cfg, weights).to(device)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    measured_on = {"data": meta["sha256"]["val"], "windows": count_windows(data["val"], cfg),
                   "dtype": cfg.dtype}
    best_val_loss, best_step, kept = math.inf, step, None
    if checkpoint:
        checkpoints.restore(checkpoint, model, optimizer, scaler)
        best_val_loss, best_step, kept = checkpoints.best_so_far(out_dir, checkpoint, measured_on)
        if checkpoint["config"]["dataset"] != cfg.dataset:
            say(f"from here on it trains on {cfg.dataset!r}, and no longer on "
                f"{checkpoint['config']['dataset']!r}")
        elif checkpoint["data"] != meta["sha256"]:
            say(f"the data set {cfg.dataset!r} was prepared anew since this run began: it goes on "
                f"with other text")
    compiled = torch.compile(model, dynamic=False) if cfg.compile else model
    parallel = compiled
    if WORLD > 1:
        parallel = DistributedDataParallel(compiled)
        # The one buffer, the rotary table, is the same in all processes
        parallel.broadcast_buffers = False
    if WORLD > 1 and not cfg.eval_only:
        # After its first pass DDP sums gradients in another order. This pass's are thrown away, so
        # that the step after a restart gives the same bits as it would have given without one.
        with machine.autocast(device, cfg.dtype):
            unused = get_batch(data["train"], cfg, step, RANK, device)
            parallel(*unused).backward()
        model.zero_grad()
    wandb_log = open_wandb(cfg)

    with ExitStack() as held:
        # -- where it is written
        if writing:
            held.enter_context(checkpoints.only_writer(out_dir))
            if not checkpoint:
                checkpoints.set_aside(out_dir)
                held.callback(checkpoints.settle, out_dir)
        metrics = checkpoints.open_metrics(out_dir, step) if writing else open(os.devnull, "a")
        held.enter_context(metrics)
        checkpoint = weights = None                                    # lets their memory go
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        # The header's step is one less than the first, as if this line belonged to the steps before
        header = {"step": step - 1, "config": asdict(cfg), "params": model.num_params(),
                  "flops_per_token": flops, "world_size": WORLD, "versions": versions}
        metrics.write(json.dumps(header) + "\n")
        say(f"{cfg.block}: {model.num_params() / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOPs a "
            f"token, {batch_tokens:,} tokens a step; {device.type}, {cfg.dtype}"
            f"{', compiled' if cfg.compile else ''}, about {needed / 1e6:,.0f} MB; {cfg.dataset}: "
            f"{len(data['train']):,} + {len(data['val']):,} tokens")

        def snapshot():
            return {"format": checkpoints.FORMAT, "step": step, "model": model.state_dict(),
                    "model_config": asdict(build(ModelConfig, asdict(cfg))), "config": asdict(cfg),
                    "tokenizer": meta["tokenizer"], "data": meta["sha256"],
                    "best_val_loss": best_val_loss, "best_step": best_step,
                    "measured_on": measured_on}

        # -- the loop
        micro_batches = range(RANK, cfg.gradient_accumulation_steps, WORLD)
        first_step = logged_step = step
        stopped, saved, training_s = False, False, 0.0
        bar = held.enter_context(machine.bar(total=first_step + steps, initial=step, unit=" steps"))
        start = time.perf_counter() - earlier_s
        x, y = get_batch(data["train"], cfg, step, RANK, device)
        while True:
            # -- schedule
            lr = learning_rate(step, cfg)
            set_learning_rate(optimizer, lr)
            finished = cfg.eval_only or step >= cfg.max_iters
            record, improved = {"step": step, "tokens": step * batch_tokens}, False

            # -- evaluate
            losses = None
            if not stopped and (finished or step % cfg.eval_interval == 0):
                wanted = ("train", "val", "test") if cfg.eval_train else ("val", "test")
                splits = [split for split in wanted if split in data]
                losses = evaluate(model, compiled, data, splits, cfg, device, stop)
                stopped = losses is None
            if losses:
                val_loss = losses["val"]
                improved = val_loss < best_val_loss
                if improved:
                    best_val_loss, best_step = val_loss, step
                patience = cfg.patience * cfg.eval_interval
                finished = finished or 0 < patience <= step - best_step
                bits = val_loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
                record |= {"val_loss": val_loss, "val_bits_per_byte": bits}
                if "test" in losses:
                    record["test_loss"] = losses["test"]
                if "train" in losses:
                    record["train_eval_loss"] = losses["train"]
                text = ", ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
                say(f"step {step}: {text}, {bits:.3f} bits per byte, after "
                    f"{tqdm.format_interval(time.perf_counter() - start)}")

            # -- save
            last = stopped or finished
            full = last or improved or losses and cfg.always_save_checkpoint
            if full and step > 0 and not saved and not cfg.eval_only:
                saved = True
                machine.check_replicas(model)
            if writing and (step > 0 or last):
                if improved and kept:
                    os.replace(out_dir / "best.pt", kept)
                    kept = None
                if improved:
                    checkpoints.save(snapshot(), out_dir / "best.pt")
                if full:
                    state = {"optimizer": optimizer.state_dict(),
                             "scaler": scaler.state_dict(),
                             "elapsed_s": time.perf_counter() - start}
                    checkpoints.save(snapshot() | state, out_dir / "last.pt")
                    checkpoints.settle(out_dir)
            if last:
                break

            # -- forward and backward
            began = time.perf_counter()
            loss_sum = torch.zeros((), device=device)
            for micro in micro_batches:
                is_last = micro == micro_batches[-1]
                seed_dropout(cfg, step, micro)
                if WORLD > 1:
                    # Processes exchange gradients once per step
                    parallel.require_backward_grad_sync = is_last
                with machine.autocast(device, cfg.dtype):
                    loss = parallel(x, y)
                # The next batch comes while the device works
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

            # -- look: asking the device for numbers makes it wait, so that is done to log and stop
            logging = step % cfg.log_interval == 0 or losses
            if logging or step % 10 == 0 or stop.signal and WORLD == 1:
                shared = torch.stack((loss_sum, loss_sum.new_tensor(float(stop.signal > 0))))
                if WORLD > 1:
                    # All processes know the mean loss, and stop at the same step
                    dist.all_reduce(shared)
                loss, stops = shared.tolist()
                norm, stopped = norm.item(), stops > 0
                if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                    raise BrokenLoss(f"step {step} is broken: loss {loss}, grad norm {norm}, lr "
                                     f"{lr:g}; what was saved before is untouched; try a lower "
                                     f"--learning_rate")
            training_s += time.perf_counter() - began

            # -- log
            if logging:
                rate = (step + 1 - logged_step) * batch_tokens / training_s
                logged_step, training_s = step + 1, 0.0
                # JSON has no infinity, the norm of a float16 step that was left out
                record |= {"train_loss": loss, "lr": lr,
                           "grad_norm": norm if math.isfinite(norm) else None,
                           "tokens_per_s": round(rate, 1),
                           "elapsed_s": round(time.perf_counter() - start, 3)}
                metrics.write(json.dumps(record) + "\n")
                wandb_log(record, step=step)
                left = tqdm.format_interval((cfg.max_iters - step - 1) * batch_tokens / rate)
                bar.set_postfix_str(f"loss {loss:.4f}")
                if bar.disable or not sys.stdout.isatty():
                    say(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} tokens/s, "
                        f"{left} left")
            step += 1
            bar.update()

        # -- the end
        elapsed = time.perf_counter() - start
        if not stopped:
            record["elapsed_s"] = round(elapsed, 3)
            metrics.write(json.dumps(record) + "\n")
            wandb_log(record, step=step)
    return {"step": step, "best_val_loss": best_val_loss, "elapsed_s": elapsed, "stopped": stopped,
            "tokens_per_s": (step - first_step) * batch_tokens / (elapsed - earlier_s)}


def main(argv=None):
    given = read_settings(TrainConfig, argv)
    init_from = given.get("init_from", TrainConfig.init_from)
    if init_from == "auto":
        out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
        init_from = "resume" if (out_dir / "last.pt").exists() else "scratch"
    checkpoint = weights = None
    if init_from == "resume":
        cfg, checkpoint, changes = checkpoints.resume(TrainConfig, given)
        say(", ".join([f"resuming {cfg.out_dir} at step {checkpoint['step']}", *changes]))
        if cfg.max_iters < checkpoint["step"] and not cfg.eval_only:
            fail(f"max_iters={cfg.max_iters}: the run is at step {checkpoint['step']} already; "
                 f"give a larger one")
    elif init_from == "scratch":
        cfg = build(TrainConfig, given)
        if "vocab_size" not in given:
            cfg = change(cfg, vocab_size=table_rows(read_meta(Path(cfg.data_dir, cfg.dataset))))
    else:
        cfg, weights = start_from(TrainConfig, given)
        say(f"starting from the weights of {cfg.init_from}")
        if weights["assumed"]:
            say(weights["assumed"])
    if cfg.decay_lr and not cfg.eval_only and cfg.max_iters != cfg.lr_decay_iters:
        what = f"from step {cfg.lr_decay_iters} on it trains at min_lr, {cfg.min_lr:.2g}"
        if cfg.max_iters < cfg.lr_decay_iters:
            what = f"its last step is at a rate of {learning_rate(cfg.max_iters, cfg):.2g}"
        say(f"max_iters={cfg.max_iters} and lr_decay_iters={cfg.lr_decay_iters} differ: {what}; "
            f"--lr_decay_iters={cfg.max_iters} ends the decay with the run")
    device = machine.pick_device(cfg.device)
    hint = (f"lower --batch_size={cfg.batch_size} (and raise --gradient_accumulation_steps), "
            f"--block_size={cfg.block_size} or the size of the model")
    with machine.process_group(device, cfg.backend), machine.naming_memory(hint), Stop() as stop:
        done = train(cfg, device, stop, checkpoint, weights)
    if not cfg.eval_only:
        folder, best = shlex.quote(cfg.out_dir), f"best val loss {done['best_val_loss']:.4f}"
        if math.isinf(done["best_val_loss"]):
            best = "not evaluated yet"
        say(f"{'stopped at' if done['stopped'] else 'done:'} step {done['step']}, {best}, "
            f"{done['tokens_per_s']:,.0f} tokens/s, {tqdm.format_interval(done['elapsed_s'])}; all "
            f"is in {folder}/")
        # Whoever is in another folder needs the whole path
        home = Path(__file__).resolve().parent
        home = "" if home == Path.cwd() else f"{home}/"
        if done["stopped"]:
            say(f"continue:  python {home}train.py --init_from=resume --out_dir={folder}")
        else:
            say(f"sample:    python {home}sample.py --out_dir={folder}\n"
                f"picture:   python {home}tools/report.py {folder}")
    if done["stopped"]:
        # Another process may have got the signal
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))


if __name__ == "__main__":
    run_script(main)
