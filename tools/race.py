"""
Race blocks against each other on equal terms: the same tokens, batches and validation text, each
at its own best learning rate, over several seeds, with an interval for every difference.

    python -m tools.race --minutes=10                        a race for a lesson
    python -m tools.race config/race_bpe.py --contenders=gpt2:rotary=True,dva,dva+bank
    python -m tools.race --match=time --seeds=3 --jobs=2

A contender is a block, perhaps with +bank (banks in the last third of its layers), perhaps with
settings of train.py, as in dva+bank:qk_dim=32. The first one is the reference: all others get its
number of tokens, or with --match=time its training time.

The validation split is cut in two. On its first half the first seed chooses each contender's rates:
all of --lrs are tried, and further ones while the best is at an end of those tried; then, where
there are banks, --bank_lrs at the best learning rate. If a contender names a rate itself, as
dva:learning_rate=6e-3 does, that rate is kept, and the race tries no other. On the second half
--seeds further seeds are reported. Two contenders are compared seed by seed, since equal seeds see
equal batches, except where a contender has a batch_size of its own. Student's t gives the 95 %
interval of the mean difference.

With --minutes the runs are as long as this time allows, only the rates that are given are tried, a
part of each half is evaluated, and a machine that turns out to be slow runs fewer seeds.

Step times are measured before the runs and after them, all contenders in turn: let nothing else
run then. A run's seconds are its steps times that. Results go to out/race/NAME: results.json,
table.md and race.svg. The same command goes on where it was stopped. Finished runs are kept in
out/race_runs, and count for other races with the same code, data and machine.
"""
import bisect
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

# So that python tools/race.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, fail, only_writer, replacing, run_script

# isort: split
import torch
from tqdm import tqdm

import train
from nanodva.checkpoints import load_checkpoint
from nanodva.dataset import open_data, table_rows
from nanodva.machine import Stop, pick_compile, pick_device, pick_dtype
from nanodva.settings import build, change, check, read_settings
from nanodva.tokenizer import Tokenizer
from nanodva.weights import outline
from tools.bench import compile_or_fail, contender, machine_name, own_settings, time_steps
from tools.report import draw_race, figures_of, table, write_json
from train import TrainConfig

ROOT = Path(__file__).parents[1]
RACES = Path("out", "race")
RUNS = Path("out", "race_runs")
# The settings of train.py that the race decides itself
DECIDED = ("block", "out_dir", "init_from", "learning_rate", "bank_lr", "min_lr", "lr_decay_iters",
           "eval_iters", "eval_train", "eval_only", "log_interval", "always_save_checkpoint",
           "patience", "backend", "wandb_log", "wandb_project", "wandb_run_name")
# What has to be the same for all contenders
COMMON = ("dataset", "data_dir", "block_size", "vocab_size", "eval_interval", "device", "seed",
          "overwrite")
# The code that a run's numbers follow from, in addition to the file that was run, which may bring
# blocks of its own
CODE = ("model.py", "train.py", "tools/race.py", "nanodva/*.py")
# A sweep ends with so many rates, even if the best is still at an end
MOST_RATES = 10
# With --minutes, runs of fewer steps would show nothing
LEAST_STEPS = 100
# With --minutes, so many tokens of each half are evaluated
EVALUATED = 2**14
# The time to evaluate a token as a share of the time to train on it: a third, and a little more
EVALUATION = 0.4


