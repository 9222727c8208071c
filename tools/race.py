"""
Race blocks against each other on equal terms: the same tokens, batches and validation text, each
at its own best learning rate, over several seeds, with an interval for every difference.

    python -m tools.race --jobs=2                            config/race_laptop.py
    python -m tools.race config/race_bpe.py --contenders=gpt2:rotary=True,dva,dva+bank
    python -m tools.race --match=time --seeds=3 --highlight=gpt2,dva

A contender is a block, perhaps with +bank (a bank in the last third of its layers), perhaps with
settings of train.py, as in dva+bank:qk_dim=32. The first one is the reference: all others get its
number of tokens, or with --match=time its training time.

The validation split is cut in two. Its first half chooses: every rate in --lrs is tried with the
first seed, and further ones while the best is at an end of those tried; then, for contenders with
banks, those in --bank_lrs at the best learning rate. With --sweep_share=0.25 these runs have a
quarter of the steps; mind that short runs favour high rates (docs/race.md has an example).
:learning_rate= and :bank_lr= fix a contender's own. Its second half is reported, for all seeds
at the best rates. Two contenders are compared seed by seed, since equal seeds see equal batches:
Student's t gives the 95 % interval of the mean difference.

Step times are measured before the runs and after them, all contenders in turn: let nothing else
run then. A run's seconds are its steps times that. Results go to out/race/NAME: results.json,
table.md, race.svg and race-all.svg. The same command goes on where it was stopped. Finished runs
are kept in out/race_runs, and count for other races with the same code, data and machine.
"""
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

# So that python tools/race.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from nanodva.checkpoints import load_checkpoint
from nanodva.errors import UserError, fail, replacing, run_script
from nanodva.machine import Stop, pick_compile, pick_device, pick_dtype
from nanodva.settings import build, change, check, read_settings
from nanodva.weights import build_model
from prepare_data import read_meta
from tools.bench import compile_or_fail, contender, machine_name, own_settings, time_steps
from tools.report import COLOURS, draw_all, figures_of, table
from train import TrainConfig

ROOT = Path(__file__).parents[1]
RACES = Path("out", "race")
RUNS = Path("out", "race_runs")
# The settings of train.py that the race decides itself
DECIDED = ("block", "out_dir", "overwrite", "init_from", "learning_rate", "bank_lr", "min_lr",
           "lr_decay_iters", "eval_iters", "eval_train", "eval_only", "log_interval", "seed",
           "always_save_checkpoint", "backend", "wandb_log", "wandb_project", "wandb_run_name")
# Settings of that name that are the race's own
OWN = {"seed", "overwrite"}
# What has to be the same for all contenders
COMMON = ("dataset", "data_dir", "block_size", "vocab_size", "eval_interval", "device")
# What a run's numbers follow from, beside its settings
CODE = ("model.py", "train.py", "nanodva/optimizers.py", "nanodva/machine.py",
        "nanodva/weights.py", "nanodva/settings.py")
# A sweep ends with so many rates, even if the best is still at an end
MOST_RATES = 10


@dataclass
class RaceConfig(TrainConfig):
    name: str = ""                           # of the folder in out/race; empty: DATASET-MATCH
    contenders: str = "gpt2,gpt2:rotary=True,dva,dva+bank"      # the first is the reference
    against: str = ""                        # further contenders to compare all others with
    match: str = "tokens"                    # what is equal for all: tokens, or time
    seeds: int = 5                           # runs at the best rates
    seed: int = 1337                         # the first of the seeds
    lrs: str = "3e-3,6e-3,1.2e-2"            # learning rates to begin with
    bank_lrs: str = "16,32,64"               # rates of the banks to begin with, in learning rates
    sweep_share: float = 1.0                 # length of the runs that choose rates, of the others'
    rounds: int = 20                         # timed steps of each, before the runs and after
    jobs: int = 1                            # runs at a time, which share the CPU's cores
    highlight: str = ""                      # drawn in colour, four at most; empty: the first four
    overwrite: bool = False                  # take the place of another race of this name

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(seeds=1, rounds=1, jobs=1, max_iters=1),
              choices=dict(match=["tokens", "time"]))
        if not 0 < self.sweep_share <= 1:
            fail(f"sweep_share={self.sweep_share}: it must be above 0 and at most 1")
        read_rates("lrs", self.lrs)
        read_rates("bank_lrs", self.bank_lrs)
        names = self.contenders.split(",")
        if len(set(names)) < len(names):
            fail(f"contenders={self.contenders!r} names one of them twice")
        for setting in ("against", "highlight"):
            for name in split(getattr(self, setting)):
                if name not in names:
                    fail(f"{setting}: {name!r} is none of the contenders {', '.join(names)}")
        if len(split(self.highlight)) > len(COLOURS):
            fail(f"highlight={self.highlight!r}: four at most")
        self.name = self.name or f"{self.train.dataset}-{self.match}"
        self.highlight = self.highlight or ",".join(names[:len(COLOURS)])


