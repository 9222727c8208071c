"""
Race blocks against each other on equal terms: the same tokens, batches and validation windows, each at its own best
learning rate, means over seeds.

    python -m tools.race --jobs=2                                     config/race_laptop.py: 40 minutes on two CPU cores
    python -m tools.race --match=time --contenders=gpt2,gpt2:shift=True,dva
    python -m tools.race config/shakespeare_char.py --max_iters=400 --optimizer=muon --contenders=gpt2,dva,dva:n_layer=12

A contender is a block, perhaps with +bank (the last third of its layers), perhaps with settings of train.py's:
dva+bank:qk_dim=32:bank_lr=30. The first one is the reference. What is equal for all, --match says:

    tokens   depth, width and tokens
    time     the reference's training time: steps by the step times measured here
    params   tokens, and parameters within 5 %, embeddings and banks apart: depth is chosen so (and a bank's third)

Step times are measured first, all contenders in turn, before any training, so let nothing else run until that is done; a
run's seconds are its steps times that. Every learning rate of --lrs is tried with the first seed, and further ones while
the best is at an end of those tried; the other seeds follow at the best. --lrs=out/race/NAME/results.json takes the best of
another race. Results go to out/race/NAME: results.json, table.md, race.png. The same command again goes on where it was
stopped; finished runs, kept in out/race/runs, are not run again: after a change to the code, move them away.
"""
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import train
from config import check, fail, load
from model import GPT
from prepare_data import write_aside
from tools.bench import bench_training, contender, show

RACES = Path("out", "race")


@dataclass
class RaceConfig(train.TrainConfig):
    name: str = ""                           # of the folder in out/race; empty: DATASET-MATCH
    contenders: str = ("gpt2,gpt2:shift=True,gpt2:rotary=True,dva,dva:shift=False,dva:rotary=False,dva:n_layer=6,"
                       "dva:value_dim=256,gpt2+bank,dva+bank")         # the first is the reference
    match: str = "tokens"                    # what is equal: tokens, time or params
    seeds: int = 3                           # runs at the best learning rate: seed, seed + 1, ...
    lrs: str = "3e-3,6e-3,1.2e-2"            # learning rates to begin with, or another race's results.json, to take the best ones
    rounds: int = 30                         # timed steps of each contender
    jobs: int = 1                            # runs at a time, which share the CPU's cores

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(seeds=1, rounds=5, jobs=1, max_iters=1), choices=dict(match=["tokens", "time", "params"]))
        for text in self.contenders.split(","):
            rates(text, self)


def rates(text, race):
    """
    The learning rates to begin with for a contender: its own, :learning_rate=, or those of race.lrs, a list or the
    results.json of a race that it was in. Raises ValueError for anything else.
    """
    if own := re.search(":learning_rate=([^:]+)", text):
        return [float(own[1])]
    if race.lrs.endswith(".json"):
        try:
            return [json.loads(Path(race.lrs).read_text())["contenders"][text]["learning_rate"]]
        except (OSError, ValueError, KeyError):
            raise ValueError(f"lrs={race.lrs!r} has no learning rate for {text!r}: give results.json of a race that it ran "
                             f"in") from None
    try:
        assert all(0 < float(lr) < math.inf for lr in race.lrs.split(","))
    except (ValueError, AssertionError):
        raise ValueError(f"lrs={race.lrs!r}: give learning rates above 0, with commas between, as in 3e-3,6e-3") from None
    return sorted({float(lr) for lr in race.lrs.split(",")})


# ---- who runs, and how far ------------------------------------------------------------------------------------------

def body_params(cfg):
    """Numbers in the blocks and norms: all but embeddings and banks."""
    with torch.device("meta"):
        groups = GPT(cfg).parameter_groups()
    return sum(p.numel() for p in groups["matrices"] + groups["vectors"])