@dataclass
class RaceConfig(TrainConfig):
    name: str = ""                           # of the folder in out/race; empty: DATASET-MATCH
    contenders: str = "gpt2,gpt2:rotary=True,dva,dva+bank"      # the first is the reference
    against: str = ""                        # further contenders to compare all others with
    match: str = "tokens"                    # what is equal for all: tokens, or time
    minutes: float = 0.0                     # shorten the runs to end in time; 0: any time
    seeds: int = 5                           # runs that are reported, at the best rates
    seed: int = 1337                         # chooses the rates; the next ones are reported
    lrs: str = "3e-3,6e-3,1.2e-2"            # learning rates to begin with
    bank_lrs: str = "16,32,64"               # rates of the banks to begin with, in learning rates
    rounds: int = 20                         # timed steps of each, before the runs and after
    jobs: int = 1                            # runs at a time, which share the CPU's cores
    overwrite: bool = False                  # take the place of another race of this name

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(max_iters=1, minutes=0, seeds=1, rounds=1, jobs=1),
              choices=dict(match=["tokens", "time"]))
        read_rates("lrs", self.lrs)
        read_rates("bank_lrs", self.bank_lrs)
        names = self.contenders.split(",")
        if len(set(names)) < len(names):
            fail(f"contenders={self.contenders!r} names one of them twice")
        self.against = self.against or names[0]
        for name in self.against.split(","):
            if name not in names:
                fail(f"against: {name!r} is none of the contenders {', '.join(names)}")
        self.name = self.name or f"{self.dataset}-{self.match}"


def read_rates(name, text):
    """The learning rates in a setting such as lrs=3e-3,6e-3, rising. Raises UserError."""
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < math.inf for rate in rates):
        fail(f"{name}={text!r}: give rates above 0 with commas between, as in 3e-3,6e-3")
    return rates


# ---- who runs, and on what ---------------------------------------------------------------------

def halve(data, block_size, most):
    """
    data of open_data() with the first half of the validation split, which chooses learning rates,
    as "val", and the second, which is reported, as "test": `most` tokens of each, or all.
    """
    half = len(data["val"]) // 2
    if half <= block_size:
        fail(f"half of the validation split holds {half} tokens, and block_size={block_size} needs "
             f"at least {block_size + 1}: use a smaller --block_size or more text")
    return data | {"val": data["val"][:half][:most], "test": data["val"][half:][:most]}


def conditions_of(race, data, device):
    """What the numbers of a race follow from in addition to its settings, as a dict."""
    meta, ids = data["meta"], data["test"]
    tokenizer = Tokenizer(meta["tokenizer"])
    # End-of-text is a token, and no text. Characters have none.
    text = tokenizer.decode([i for i in ids.tolist() if i != tokenizer.end_of_text])
    files = [file for pattern in CODE for file in sorted(ROOT.glob(pattern))]
    if hasattr(sys.modules["__main__"], "__file__"):
        files.append(Path(sys.modules["__main__"].__file__))
    code = b"".join(file.read_bytes() for file in files)
    return {"dataset": race.dataset, "sha256": meta["sha256"], "tokens": meta["tokens"],
            "reported": {"tokens": len(ids), "bytes": len(text)}, "machine": machine_name(device),
            "device": device.type, "torch": torch.__version__,
            "code": hashlib.sha256(code).hexdigest()[:12]}


def enter(race, given, data, conditions, device):
    """
    {contender: TrainConfig}, from what the user gave. out_dir is the folder of its runs. dtype and
    compile, where they are auto, are decided by the first contender for all, so that none of them
    is compiled alone. Raises UserError for a contender that cannot run.
    """
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:10]
    settings = {"vocab_size": table_rows(data["meta"])} | given | {
        "overwrite": True, "out_dir": str(RUNS / digest), "eval_train": False,
        "log_interval": 100, "always_save_checkpoint": False,
        # As many batches as a half has tokens: all of its windows are evaluated
        "eval_iters": len(data["test"])}
    names = race.contenders.split(",")
    first = contender(names[0], settings)
    # With --minutes runs are too short to be compiled, each of them anew
    steps = 0 if race.minutes else first.max_iters
    flops = outline(first).flops_per_token() * batch_tokens(first) * steps
    settings |= {"dtype": pick_dtype(first.dtype, device, first.n_embd),
                 "compile": pick_compile(first.compile, device, flops)}
    contenders, refused = {}, {*DECIDED, *COMMON} - {"learning_rate", "bank_lr"}
    for name in names:
        for setting in own_settings(name).keys() & refused:
            fail(f"contender {name!r}: {setting} is not for a contender to set")
        contenders[name] = contender(name, settings)
    return contenders