def split(text):
    """The parts of a text with commas between them; an empty one has none."""
    return text.split(",") if text else []


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

def halve(data, block_size):
    """
    data of train.open_data() with the first half of the validation split, which chooses learning
    rates, as "val", and the second, which is reported, as "test".
    """
    half = len(data["val"]) // 2
    if half <= block_size:
        fail(f"half of the validation split holds {half} tokens, and block_size={block_size} needs "
             f"at least {block_size + 1}: use a smaller --block_size or more text")
    return data | {"val": data["val"][:half], "test": data["val"][half:]}


def conditions_of(race, meta, device):
    """What the numbers of a race follow from beside its settings, as a dict of text and numbers."""
    code = b"".join((ROOT / name).read_bytes() for name in CODE)
    return {"dataset": race.dataset, "sha256": meta["sha256"], "tokens": meta["tokens"],
            "bytes": meta["bytes"], "machine": machine_name(device), "device": device.type,
            "torch": torch.__version__, "code": hashlib.sha256(code).hexdigest()[:12]}


def enter(race, given, conditions, device):
    """
    {contender: TrainConfig}, from what the user gave. out_dir is the folder of its runs. dtype and
    compile, where they are auto, are decided by the first contender for all, so that none of them
    is compiled alone. Raises UserError for a contender that cannot run.
    """
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:10]
    meta = read_meta(Path(race.data_dir, race.dataset))
    settings = {"vocab_size": train.table_rows(meta)} | given | {
        "overwrite": True, "out_dir": str(RUNS / digest), "eval_train": False,
        "log_interval": 100, "always_save_checkpoint": False,
        # More batches than there are: all windows of a split
        "eval_iters": meta["tokens"]["val"]}
    names = race.contenders.split(",")
    first = contender(names[0], settings)
    with torch.device("meta"):
        flops = build_model(first).flops_per_token() * batch_tokens(first) * first.max_iters
    settings |= {"dtype": pick_dtype(first.dtype, device, first.n_embd),
                 "compile": pick_compile(first.compile, device, flops)}
    contenders = {}
    for name in names:
        own = own_settings(name)
        for setting in (set(DECIDED) - {"learning_rate", "bank_lr"} | set(COMMON)) & own.keys():
            fail(f"contender {name!r}: {setting} is not for a contender to set")
        if "auto" in (own.get("dtype"), own.get("compile")):
            fail(f"contender {name!r}: say outright which dtype, and whether to compile")
        contenders[name] = contender(name, settings)
    halve(train.open_data(first), first.block_size)
    return contenders


def batch_tokens(cfg):
    """Tokens of one step."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def set_lengths(contenders, race, times):
    """
    The contenders with the number of steps that the match gives them, unless they name their own,
    and with equally many evaluations. times are {contender: milliseconds of each timed step}.
    """
    first, lengths = next(iter(contenders)), {}
    for name, cfg in contenders.items():
        if race.match == "tokens":
            share = batch_tokens(contenders[first]) / batch_tokens(cfg)
        else:
            share = statistics.median(times[first]) / statistics.median(times[name])
        steps = max(1, round(contenders[first].max_iters * share))
        if "max_iters" in own_settings(name):
            steps = cfg.max_iters
        interval = max(1, round(steps * race.eval_interval / race.max_iters))
        lengths[name] = change(cfg, max_iters=steps, lr_decay_iters=steps, eval_interval=interval)
    return lengths


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


def final_loss(run, half):
    """The last loss of a finished run on a half, "val" or "test"; infinite where it broke."""
    result = result_of(run)
    return math.inf if result["broken"] else result[half][-1]


def carry_out(run):
    """
    Train one run to its end, from its last checkpoint if it was stopped. Returns whether it is
    finished. What it prints is in its folder's log.txt.
    """
    folder = Path(run.out_dir)
    with only_writer(folder), open(folder / "log.txt", "a") as log, redirect_stdout(log), \
            redirect_stderr(log), Stop() as stop:
        torch.compiler.reset()
        compile_or_fail()
        saved, broken = folder / "last.pt", None
        checkpoint = load_checkpoint(saved) if saved.exists() else None
        data = halve(train.open_data(run), run.block_size)
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
        with replacing(folder / "result.json") as file:
            file.write(json.dumps(result).encode())
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    return True


@contextmanager
def only_writer(folder, patience=10):
    """
    Make the folder and hold its lock, which the system frees when this process ends, in whatever
    way. Raises UserError where another process keeps it for so many seconds; a worker whose race
    was killed needs a moment to end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / "lock", timeout=patience).acquire()
    except Timeout:
        fail(f"another process writes in {folder}: wait for it, or stop it")
    with held:
        yield