def match_params(text, cfg, target):
    """cfg with the depth whose body_params() come nearest to target. Exits with status 2 where that is over 5 % away."""
    def deep(n_layer):
        return replace(cfg, n_layer=n_layer, bank_layers=max(1, n_layer // 3) if cfg.bank_layers else 0)

    layer = body_params(deep(2)) - body_params(deep(1))
    guess = round(target / layer)
    best = cfg if ":n_layer=" in text else min(map(deep, range(max(1, guess // 2), 2 * guess + 2)),
                                               key=lambda deep: abs(body_params(deep) - target))
    off = body_params(best) / target - 1
    if abs(off) > 0.05:
        fail(f"contender {text!r} has {off:+.1%} parameters with its best depth, n_layer={best.n_layer}: match=params wants "
             f"5 % at most; change its qk_dim or value_dim, or leave it out")
    return best


def enter(race):
    """{contender: TrainConfig}: all with the same tokens and the whole validation split; depths as race.match says."""
    _, _, val_tokens = train.open_data(race)
    batches = -(-((len(val_tokens) - 1) // race.block_size) // race.batch_size)                  # in the whole split
    base = replace(race, eval_iters=batches, lr_decay_iters=race.max_iters, log_interval=100, wandb_log=False, eval_only=False,
                   eval_train=False)
    contenders = {text: contender(text, base) for text in race.contenders.split(",")}
    if race.match == "params":
        first, *others = contenders
        target = body_params(contenders[first])
        contenders |= {text: match_params(text, contenders[text], target) for text in others}
    return contenders


def set_lengths(contenders, race, times):
    """The contenders with the steps that race.match allows them, and as many evaluations for each."""
    ms = {text: statistics.fmean(times[text]["ms"]) for text in contenders}
    first, lengths = next(iter(contenders)), {}
    for text, cfg in contenders.items():
        steps = cfg.max_iters
        if race.match == "time" and ":max_iters=" not in text:
            steps = round(contenders[first].max_iters * ms[first] / ms[text])
        lengths[text] = replace(cfg, max_iters=steps, lr_decay_iters=steps,
                                eval_interval=max(1, steps * race.eval_interval // race.max_iters))
    return lengths


def step_times(contenders, cfg, device, folder):
    """
    {"times": {contender: {"ms": medians of five groups of steps, dtype, compile}}, "threads", ...}, all timed in turn; or
    what folder/timing.json says, if it has these very contenders. (Delete it to time anew.)
    """
    path, described = folder / "timing.json", {name: asdict(c) for name, c in contenders.items()}
    kept = json.loads(path.read_text()) if path.exists() else {"contenders": {}}
    if not described.items() <= kept["contenders"].items():
        rows = bench_training(contenders, device, [cfg.dtype], [cfg.compile], rounds=cfg.rounds)
        times = {row["contender"]: {"ms": [statistics.median(row["steps_ms"][i::5]) for i in range(5)], "dtype": row["dtype"],
                                    "compile": row["compile"]} for row in rows}
        kept = {"contenders": described, "times": times, "threads": torch.get_num_threads(), "machine": platform.processor()}
        write_aside(path, json.dumps(kept, indent=1).encode())
    return kept


# ---- runs -----------------------------------------------------------------------------------------------------------

def run_of(cfg, lr, seed):
    """The TrainConfig of one run; its folder is named by all its settings, so that the same run is known again."""
    cfg = replace(cfg, learning_rate=lr, min_lr=lr / 10, seed=seed, overwrite=True)
    settings = {f.name: value for f in fields(cfg) if (value := getattr(cfg, f.name)) != f.default and f.name != "out_dir"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return replace(cfg, out_dir=str(RACES / "runs" / f"{cfg.block}-{cfg.n_layer}x{cfg.n_embd}-lr{lr:g}-seed{seed}-{digest}"))


def curve_of(run):
    """What was evaluated in a finished run, [{step, tokens, val_loss, val_bits_per_byte}]; None if it isn't finished."""
    path = Path(run.out_dir, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    if not records or records[-1]["step"] < run.max_iters or "val_loss" not in records[-1]:
        return None
    return [record for record in records if "val_loss" in record]


def final_loss(run):
    return curve_of(run)[-1]["val_loss"]


def carry_out(run, threads):
    """Train one run, in a process of its own. What it prints is in its folder; a loss that breaks counts as infinite."""
    torch.set_num_threads(threads)
    torch.compiler.reset()                                             # it gives up on a model that it saw in many forms
    folder = Path(run.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            train.train(run)
        except SystemExit:
            if "is broken" not in (said := (folder / "log.txt").read_text()) and "validation loss is" not in said:
                print(said.splitlines()[-1], file=sys.__stderr__)
                raise
            record = {"step": run.max_iters, "tokens": math.inf, "val_loss": math.inf, "val_bits_per_byte": math.inf}
            with open(folder / "metrics.jsonl", "a") as metrics:
                metrics.write(json.dumps(record) + "\n")
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)


def sweep(text, cfg, race):
    """The runs that try learning rates, as far as they are known, by rising rate; and the best of them once it is known."""
    lrs = rates(text, race)
    while True:
        runs = [run_of(cfg, lr, race.seed) for lr in lrs]
        if any(curve_of(run) is None for run in runs):
            return runs, None
        best = min(runs, key=final_loss)
        if len(lrs) == 1 or best not in (runs[0], runs[-1]):
            return runs, best
        beyond = lrs[0] ** 2 / lrs[1] if best is runs[0] else lrs[-1] ** 2 / lrs[-2]          # on by the same factor
        lrs = sorted([*lrs, float(f"{beyond:.3g}")])


def runs_at_best(best, race):
    """The runs of all seeds at the best learning rate; the first is the sweep's own."""
    return [run_of(best, best.learning_rate, race.seed + i) for i in range(race.seeds)]


def run_all(contenders, race, times, device):
    """Carry out the runs that are needed and not done, race.jobs at a time, until no more are known to be needed."""
    threads = max(1, (os.cpu_count() if device.type == "cpu" else torch.get_num_threads()) // race.jobs)
    start, spent, count, pending, known = time.perf_counter(), 0.0, 0, {}, set()
    pool = ProcessPoolExecutor(race.jobs, multiprocessing.get_context("spawn"))
    try:
        while True:
            for text, cfg in contenders.items():
                tried, best = sweep(text, cfg, race)
                for run in tried + (runs_at_best(best, race) if best else []):
                    if run.out_dir not in known and curve_of(run) is None:
                        cost = run.max_iters * statistics.fmean(times[text]["ms"])
                        pending[pool.submit(carry_out, run, threads)] = text, run, cost
                    known.add(run.out_dir)
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                text, run, cost = pending.pop(future)
                future.result()
                if curve_of(run) is None:                              # a signal ended it
                    raise KeyboardInterrupt
                count, spent, gone = count + 1, spent + cost, time.perf_counter() - start
                left = gone * sum(cost for *_, cost in pending.values()) / spent
                print(f"{count} of {count + len(pending)} runs known to be needed: {text}, learning rate {run.learning_rate:g}, "
                      f"seed {run.seed}: val loss {final_loss(run):.4f}; {tqdm.format_interval(gone)} gone, about "
                      f"{tqdm.format_interval(left)} left for these", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what came of it ------------------------------------------------------------------------------------------------

def spread(values):
    """{mean, sd, n}; a single value has no sd."""
    return {"mean": statistics.fmean(values) if values else None, "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values)}


def scaled(figure, factor):
    """A {mean, sd, n} in another unit."""
    return figure | {key: figure[key] and figure[key] * factor for key in ("mean", "sd")}


def steps_to(curve, target):
    """The step at which a curve [{step, val_loss}] first reached the loss target, by straight lines between; None: never."""
    if curve[0]["val_loss"] <= target:
        return curve[0]["step"]
    for a, b in zip(curve, curve[1:]):
        if b["val_loss"] <= target:
            return a["step"] + (b["step"] - a["step"]) * (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
    return None


def summary(contenders, race, times):
    """
    {contender: figures}, where "gpt2" in a key stands for the reference. The loss to reach is the mean of the reference's
    final ones, and the time that a contender's seeds took to it is held against the reference's whole time: the sd of this
    ratio holds the spread of the seeds and that of the step times' ratio. Seeds that never reached it are left out: n says
    how many did.
    """
    results, first = {}, next(iter(contenders))
    for text, cfg in contenders.items():
        tried, best = sweep(text, cfg, race)
        runs = runs_at_best(best, race)
        curves = [curve_of(run) for run in runs]
        losses = spread([curve[-1]["val_loss"] for curve in curves])
        target = results[first]["final_val_loss"]["mean"] if results else losses["mean"]
        with torch.device("meta"):
            model = GPT(cfg)
        ms = spread(times[text]["ms"])
        step_ratio = spread([ours / theirs for ours, theirs in zip(times[text]["ms"], times[first]["ms"])])      # drift cancels
        steps = spread([step for step in (steps_to(curve, target) for curve in curves) if step is not None])
        ratio = scaled(steps, step_ratio["mean"] / contenders[first].max_iters)
        if ratio["sd"]:
            ratio["sd"] = ratio["mean"] * math.hypot(steps["sd"] / steps["mean"], step_ratio["sd"] / step_ratio["mean"])
        results[text] = {
            "settings": {name: getattr(cfg, name) for name in ("block", "n_layer", "n_embd", "bank_layers", "optimizer")},
            "params": spread([model.num_params()] * race.seeds) | {"body": body_params(cfg)},
            "flops_per_token": model.flops_per_token(), "dtype": times[text]["dtype"], "compile": times[text]["compile"],
            "ms_per_step": ms, "step_time_ratio": step_ratio, "steps": cfg.max_iters, "seconds": cfg.max_iters * ms["mean"] / 1e3,
            "learning_rate": best.learning_rate, "sweep": {f"{run.learning_rate:g}": final_loss(run) for run in tried},
            "final_val_loss": losses, "bits_per_byte": spread([curve[-1]["val_bits_per_byte"] for curve in curves]),
            "tokens_to_gpt2_loss": scaled(steps, cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size),
            "seconds_to_gpt2_loss": scaled(steps, ms["mean"] / 1e3), "time_to_gpt2_loss_ratio": ratio,
            "curves": [{"seed": run.seed, "tokens": [r["tokens"] for r in curve],
                        "seconds": [r["step"] * ms["mean"] / 1e3 for r in curve], "val_loss": [r["val_loss"] for r in curve]}
                       for run, curve in zip(runs, curves)]}
    return results


def pm(figure, digits, scale=1.0):
    """mean ± sd, as far as there are."""
    if figure["mean"] is None:
        return "-"
    return f"{figure['mean'] / scale:.{digits}f}" + (f" ± {figure['sd'] / scale:.{digits}f}" if figure["sd"] is not None else "")


def columns(race, first):
    """{heading: function of (name, figures)} of the table."""
    def reached(figure, digits, scale=1.0, unit=""):
        few = f" ({figure['n']} of {race.seeds} seeds)" if figure["n"] < race.seeds else ""
        return pm(figure, digits, scale) + unit + few if figure["n"] else "-"

    return {
        "contender": lambda r: r["name"], "layers": lambda r: r["settings"]["n_layer"],
        "parameters": lambda r: f"{r['params']['mean'] / 1e6:.2f} M",
        "MFLOPs/token": lambda r: f"{r['flops_per_token'] / 1e6:.1f}",
        "ms/step": lambda r: pm(r["ms_per_step"], 1), f"/ {first}": lambda r: pm(r["step_time_ratio"], 3),
        "steps": lambda r: r["steps"], "seconds": lambda r: f"{r['seconds']:.0f}",
        "learning rate": lambda r: f"{r['learning_rate']:g}", "val loss": lambda r: pm(r["final_val_loss"], 4),
        "bits/byte": lambda r: pm(r["bits_per_byte"], 3),
        f"tokens to {first}'s loss": lambda r: reached(r["tokens_to_gpt2_loss"], 2, 1e6, " M"),
        "seconds to it": lambda r: reached(r["seconds_to_gpt2_loss"], 1),
        "its time ratio": lambda r: reached(r["time_to_gpt2_loss_ratio"], 3)}


def draw(results, path):
    """Loss against tokens and against seconds, side by side: mean lines, seeds as bands, names on the lines' ends."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    styles = ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1))]
    ends = [r["final_val_loss"]["mean"] for r in results.values()]
    top = max(ends) + max(0.25, 3 * (max(ends) - min(ends)))           # the first steps would press all else together
    for panel, x_name, scale in zip(panels, ("tokens", "seconds"), (1e6, 1)):
        labels = []
        for i, (name, r) in enumerate(results.items()):
            x = [value / scale for value in r["curves"][0][x_name]]
            losses = list(zip(*(curve["val_loss"] for curve in r["curves"])))                    # per point, all seeds
            grey = f"{0.65 * i / max(1, len(results) - 1):.2f}"
            panel.plot(x, [statistics.fmean(values) for values in losses], color=grey, linestyle=styles[i % len(styles)],
                       linewidth=2 if i == 0 else 1.4)
            panel.fill_between(x, [min(values) for values in losses], [max(values) for values in losses], color=grey, alpha=0.2,
                               linewidth=0)
            labels.append((statistics.fmean(losses[-1]), x[-1], name))
        bottom = min(ends) - 0.1 * (top - min(ends))
        panel.set(xlabel="training tokens, millions" if x_name == "tokens" else "training time, seconds", ylim=(bottom, top))
        panel.spines[["top", "right"]].set_visible(False)
        labels, room = sorted(labels), (top - bottom) / 24             # one above the other, each with a line to its end
        heights = list(itertools.accumulate((loss for loss, *_ in labels), lambda below, loss: max(loss, below + room)))
        down = min(statistics.fmean(heights) - statistics.fmean(ends), heights[0] - bottom - room)
        right = 1.03 * max(x for _, x, _ in labels)
        for (loss, x, name), y in zip(labels, heights):
            panel.annotate(name, (x, loss), (right, y - down), fontsize=8, va="center", annotation_clip=False,
                           arrowprops=dict(arrowstyle="-", color="0.75", linewidth=0.5, relpos=(0, 0.5)))
    panels[0].set_ylabel("validation loss, nats per token")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(results, race, folder, **more):
    """Write results.json, table.md and race.png."""
    everything = {"config": asdict(race), "reference": next(iter(results)), **more, "contenders": results}
    write_aside(folder / "results.json", (json.dumps(everything, indent=1) + "\n").encode())
    with open(folder / "table.md", "w") as file, redirect_stdout(file):
        show([{"name": name} | r for name, r in results.items()], columns(race, next(iter(results))))
        print("\nThe sweeps, final loss of the first seed by learning rate:\n")
        for name, r in results.items():
            print(f"- {name}: " + ", ".join(f"{lr} {loss:.4f}" for lr, loss in r["sweep"].items()))
    draw(results, folder / "race.png")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    race = load(RaceConfig, argv if any(text.endswith(".py") for text in argv) else ["config/race_laptop.py", *argv])
    device = train.pick_device(race.device)
    folder = RACES / (race.name or f"{race.dataset}-{race.match}")
    folder.mkdir(parents=True, exist_ok=True)
    contenders = enter(race)
    timing = step_times(contenders, race, device, folder)
    contenders = set_lengths(contenders, race, timing["times"])
    try:
        run_all(contenders, race, timing["times"], device)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the runs that are finished", file=sys.stderr)
        raise SystemExit(130)
    report(summary(contenders, race, timing["times"]), race, folder, device=str(device), torch=torch.__version__,
           threads=timing["threads"])
    print((folder / "table.md").read_text() + f"all is in {folder}/")


if __name__ == "__main__":
    main()