def batch_tokens(cfg):
    """Tokens of one step."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def set_lengths(contenders, race, times, steps):
    """
    The contenders with the number of steps that the match gives them where the first has `steps`,
    unless they name their own, and with equally many evaluations. times are {contender:
    milliseconds of each timed step}.
    """
    first, lengths = next(iter(contenders)), {}
    # With --minutes, more evaluations would take most of the time
    evaluations = 3 if race.minutes else race.max_iters / race.eval_interval
    shorter = steps / contenders[first].max_iters
    for name, cfg in contenders.items():
        if race.match == "tokens":
            share = batch_tokens(contenders[first]) / batch_tokens(cfg)
        else:
            share = statistics.median(times[first]) / statistics.median(times[name])
        own = cfg.max_iters if "max_iters" in own_settings(name) else max(1, round(steps * share))
        lengths[name] = change(cfg, max_iters=own, lr_decay_iters=own,
                               eval_interval=max(1, round(own / evaluations)),
                               warmup_iters=round(cfg.warmup_iters * shorter))
    return lengths


def fit_in_time(contenders, race, times, seconds):
    """
    How many steps the first contender can have, at most its own number, if all runs together are
    to take 0.85 of so many seconds, since machines get slower as they get warm. Where that would
    be fewer than LEAST_STEPS, race.seeds becomes less, down to 2. Raises UserError where this is
    not enough.
    """
    def expected(steps):
        known, later = missing_runs(set_lengths(contenders, race, times, steps), race)
        return seconds_of([*known.values(), *later], times) / 0.85

    own = next(iter(contenders.values())).max_iters
    least = min(own, LEAST_STEPS)
    while expected(least) > seconds and race.seeds > 2:
        race.seeds -= 1
    if expected(least) > seconds:
        enough = math.ceil(race.minutes + (expected(least) - seconds) / 60)
        fail(f"minutes={race.minutes:g} is too short for runs of {least} steps with {race.seeds} "
             f"seeds to report: give {enough}, or fewer --contenders or --lrs, or a smaller model")
    return bisect.bisect(range(own + 1), seconds, lo=least, key=expected) - 1


def seconds_of(runs, times):
    """The time to expect of runs [(contender, TrainConfig)], one after the other."""
    seconds = 0.0
    for name, cfg in runs:
        # Each half of the validation split has eval_iters tokens
        steps_for_one = EVALUATION * 2 * cfg.eval_iters / batch_tokens(cfg)
        steps = cfg.max_iters + (cfg.max_iters // cfg.eval_interval + 1) * steps_for_one
        seconds += steps * statistics.median(times[name]) / 1e3
    return seconds


# ---- runs --------------------------------------------------------------------------------------

def run_of(cfg, learning_rate, bank_lr, seed):
    """The TrainConfig of one run. All its settings name its folder, so that it is known again."""
    cfg = change(cfg, learning_rate=learning_rate, min_lr=learning_rate / 10, bank_lr=bank_lr,
                 seed=seed)
    digest = hashlib.sha256(json.dumps(asdict(cfg)).encode()).hexdigest()[:10]
    shape = f"{cfg.block}-{cfg.n_layer}x{cfg.n_embd}"
    name = f"{shape}-lr{learning_rate:g}-bank{bank_lr:g}-seed{seed}-{digest}"
    return change(cfg, out_dir=str(Path(cfg.out_dir, name)))


def result_of(run):
    """
    {"steps", "val", "test", "broken"} of a finished run: lists of the steps at which it was
    evaluated and of the losses of both halves there, and None or why it broke. None for a run
    that is not finished.
    """
    path = Path(run.out_dir, "result.json")
    return json.loads(path.read_bytes()) if path.exists() else None


def final_loss(run):
    """The last loss of a finished run on the half that chooses; infinite where it broke."""
    result = result_of(run)
    return math.inf if result["broken"] else result["val"][-1]


def carry_out(run):
    """
    Train one run to its end, from its last checkpoint if it was stopped. Returns whether it is
    finished. What it prints is in its folder's log.txt.
    """
    folder = Path(run.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log), \
            Stop() as stop:
        torch.compiler.reset()
        compile_or_fail()
        saved, broken = folder / "last.pt", None
        checkpoint = load_checkpoint(saved) if saved.exists() else None
        data = halve(open_data(run), run.block_size, run.eval_iters)
        try:
            done = train.train(run, pick_device(run.device), stop, checkpoint, data=data)
            if done["stopped"]:
                return False
        except train.BrokenLoss as error:
            broken = str(error)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        records = [record for record in records if "test_loss" in record]
        result = {"steps": [record["step"] for record in records],
                  "val": [round(record["val_loss"], 5) for record in records],
                  "test": [round(record["test_loss"], 5) for record in records],
                  "broken": broken}
        write_json(result, folder / "result.json")
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    return True


# ---- which runs are needed ---------------------------------------------------------------------

def sweep(cfg, name, rates, fixed, extend):
    """
    (runs, best run) of the contender cfg at rates of `name`, learning_rate or bank_lr, and at the
    `fixed` other settings of run_of(). Where only one rate is given, nothing has to be run. If
    `extend`, further rates follow while the best is at an end of them. The best run is None while
    a run is not finished.
    """
    if len(rates) == 1:
        return [], run_of(cfg, **fixed, **{name: rates[0]})
    while True:
        runs = [run_of(cfg, **fixed, **{name: rate}) for rate in rates]
        if any(result_of(run) is None for run in runs):
            return runs, None
        losses = [final_loss(run) for run in runs]
        best = losses.index(min(losses))
        if not extend or len(rates) >= MOST_RATES or 0 < best < len(rates) - 1:
            return runs, runs[best]
        end, inner = (rates[0], rates[1]) if best == 0 else (rates[-1], rates[-2])
        rates = sorted([*rates, float(f"{end * end / inner:.3g}")])


def tune(name, cfg, race):
    """
    (runs, best run, later) of a contender's sweeps: those whose rates are known; the best of them,
    or None while one is not finished; and how many will follow at least. They are evaluated at
    their end alone.
    """
    cfg = change(cfg, eval_interval=cfg.max_iters)
    own, extend = own_settings(name), not race.minutes
    rates = [cfg.learning_rate] if "learning_rate" in own else read_rates("lrs", race.lrs)
    bank_rates = [cfg.bank_lr]
    if cfg.bank_layers and "bank_lr" not in own:
        bank_rates = read_rates("bank_lrs", race.bank_lrs)
    fixed = dict(bank_lr=cfg.bank_lr, seed=race.seed)
    runs, best = sweep(cfg, "learning_rate", rates, fixed, extend)
    if not best:
        return runs, None, len(set(bank_rates) - {cfg.bank_lr})
    fixed = dict(learning_rate=best.learning_rate, seed=race.seed)
    more, best = sweep(cfg, "bank_lr", bank_rates, fixed, extend)
    return runs + [run for run in more if run not in runs], best, 0


def seeds_of(best, cfg, race):
    """
    The runs that are reported, at the rates of a contender's best run. The seed that chose the
    rates is not among them, because they suit it by more than they suit others.
    """
    return [run_of(cfg, best.learning_rate, best.bank_lr, race.seed + 1 + i)
            for i in range(race.seeds)]


def missing_runs(contenders, race):
    """
    ({folder: (contender, run)}, [(contender, TrainConfig)]) of the runs that are not finished:
    those whose rates are known, in the order to run them, and those that will follow at least.
    """
    known, later = {}, []
    for name, cfg in contenders.items():
        runs, best, more = tune(name, cfg, race)
        if best:
            runs = runs + seeds_of(best, cfg, race)
        else:
            later += [(name, cfg)] * (more + race.seeds)
        known |= {run.out_dir: (name, run) for run in runs if result_of(run) is None}
    # All sweeps, then one seed of all contenders after the other, so that seeds can be left out
    return dict(sorted(known.items(), key=lambda item: item[1][1].seed)), later


# ---- workers -----------------------------------------------------------------------------------

def begin_worker(threads):
    """Prepare a new worker process: so many threads, and it ends when the race does."""
    torch.set_num_threads(threads)
    # Its bars need no lock that other processes share, which a worker that is ended would leave
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=end_with_race, daemon=True).start()


def end_with_race():
    """Wait until the race has ended or was killed, and end this process, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(run):
    """carry_out() in a worker process. One that was told to stop has saved its run, and ends."""
    if not carry_out(run):
        os._exit(1)