# ---- which runs are needed ---------------------------------------------------------------------

def sweep(cfg, name, rates, fixed):
    """
    (runs, best run) of the contender cfg at rates of `name`, learning_rate or bank_lr, and at the
    `fixed` other settings of run_of(). Further rates follow while the best is at an end of them.
    The best run is None while a run is not finished.
    """
    while True:
        runs = [run_of(cfg, **fixed, **{name: rate}) for rate in rates]
        if any(result_of(run) is None for run in runs):
            return runs, None
        losses = [final_loss(run, "val") for run in runs]
        best = losses.index(min(losses))
        if len(rates) == 1 or len(rates) >= MOST_RATES or 0 < best < len(rates) - 1:
            return runs, runs[best]
        if best == 0:
            beyond = rates[0] * rates[0] / rates[1]
        else:
            beyond = rates[-1] * rates[-1] / rates[-2]
        rates = sorted([*rates, float(f"{beyond:.3g}")])


def shortened(cfg, share):
    """
    The TrainConfig cfg with this share of its steps and of its warm-up, and evaluated at its end
    alone. All of cfg is cfg itself, whose run counts for the seeds, too.
    """
    if share == 1:
        return cfg
    steps = max(1, round(cfg.max_iters * share))
    return change(cfg, max_iters=steps, lr_decay_iters=steps, eval_interval=steps,
                  warmup_iters=round(cfg.warmup_iters * share))


def tune(name, cfg, race):
    """(runs of a contender's sweeps, best run), the latter None while a run is not finished."""
    cfg = shortened(cfg, race.sweep_share)
    own = own_settings(name)
    rates, bank_rates = read_rates("lrs", race.lrs), read_rates("bank_lrs", race.bank_lrs)
    if "learning_rate" in own:
        rates = [cfg.learning_rate]
    runs, best = sweep(cfg, "learning_rate", rates, dict(bank_lr=cfg.bank_lr, seed=race.seed))
    if best and cfg.bank_layers and "bank_lr" not in own:
        fixed = dict(learning_rate=best.learning_rate, seed=race.seed)
        more, best = sweep(cfg, "bank_lr", bank_rates, fixed)
        runs += [run for run in more if run not in runs]
    return runs, best


def seeds_of(best, cfg, race):
    """The runs of all seeds at the rates of a contender's best run."""
    return [run_of(cfg, best.learning_rate, best.bank_lr, race.seed + i) for i in range(race.seeds)]


def missing_runs(contenders, race):
    """{folder: (contender, run)} of the runs that are needed, as is known now, and not finished."""
    missing = {}
    for name, cfg in contenders.items():
        runs, best = tune(name, cfg, race)
        if best:
            runs = runs + seeds_of(best, cfg, race)
        missing |= {run.out_dir: (name, run) for run in runs if result_of(run) is None}
    return missing


# ---- workers -----------------------------------------------------------------------------------

def work(connection, threads):
    """
    A worker process: carry out each run that comes through the connection, and answer whether it
    is finished, or with the UserError that it raised.
    """
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(carry_out(connection.recv()))
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        # The race has closed the connection, or the user pressed Ctrl-C twice
        return


def end_with_parent():
    """Wait until the race is no more, even by a kill, and end."""
    wait_for_any([multiprocessing.parent_process().sentinel])
    os._exit(1)


def start_worker(threads):
    """(process, the race's end of the connection to it)."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, threads))
    # Ctrl-C goes to all processes of a terminal. A worker ignores it but for the time of its runs.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, before)
    # Now only the worker holds its end, and ours tells when the worker is no more
    theirs.close()
    return process, ours


def run_all(contenders, race, stop):
    """
    Carry out the missing runs, race.jobs at a time, until none is known to be needed or a stop is
    asked for. Raises UserError where a worker does, or where one dies.
    """
    threads = max(1, torch.get_num_threads() // race.jobs)
    start, count = time.perf_counter(), 0
    workers, under_way = {}, {}         # connection: process; connection: (contender, run)
    try:
        while not stop.signal:
            missing = missing_runs(contenders, race)
            begun = [run.out_dir for _, run in under_way.values()]
            waiting = [folder for folder in missing if folder not in begun]
            for folder in waiting[:race.jobs - len(under_way)]:
                idle = [connection for connection in workers if connection not in under_way]
                if idle:
                    connection = idle[0]
                else:
                    process, connection = start_worker(threads)
                    workers[connection] = process
                connection.send(missing[folder][1])
                under_way[connection] = missing[folder]
            if not under_way:
                return
            for connection in wait_for_any(list(under_way), timeout=1):
                name, run = under_way.pop(connection)
                answer = connection.recv()
                if isinstance(answer, UserError):
                    raise answer
                if not answer:
                    # It was told to stop, as by Ctrl-C. If the race was not, the run goes on.
                    continue
                missing.pop(run.out_dir, None)
                count += 1
                passed = time.perf_counter() - start
                left = tqdm.format_interval(passed / count * len(missing))
                print(f"{tqdm.format_interval(passed)}  {name}, learning rate "
                      f"{run.learning_rate:g}, seed {run.seed}: {final_loss(run, 'val'):.4f} on "
                      f"the first half; {len(missing)} more to do as far as is known, about "
                      f"{left}", flush=True)
    except (EOFError, ConnectionError):
        if not stop.signal:
            fail("a worker died, perhaps for lack of memory: log.txt in its run's folder, in "
                 f"{RUNS}, may say more; the same command goes on")
    finally:
        # A worker in the middle of a run saves its state before it ends
        for connection in under_way:
            workers[connection].terminate()
        for connection in workers:
            connection.close()
        for process in workers.values():
            process.join()


# ---- what is written ---------------------------------------------------------------------------

def facts_of(contenders, race, before, after):
    """
    {contender: what its runs came to}: settings, size, the step times before and after the runs,
    the sweep's losses on the first half, and the curves of all seeds at the best rates.
    """
    facts = {}
    for name, cfg in contenders.items():
        tried, best = tune(name, cfg, race)
        with torch.device("meta"):
            model = build_model(cfg)
        sweep = [{"learning_rate": run.learning_rate, "bank_lr": run.bank_lr,
                  "loss": None if result_of(run)["broken"] else final_loss(run, "val")}
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
    What race.json in the folder keeps of the race that `description` is of, if it was begun.
    Raises UserError where the folder holds another race, unless that may go.
    """
    path = folder / "race.json"
    files = [folder / name for name in
             ("race.json", "results.json", "table.md", "race.svg", "race-all.svg")]
    if any(file.exists() for file in files):
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        difference = first_difference(description, kept.get("description", {}))
        if not difference:
            return kept
        if not overwrite:
            fail(f"{folder} holds another race, with {difference}: keep both with another --name=, "
                 f"or let this one take its place with --overwrite=True")
    for file in files:
        file.unlink(missing_ok=True)
    return {"description": description}


def first_difference(ours, theirs):
    """In words where two dicts differ first; "" where they do not."""
    for name in ours | theirs:
        our, their = ours.get(name), theirs.get(name)
        if isinstance(our, dict) and isinstance(their, dict):
            deeper = first_difference(our, their)
            if deeper:
                return f"{name}: {deeper}"
        elif our != their:
            return f"{name}={their!r} where this one has {our!r}"
    return ""


def write_json(value, path):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def commit():
    """The git commit of this code, with -dirty behind it where files were changed since."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.endswith(".py") for argument in argv if not argument.startswith("-")):
        argv.insert(0, str(ROOT / "config" / "race_laptop.py"))
    given = read_settings(RaceConfig, argv, without=set(DECIDED) - OWN)
    race = build(RaceConfig, given)
    device = pick_device(race.device)
    meta = read_meta(Path(race.data_dir, race.dataset))
    conditions = conditions_of(race, meta, device)
    contenders = enter(race, given, conditions, device)
    rules = ("contenders", "match", "seeds", "seed", "lrs", "bank_lrs", "sweep_share", "rounds")
    description = {"rules": {name: getattr(race, name) for name in rules},
                   "conditions": conditions,
                   "contenders": {name: asdict(cfg) for name, cfg in contenders.items()}}
    folder = RACES / race.name
    with only_writer(folder):
        kept = claim_folder(folder, description, race.overwrite)
        if "before" not in kept:
            kept["before"] = time_steps(contenders, device, race.rounds)
            write_json(kept, folder / "race.json")
        contenders = set_lengths(contenders, race, kept["before"])
        with Stop() as stop:
            run_all(contenders, race, stop)
        if missing_runs(contenders, race):
            print("stopped; the same command goes on, and finished runs are not run again",
                  file=sys.stderr)
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        if "after" not in kept:
            kept["after"] = time_steps(contenders, device, race.rounds)
            write_json(kept, folder / "race.json")
        facts = facts_of(contenders, race, kept["before"], kept["after"])
        figures = figures_of(facts, split(race.against))
        results = {"name": race.name, "rules": description["rules"], "conditions": conditions,
                   "commit": commit(), "python": platform.python_version(),
                   "threads": torch.get_num_threads(), "contenders": facts, "figures": figures}
        write_json(results, folder / "results.json")
        text = table(results)
        with replacing(folder / "table.md") as file:
            file.write(text.encode())
        draw_all(results, split(race.highlight), folder)
    print(f"{text}\nall is in {folder}/")


if __name__ == "__main__":
    run_script(main)