def run_all(contenders, race, times, stop, deadline):
    """
    Carry out the missing runs, race.jobs at a time, until none is needed or a stop is asked for.
    Where they would end after the deadline, race.seeds becomes less. Raises what a worker raises,
    and UserError where one dies.
    """
    threads = max(1, torch.get_num_threads() // race.jobs)
    start, under_way = time.time(), {}                  # future: (contender, run, when it began)
    # The seconds that finished runs took, and those that were expected of each alone. Before there
    # are any, the jobs are expected to share the machine.
    taken, expected = race.jobs, 1.0
    announce(f"the plan: {len(contenders)} contenders, seeds to report: {race.seeds}", contenders,
             race, times, under_way, taken / expected, deadline)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(race.jobs, spawn, begin_worker, (threads,)) as pool:
        try:
            while not stop.signal:
                known, _ = missing_runs(contenders, race)
                running = [run.out_dir for _, run, _ in under_way.values()]
                waiting = [folder for folder in known if folder not in running]
                for folder in waiting[:race.jobs - len(under_way)]:
                    (name, run), begun = known[folder], time.time()
                    # Ctrl-C goes to all processes of a terminal. The worker that may start here
                    # ignores it except while it trains.
                    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
                    under_way[pool.submit(work, run)] = name, run, begun
                    signal.signal(signal.SIGINT, before)
                if not under_way:
                    return
                for future in wait(under_way, 1, FIRST_COMPLETED).done:
                    name, run, begun = under_way.pop(future)
                    future.result()
                    taken += time.time() - begun
                    expected += seconds_of([(name, run)], times)
                    passed = tqdm.format_interval(time.time() - start)
                    bank = f" x {run.bank_lr:g}" if run.bank_layers else ""
                    announce(f"{passed}  {name}, learning rate {run.learning_rate:g}{bank}, seed "
                             f"{run.seed}: {final_loss(run):.4f} on the first half", contenders,
                             race, times, under_way, taken / expected, deadline)
        except BrokenProcessPool:
            if not stop.signal:
                fail("a worker died, perhaps for lack of memory: log.txt in its run's folder, in "
                     f"{RUNS}, may say more; the same command goes on")
        finally:
            # A worker in the middle of a run saves its state before it ends
            for process in multiprocessing.active_children():
                process.terminate()


def announce(news, contenders, race, times, under_way, pace, deadline):
    """
    Print the news, how many runs are missing, and when they should end if each takes `pace` times
    what is expected of it alone. Where that is after the deadline, race.seeds becomes less, down
    to 2.
    """
    planned = race.seeds
    while True:
        known, later = missing_runs(contenders, race)
        left = pace * seconds_of([*known.values(), *later], times)
        left -= sum(time.time() - begun for _, _, begun in under_way.values())
        end = time.time() + left / race.jobs
        if end <= deadline or later or race.seeds <= 2:
            break
        race.seeds -= 1
    if race.seeds < planned:
        news += f"; too slow for {planned} seeds, {race.seeds} will be reported"
    least = "at least " if later and not race.minutes else ""
    print(f"{news}; runs to go: {least}{len(known) + len(later)}, until about "
          f"{time.strftime('%H:%M', time.localtime(end))}", flush=True)


# ---- what is written ---------------------------------------------------------------------------

def facts_of(contenders, race, before, after):
    """
    {contender: what its runs came to}: settings, size, the step times before and after the runs,
    the sweep's losses on the first half, and the curves of the seeds that are reported.
    """
    facts = {}
    for name, cfg in contenders.items():
        tried, best, _ = tune(name, cfg, race)
        model = outline(cfg)
        sweep = [{"learning_rate": run.learning_rate, "bank_lr": run.bank_lr,
                  "loss": None if result_of(run)["broken"] else final_loss(run)}
                 for run in tried]
        facts[name] = {"settings": asdict(cfg), "parameters": model.num_params(),
                       "flops_per_token": model.flops_per_token(),
                       "ms_before": before[name], "ms_after": after[name],
                       "learning_rate": best.learning_rate, "bank_lr": best.bank_lr,
                       "sweep": sweep, "runs": [{"seed": run.seed} | result_of(run)
                                                for run in seeds_of(best, cfg, race)]}
    return facts


def claim_folder(folder, description, overwrite):
    """
    What race.json in the folder holds about this race if it was begun before; `description` tells
    which race it is. Raises UserError where the folder holds another one, unless that may go.
    """
    path, new = folder / "race.json", {"description": description}
    kept = json.loads(path.read_bytes()) if path.exists() else new
    theirs = kept["description"]
    different = [name for name in description | theirs
                 if description.get(name) != theirs.get(name)]
    if different and not overwrite:
        fail(f"{folder} holds another race, which differs in {', '.join(different)}: keep both "
             f"with another --name=, or let this one take its place with --overwrite=True")
    return new if different else kept


def commit():
    """The git commit of this code, with -dirty after it where files were changed since."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None):
    began = time.time()
    argv = list(sys.argv[1:] if argv is None else argv)
    if all(argument.startswith("-") for argument in argv):
        argv.insert(0, str(ROOT / "config" / "race_laptop.py"))
    given = read_settings(RaceConfig, argv, without=DECIDED)
    race = build(RaceConfig, given)
    print(f"a race of {race.contenders} on {race.dataset}; its plan follows the timing of steps",
          flush=True)
    device = pick_device(race.device)
    data = open_data(race)
    data = halve(data, race.block_size, EVALUATED if race.minutes else len(data["val"]))
    conditions = conditions_of(race, data, device)
    contenders = enter(race, given, data, conditions, device)
    rules = {name: getattr(race, name) for name in
             ("contenders", "match", "minutes", "seeds", "seed", "lrs", "bank_lrs", "rounds")}
    description = rules | conditions | {name: asdict(cfg) for name, cfg in contenders.items()}
    folder = RACES / race.name
    # The workers of a race that was killed need a moment to end
    with only_writer(folder, patience=10):
        kept = claim_folder(folder, description, race.overwrite)
        is_new = "before" not in kept
        if is_new:
            kept["before"] = dict(time_steps(contenders, device, race.rounds))
        deadline = math.inf
        if race.minutes:
            # The steps are timed once more at the end
            timing = sum(map(sum, kept["before"].values())) / 1e3
            deadline = began + 60 * race.minutes - 1.2 * timing - 5
        if is_new:
            kept["steps"] = fit_in_time(contenders, race, kept["before"], deadline - time.time())
            kept["seeds"] = race.seeds
            write_json(kept, folder / "race.json")
        race.seeds = kept["seeds"]
        contenders = set_lengths(contenders, race, kept["before"], kept["steps"])
        with Stop() as stop:
            run_all(contenders, race, kept["before"], stop, deadline)
        known, later = missing_runs(contenders, race)
        if known or later:
            print("stopped; the same command goes on, and finished runs are not run again",
                  file=sys.stderr)
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        if "after" not in kept:
            kept["after"] = dict(time_steps(contenders, device, race.rounds))
            kept["seeds"] = race.seeds
            write_json(kept, folder / "race.json")
        facts = facts_of(contenders, race, kept["before"], kept["after"])
        figures = figures_of(facts, race.against.split(","))
        results = {"name": race.name, "rules": rules | {"seeds": race.seeds},
                   "conditions": conditions, "commit": commit(),
                   "python": platform.python_version(), "threads": torch.get_num_threads(),
                   "contenders": facts, "figures": figures}
        write_json(results, folder / "results.json")
        text = table(results)
        with replacing(folder / "table.md") as file:
            file.write(text.encode())
        print(f"{text}\nall is in {folder}/")
        try:
            draw_race(results, folder / "race.svg")
        except UserError as error:
            # Without matplotlib there is no picture, but all figures are there
            print(error)


if __name__ == "__main__":
    run_script(main)
