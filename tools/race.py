"""
Race blocks against each other: on the same text, each at its own best settings, over several seeds.

    python -m tools.race --minutes=10                                 a race for a lesson
    python -m tools.race config/race_ladder.py config/race_4x64.py    a rung of docs/race.md
    python -m tools.race config/race_bpe.py --contenders=gpt2:rotary=True,dva,dva+bank --jobs=2

A contender is a block, perhaps with +bank (banks in the last third of its layers), perhaps with
settings of train.py:  dva+bank:qk_dim=32.  The first contender is the reference.

    wide=dva:n_embd=96          a label in front; a later contender can begin with it instead of a
    long=wide:match=time        block, and takes over its settings, the chosen ones too
    dva:qk_dim=16|32|64         the race chooses: one setting after the other, in this order
    dva:match=time              trains for the reference's seconds, not on as many tokens
    dva:warmup=0.05             the share of a run in which the learning rate rises

Half of the validation windows choose, with one seed or --choosing, by whole runs. Each contender
tries the learning rates in --lrs, or those around the rate that it takes over, and further ones
while the best is at an end; then its own choices; then the learning rates around the best again.
Banks try --bank_lrs likewise. On the other windows --seeds other seeds are reported, compared seed
by seed, since equal seeds see equal batches, with the 95 % interval of Student's t.

With --minutes the race takes two steps of each contender first and says what fits: fewer seeds,
then shorter runs, then smaller models. It tries only the rates and choices that are given.

Seconds are a run's steps times the time of its step, that of the fastest tenth, measured with one
thread and in turn with the first contender's; on a CPU the time of other programs does not count,
but they share its caches: let none run meanwhile. A folder in --results gets runs.jsonl (a line for
each finished run), results.json, table.md and race.svg. A run in runs.jsonl is never made again,
whatever has changed in the code: its line names the commit. The same command goes on where it was
stopped.
"""
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path

# So that python tools/race.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it reports missing packages in one line
from nanodva.errors import UserError, fail, only_writer, replacing, run_script

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model
import train
from model import ModelConfig
from nanodva.checkpoints import load_checkpoint
from nanodva.dataset import open_data, table_rows
from nanodva.machine import Stop, autocast, pick_compile, pick_device, pick_dtype
from nanodva.optimizers import parameter_groups
from nanodva.settings import PathName, build, check, read_settings
from nanodva.weights import load_model, outline
from tools.bench import WARM_UP, compile_or_fail, machine_name, training_step
from tools.report import draw_race, read_lines, table, write_json
from train import TrainConfig

ROOT = Path(__file__).parents[1]
RUNS = Path("out", "race_runs")
# The settings of train.py that the race decides itself
DECIDED = ("block", "out_dir", "init_from", "learning_rate", "bank_lr", "min_lr", "warmup_iters",
           "lr_decay_iters", "eval_interval", "eval_iters", "eval_train", "eval_only", "overwrite",
           "eval_tokens", "log_interval", "always_save_checkpoint", "save_interval_s", "patience",
           "dry_run", "backend", "wandb_log", "wandb_project", "wandb_run_name")
# What has to be the same for all contenders
COMMON = ("dataset", "data_dir", "block_size", "vocab_size", "device", "seed", "max_iters")
# Settings of a run that do not change its losses
LOCAL = ("out_dir", "data_dir", "overwrite", "log_interval", "eval_interval", "eval_iters",
         "eval_train", "always_save_checkpoint", "device", "seed")
# A run's last learning rate as a share of the highest
LAST = 0.02
# The rates that are tried beyond those given while the best is at an end, up to so many
RATES, MOST_RATES = ("learning_rate", "bank_lr"), 10
# So many steps of one model are timed before the next model's turn: a run has the caches to itself,
# and the first step after another model's is slower, by 10 % at 128 channels
TURN = 10
# Points of a run's curve: means of the training loss. Each batch is new, so far as the text goes.
POINTS = 30
# With --minutes: fewer steps show little, so smaller models come first; tokens of each half that
# are evaluated; the time to evaluate them as a share of the time to train on as many
LEAST_STEPS = 100
SMALLER = dict(n_layer=2, n_head=2, n_embd=64, qk_dim=32)
EVALUATED = 2**14
EVALUATION = 0.4
# Seconds of a race in which its own start, a worker's and the picture's pass
STARTING = 15


@dataclass
class Contender(TrainConfig):
    match: str = "tokens"                    # equal to the reference: tokens, or time
    warmup: float = 0.1                      # the share of a run in which the rate rises

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(warmup=0), choices=dict(match=["tokens", "time"]))


@dataclass
class RaceConfig(Contender):
    name: str = ""                           # of the race's folder; empty: DATASET-MATCH
    results: PathName = "out/race"           # where that folder is
    contenders: str = "gpt2:rotary=True,dva,dva+bank"   # the first is the reference
    against: str = ""                        # labels of further ones to compare all others with
    tokens_per_parameter: float = 0.0        # length of the reference's runs; 0: max_iters steps
    minutes: float = 0.0                     # shrink the race to end in time; 0: any time
    seeds: int = 5                           # runs that are reported, at the best settings
    seed: int = 1337                         # chooses the settings; the next ones are reported
    choosing: int = 1                        # seeds that choose, by their mean: down from seed
    lrs: str = "3e-3,6e-3,1.2e-2"            # learning rates to begin with
    bank_lrs: str = "16,32,64"               # rates of the banks to begin with, in learning rates
    evaluated: int = 262144                  # tokens of each half that are evaluated
    rounds: int = 100                        # timed steps of each contender, ten in a row
    jobs: int = 1                            # runs at a time, a thread each; 0: only the tables
    # Without a preset: nanoGPT's laptop size
    dataset: str = "shakespeare_char"        # folder in data_dir, made by prepare_data.py
    n_layer: int = 4                         # blocks
    n_head: int = 4                          # heads of a gpt2 block; a dva block has one
    n_embd: int = 128                        # width C of the residual stream
    block_size: int = 64                     # context length T, in tokens
    gradient_accumulation_steps: int = 1     # micro-batches per step
    max_iters: int = 2000                    # steps of the reference
    optimizer: str = "muon"                  # adamw, or muon: Muon on the blocks' matrices

    def __post_init__(self):
        super().__post_init__()
        check(self, least=dict(max_iters=1, minutes=0, seeds=1, rounds=1, jobs=0, evaluated=1,
                               choosing=1, tokens_per_parameter=0))
        read_rates("lrs", self.lrs)
        read_rates("bank_lrs", self.bank_lrs)
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


# ---- contenders --------------------------------------------------------------------------------

def read_contenders(race):
    """{label: (base, {setting: list of values})} of race.contenders, in order."""
    found = {}
    for text in race.contenders.split(","):
        head, *pairs = text.strip().split(":")
        label, _, base = head.rpartition("=")
        label, choices = label or text.strip(), {}
        block, plus, bank = base.partition("+")
        if plus and bank != "bank":
            fail(f"contender {text!r}: only bank can follow the +")
        if block not in model.BLOCKS and block not in found:
            fail(f"contender {text!r}: {block!r} is neither a block ({', '.join(model.BLOCKS)}) "
                 f"nor the label of a contender before it")
        if label in found:
            fail(f"contenders={race.contenders!r} names {label!r} twice")
        for pair in pairs:
            name, equals, values = pair.partition("=")
            if not equals:
                fail(f"contender {text!r}: after its block come settings, as in dva:qk_dim=32")
            choices[name] = [read_settings(Contender, [f"--{name}={value}"])[name]
                             for value in values.split("|")]
            if name in {*DECIDED, *COMMON} - {"learning_rate", "bank_lr"}:
                fail(f"contender {text!r}: {name} is not for a contender to set")
        found[label] = base, choices
    for label in filter(None, race.against.split(",")):
        if label not in found:
            fail(f"against: {label!r} is none of the contenders {', '.join(found)}")
    return found


class Race:
    """
    Which runs a race needs, and what is known of them. `shared` are the settings that all
    contenders begin with. `plan` has the length of the runs, and `timing` {shape: a token's time in
    tokens of the yardstick, the shape that was timed first}; both are in results.json.
    """

    def __init__(self, rules, shared, plan, timing, folder, command):
        self.rules, self.shared, self.plan, self.timing = rules, shared, plan, timing
        self.folder, self.command, self.rounds = folder, command, rules.rounds
        self.contenders = read_contenders(rules)
        self.finished = {key_of(line["settings"], line["seed"]): line
                         for line in read_lines(folder / "runs.jsonl")}

    def settle(self, label, known):
        """
        {"settings", "trials", "missing", "later", "open", "runs"} of a contender: its settings so
        far, lists of the runs that tried them, the runs that are not finished, how many will follow
        at least, whether settings are still to be chosen, and the runs to report. `known` has this
        of the contenders before it.
        """
        base, choices = self.contenders[label]
        block, plus, _ = base.partition("+")
        inherited = known.get(block)
        settings = dict(inherited["settings"]) if inherited else self.shared | {"block": block}
        settings |= {name: values[0] for name, values in choices.items()}
        if not known:
            settings["match"] = "tokens"                               # it is the reference
        if plus and "bank_layers" not in choices:
            settings["bank_layers"] = settings["n_layer"] - 2 * settings["n_layer"] // 3
        # None stands for the best value so far, its half and its double
        sweeps = {"learning_rate": None if inherited else read_rates("lrs", self.rules.lrs)}
        if settings["bank_layers"]:
            sweeps["bank_lr"] = read_rates("bank_lrs", self.rules.bank_lrs)
        settings |= {name: values[0] for name, values in sweeps.items()
                     if values and name not in choices}
        sweeps = [*(sweeps | choices).items()]
        chosen = any(len(values) > 1 for name, values in choices.items() if name not in RATES)
        if chosen and "learning_rate" not in choices and not self.rules.minutes:
            sweeps.append(("learning_rate", None))

        # It waits for the settings that it takes over, and for the reference's time
        needed = [inherited] if inherited else []
        needed += list(known.values())[:settings["match"] == "time"]
        waits = any(other["open"] for other in needed)
        found = {"settings": settings, "trials": [], "missing": [], "later": 0}
        for name, values in sweeps:
            if found["missing"] or waits:
                found["later"] += self.rules.choosing * (len(values) - 1 if values else 2)
            else:
                self.sweep(found, name, values)
        is_open = bool(found["missing"]) or waits
        seeds = [self.rules.seed + 1 + i for i in range(self.rules.seeds)]
        runs = [] if is_open else [self.run_of(settings, seed) for seed in seeds]
        found["later"] += len(seeds) * is_open
        found["missing"] += [run for run in runs if not self.result_of(run)]
        return found | {"open": is_open, "runs": runs}

    def sweep(self, found, name, values):
        """Try a setting's values with the settings found so far: keep the best one, or say which
        runs are missing."""
        settings = found["settings"]
        values = values or [settings[name] / 2, settings[name], settings[name] * 2]
        if len(values) == 1:
            settings[name] = values[0]
            return
        while True:
            trials = [[self.run_of(settings | {name: value}, self.rules.seed - i)
                       for i in range(self.rules.choosing)] for value in values]
            found["trials"] += [runs for runs in trials if runs not in found["trials"]]
            found["missing"] = [run for runs in trials for run in runs if not self.result_of(run)]
            if found["missing"]:
                return
            losses = list(map(self.mean_loss, trials))
            best = losses.index(min(losses))
            settings[name] = values[best]
            inside = 0 < best < len(values) - 1
            if name not in RATES or self.rules.minutes or inside or len(values) >= MOST_RATES:
                return
            end, inner = (values[0], values[1]) if best == 0 else (values[-1], values[-2])
            values = sorted([*values, float(f"{end * end / inner:.3g}")])

    def survey(self):
        """
        ({label: settle()}, [(label, run)] that can be made now, in the order to make them) of all
        contenders.
        """
        found, missing = {}, {}
        for label in self.contenders:
            found[label] = self.settle(label, found)
            self.reference = next(iter(found.values()))["settings"]
            for run in found[label]["missing"]:
                missing.setdefault(run.out_dir, (label, run))
        missing = list(missing.values())
        if self.rules.minutes:
            # All sweeps, then one seed of all contenders after the other: seeds can be left out
            missing.sort(key=lambda item: item[1].seed)
        return found, missing

    def ratio_of(self, settings):
        """A token's time in tokens of the yardstick, measured when it is first asked for."""
        if shape_of(settings) not in self.timing:
            measure(self, [settings])
        return self.timing[shape_of(settings)]

    def run_of(self, settings, seed):
        """The TrainConfig of one run with the settings of a contender."""
        cfg = build(Contender, settings)
        tokens = self.plan["tokens"]
        if cfg.match == "time":
            tokens *= self.ratio_of(self.reference) / self.ratio_of(settings)
        steps = max(1, round(tokens / batch_tokens(cfg)))
        known = self.plan["data"]["tokens"]["train"]
        if self.rules.tokens_per_parameter and steps * batch_tokens(cfg) > known:
            fail(f"a run of {steps * batch_tokens(cfg):,} tokens would repeat the text, which has "
                 f"{known:,}: prepare more, or lower --tokens_per_parameter")
        cfg = build(TrainConfig, asdict(cfg) | dict(
            max_iters=steps, lr_decay_iters=steps, warmup_iters=round(cfg.warmup * steps),
            min_lr=LAST * cfg.learning_rate))
        return make_run(settings_of(cfg), seed, self.rules.data_dir, self.rules.device)

    def result_of(self, run):
        """The line of a finished run, or None."""
        return self.finished.get(key_of(settings_of(run), run.seed))

    def mean_loss(self, runs):
        """The mean loss of finished runs on the half that chooses."""
        return statistics.fmean(final_loss(self.result_of(run)) for run in runs)

    def seconds_of(self, run):
        """The time to expect of a run that has a core for itself."""
        evaluation = EVALUATION * 2 * self.plan["evaluated"]
        tokens = run.max_iters * batch_tokens(run) + evaluation
        ratio = self.timing.get(shape_of(asdict(run)), 1.0)
        return tokens * self.plan["seconds_per_token"] * ratio

    def seconds_left(self):
        """(the seconds to expect of all runs that are missing, their number)"""
        found, missing = self.survey()
        runs = [run for _, run in missing]
        for entry in found.values():
            runs += [self.run_of(entry["settings"], self.rules.seed)] * entry["later"]
        return sum(map(self.seconds_of, runs)), len(runs)


def batch_tokens(cfg):
    """Tokens of one step."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def settings_of(cfg):
    """What a run's losses follow from in addition to its seed, where it is not the default."""
    return {field.name: getattr(cfg, field.name) for field in fields(TrainConfig)
            if field.name not in LOCAL and getattr(cfg, field.name) != field.default}


def key_of(settings, seed):
    """The text by which a run is known again."""
    return json.dumps([settings, seed], sort_keys=True)


def make_run(settings, seed, data_dir, device="auto"):
    """The TrainConfig of a run, of which a line of runs.jsonl has the settings and the seed."""
    name = hashlib.sha256(key_of(settings, seed).encode()).hexdigest()[:16]
    steps = settings["max_iters"]
    return build(TrainConfig, settings | dict(
        seed=seed, data_dir=data_dir, device=device, out_dir=str(RUNS / name), overwrite=True,
        eval_interval=steps, eval_iters=1, eval_train=False, always_save_checkpoint=False,
        log_interval=1 + steps // 1000))


def shape_of(settings):
    """The text by which a model and a batch are known that were timed."""
    names = [field.name for field in fields(ModelConfig)]
    names += ["batch_size", "gradient_accumulation_steps", "optimizer", "dtype", "compile"]
    known = asdict(build(TrainConfig, settings))
    return json.dumps({name: known[name] for name in names
                       if known[name] != getattr(TrainConfig, name)})


def final_loss(line):
    """The loss of a finished run on the half that chooses; infinite if it broke."""
    return math.inf if line["broken"] else line["val"]


# ---- runs --------------------------------------------------------------------------------------

@torch.no_grad()
def losses_of(model, ids, block_size, most, device, half):
    """
    Yield (x, y, losses), (B, T) each, of windows that lie evenly over the token ids and do not
    overlap. Every second window (half 0) chooses settings, and those between them (half 1) are
    reported, `most` tokens of each at most. The losses are in nats, float32.
    """
    fit = (len(ids) - 1) // block_size
    count = min(fit, 2 * max(1, most // block_size))
    starts = (np.arange(count) * fit // count * block_size)[half::2]
    for first in range(0, len(starts), 32):
        rows = ids[starts[first:first + 32, None] + np.arange(block_size + 1)].astype(np.int64)
        rows = torch.from_numpy(rows).to(device)                       # (B, T + 1)
        logits = model(rows[:, :-1]).flatten(0, 1).float()
        losses = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none")
        yield rows[:, :-1], rows[:, 1:], losses.view_as(rows[:, 1:])


def carry_out(run, evaluated, with_test):
    """
    Train one run to its end, from its last checkpoint if it was stopped, and evaluate it. Returns
    its line of runs.jsonl, or None if it was stopped. What it prints is in its folder's log.txt.
    """
    folder, device = Path(run.out_dir), pick_device(run.device)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), \
            redirect_stderr(log), Stop() as stop:
        torch.compiler.reset()
        compile_or_fail()
        saved, broken, losses = folder / "last.pt", None, {}
        checkpoint = load_checkpoint(saved) if saved.exists() else None
        try:
            if train.train(run, device, stop, checkpoint)["stopped"]:
                return None
        except train.BrokenLoss as error:
            broken = str(error)
        records = read_lines(folder / "metrics.jsonl")
        if not broken:
            ids, trained = open_data(run)["val"], load_model(saved).to(device)
            for half, name in enumerate(("val", "test")[:1 + with_test]):
                with autocast(device, run.dtype):
                    parts = [part for *_, part in losses_of(trained, ids, run.block_size, evaluated,
                                                           device, half)]
                losses[name] = round(torch.cat(parts).double().mean().item(), 5)
        # Of a reported run the weights are kept
        for name in ("last.pt", "best.pt")[:2 - with_test]:
            (folder / name).unlink(missing_ok=True)
    sketch, steps = outline(run), [r for r in records if "train_loss" in r]
    bins = np.array_split(steps, min(POINTS, len(steps))) if steps else []
    return {"seed": run.seed, "settings": settings_of(run)} | losses | {
        "broken": broken, "parameters": sketch.num_params(),
        "flops_per_token": sketch.flops_per_token(), "tokens": run.max_iters * batch_tokens(run),
        "curve": [[part[-1]["step"] + 1, round(statistics.fmean(r["train_loss"] for r in part), 4)]
                  for part in bins],
        "commit": commit(), "torch": torch.__version__}


def commit():
    """The git commit of this code, with -dirty after it if the code was changed since."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True,
                              text=True).stdout.strip()
    try:
        # A preset is in the run's settings, and runs.jsonl changes with every run
        changed = git("status", "--porcelain", "--", "*.py", ":!config")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- workers -----------------------------------------------------------------------------------

def work(connection):
    """Make the runs that come through a connection, and send back their lines, with one thread."""
    torch.set_num_threads(1)
    # Ctrl-C goes to all processes of a session, and the race tells this one itself
    if hasattr(os, "setsid"):
        os.setsid()
    # Its bars need no lock that other processes share
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=end_with_race, daemon=True).start()
    # The race closes the connection at its end; a run that was stopped is saved
    with suppress(EOFError):
        while line := carry_out(*connection.recv()):
            connection.send(line)


def end_with_race():
    """Wait until the race has ended or was killed, and end this process, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_all(race, stop, deadline):
    """
    Make the missing runs, rules.jobs at a time, until none is needed or a stop is asked for, and
    add each to runs.jsonl when it is finished. If they would end after the deadline,
    rules.seeds becomes less. Raises UserError if a worker dies.
    """
    rules, plan = race.rules, race.plan
    start, under_way = time.time(), {}                  # connection: (label, run, when it began)
    # The seconds that finished runs took, and those that were expected of them alone. Until one
    # has finished, assume that the jobs share the machine.
    taken, expected = rules.jobs, 1.0
    announce(f"the plan: {len(race.contenders)} contenders, {rules.seeds} seeds, "
             f"{plan['tokens']:,} tokens", race, under_way, taken / expected, deadline)
    with workers(rules.jobs) as idle:
        while not stop.signal:
            running = [run.out_dir for _, run, _ in under_way.values()]
            waiting = [item for item in race.survey()[1] if item[1].out_dir not in running]
            while waiting and idle:
                (label, run), connection = waiting.pop(0), idle.pop()
                connection.send((run, plan["evaluated"], run.seed > rules.seed))
                under_way[connection] = label, run, time.time()
            if not under_way:
                return
            for connection in wait([*under_way], 1):
                label, run, begun = under_way.pop(connection)
                try:
                    line = connection.recv()
                except EOFError:
                    if stop.signal:
                        continue
                    fail(f"a worker died, perhaps for lack of memory: {run.out_dir}/log.txt may "
                         f"say more; the same command goes on")
                idle.append(connection)
                race.finished[key_of(line["settings"], line["seed"])] = line
                with replacing(race.folder / "runs.jsonl") as file:
                    file.writelines(f"{json.dumps(each)}\n".encode()
                                    for each in race.finished.values())
                taken += time.time() - begun
                expected += race.seconds_of(run)
                passed = tqdm.format_interval(time.time() - start)
                announce(f"{passed}  {label}, learning rate {run.learning_rate:g}, seed "
                         f"{run.seed}: loss {final_loss(line):.4f}", race,
                         under_way, taken / expected, deadline)


@contextmanager
def workers(count):
    """The connections to so many processes that work(); in the end these are told to stop."""
    spawn, processes, connections = multiprocessing.get_context("spawn"), [], []
    for _ in range(count):
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=work, args=(theirs,), daemon=True))
        processes[-1].start()
        theirs.close()
        connections.append(ours)
    try:
        yield connections[:]
    finally:
        # A worker in the middle of a run saves its state before it ends
        for process, connection in zip(processes, connections, strict=True):
            process.terminate()
            connection.close()
        for process in processes:
            process.join()


def announce(news, race, under_way, pace, deadline):
    """
    Print the news, how many runs are missing, and when they should end if each takes `pace` times
    what is expected of it alone. If that is after the deadline, rules.seeds becomes less, down
    to 2.
    """
    rules, planned = race.rules, race.rules.seeds
    while True:
        seconds, count = race.seconds_left()
        left = pace * seconds - sum(time.time() - begun for _, _, begun in under_way.values())
        end = time.time() + max(0, left) / rules.jobs
        if end <= deadline or rules.seeds <= 2:
            break
        rules.seeds -= 1
    if rules.seeds < planned:
        news += f"; too slow for {planned} seeds, {rules.seeds} will be reported"
    print(f"{news}; runs to go: {'' if rules.minutes else 'at least '}{count}, until about "
          f"{time.strftime('%H:%M', time.localtime(end))}", flush=True)


# ---- lengths and times -------------------------------------------------------------------------

def measure(race, settings):
    """
    Time a step of each of these settings with one thread, in turn with the yardstick, the settings
    that were timed first: the fastest tenth of race.rounds steps, TURN of them at a time. Returns
    the seconds that passed as a multiple of the measured ones.
    """
    plan, timing, device = race.plan, race.timing, pick_device(race.rules.device)
    shapes = dict.fromkeys([*list(timing)[:1], *map(shape_of, settings)])
    # Without the race's own settings: what a shape leaves out is train.py's default
    cfgs = {shape: build(TrainConfig, json.loads(shape)) for shape in shapes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # On a CPU the time of other programs does not count
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps = {shape: training_step(cfg, device) for shape, cfg in cfgs.items()}
    times, began, spent = {shape: [] for shape in shapes}, time.perf_counter(), 0.0
    turns = math.ceil(race.rounds / TURN)
    for _ in tqdm(range(turns), "timing", leave=False, delay=2, disable=None):
        for shape, step in steps.items():
            for i in range(WARM_UP + min(TURN, race.rounds)):
                start = clock()
                step()
                seconds = clock() - start
                spent += seconds
                if i >= WARM_UP:
                    times[shape].append(seconds / batch_tokens(cfgs[shape]))
    pace = (time.perf_counter() - began) / spent
    torch.set_num_threads(threads)
    # Other programs, which share caches and memory, disturb the fastest tenth of the steps least
    best = {shape: np.quantile(found, 0.1).item() for shape, found in times.items()}
    first = next(iter(best))
    plan.setdefault("seconds_per_token", best[first])
    for shape in shapes:
        timing.setdefault(shape, round(best[shape] / best[first], 4))
    save(race)
    return pace


def fit_in_time(race, seconds):
    """
    Shrink a race to so many seconds, of which it plans to use 0.8, since machines get slower as
    they get warm: fewer seeds, then fewer steps, then smaller models, then still fewer steps.
    """
    rules, plan, began = race.rules, race.plan, time.time()
    step_tokens = batch_tokens(build(TrainConfig, race.shared))
    # Jobs that share a CPU's memory are not as fast as each alone
    cores = rules.jobs if rules.jobs == 1 else rules.jobs / 1.2

    def fits(steps):
        plan["tokens"] = steps * step_tokens
        return pace * race.seconds_left()[0] / cores < 0.8 * (seconds - (time.time() - began))

    below = {name: value for name, value in SMALLER.items() if value < race.shared[name]}
    for smaller, least in ({}, LEAST_STEPS), (below, 1):
        race.shared |= smaller
        for race.rounds in (2, min(rules.rounds, 20)):
            race.timing.clear()
            plan.pop("seconds_per_token", None)
            pace = measure(race, [entry["settings"] for entry in race.survey()[0].values()])
            turn = pace * sum(race.timing.values()) * step_tokens * plan["seconds_per_token"]
            # Better figures if they take a thirtieth of the time
            if turn > 0.1 * rules.minutes:
                break
        while not fits(least) and rules.seeds > 2:
            rules.seeds -= 1
        steps = rules.max_iters
        while not fits(steps) and steps > least:
            steps = max(least, int(0.95 * steps))
        if fits(steps):
            break
    plan |= {"seeds": rules.seeds, "smaller": smaller}
    print(f"{rules.minutes:g} minutes have time for {rules.seeds} seeds and {steps} steps"
          f"{' of smaller models' if smaller else ''}", flush=True)


# ---- what is written ---------------------------------------------------------------------------

def facts_of(race):
    """{label: what its runs came to} of the contenders of which at least one seed is finished."""
    facts, (found, _) = {}, race.survey()
    for label, entry in found.items():
        lines = [line for line in map(race.result_of, entry["runs"]) if line]
        if not lines:
            continue
        cfg, line = entry["runs"][0], lines[0]
        best = race.run_of(entry["settings"], race.rules.seed)
        names = ["learning_rate", "bank_lr", "warmup_iters", *race.contenders[label][1]]
        names = [name for name in names if hasattr(best, name)]
        trials = []
        for runs in entry["trials"]:
            loss = race.mean_loss(runs)
            trials.append({name: getattr(runs[0], name) for name in names} | {
                "loss": loss if math.isfinite(loss) else None, "best": runs[0] == best})
        curves = zip(*(line["curve"] for line in lines if not line["broken"]), strict=False)
        rate = race.plan["seconds_per_token"] * race.ratio_of(asdict(cfg))
        facts[label] = {
            "settings": settings_of(cfg), "block": cfg.block, "n_layer": cfg.n_layer,
            "n_embd": cfg.n_embd, "optimizer": cfg.optimizer, "bank_layers": cfg.bank_layers,
            "learning_rate": cfg.learning_rate, "trials": trials, "tokens": line["tokens"],
            "parameters": line["parameters"],
            "flops": line["tokens"] * line["flops_per_token"] + cfg.max_iters * muon_flops(cfg),
            "seconds": line["tokens"] * rate,
            "losses": {line["seed"]: None if line["broken"] else [line["val"], line["test"]]
                       for line in lines},
            "curve": [[points[0][0] * batch_tokens(cfg), round(statistics.fmean(
                loss for _, loss in points), 4)] for points in curves]}
    return facts


def muon_flops(cfg):
    """FLOPs of Muon in one step: for each matrix X, five times X X^T, its square, and that by X."""
    if cfg.optimizer != "muon":
        return 0
    sides = [sorted((len(p), p[0].numel())) for p in parameter_groups(outline(cfg))["matrices"]]
    return sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def save(race):
    """Write what is known to results.json, and return it."""
    results = {"name": race.rules.name, "command": race.command, "dataset": race.rules.dataset,
               "dtype": race.shared["dtype"], "plan": race.plan,
               "timing": race.timing, "choosing": race.rules.choosing, "seeds": race.rules.seeds,
               "against": list(filter(None, race.rules.against.split(","))),
               "contenders": facts_of(race)}
    write_json(results, race.folder / "results.json")
    return results


def publish(results, folder):
    """Write table.md and race.svg of what is finished."""
    text = table(results)
    with replacing(folder / "table.md") as file:
        file.write(text.encode())
    print(f"{text}\nall is in {folder}/")
    try:
        draw_race(results, folder / "race.svg")
    except UserError as error:
        # Without matplotlib there is no picture, but all figures are there
        print(error)


def main(argv=None, script="-m tools.race"):
    began = time.time()
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if not word.startswith("--jobs=")]
    command = f"python {script} {shlex.join(words)}"
    rules = build(RaceConfig, read_settings(RaceConfig, argv, without=DECIDED))
    device, data = pick_device(rules.device), open_data(rules)
    half = len(data["val"]) // 2
    if half <= rules.block_size:
        fail(f"half of the validation split holds {half} tokens, and block_size="
             f"{rules.block_size} needs more: use a smaller --block_size or more text")
    # The type is decided here for all runs. On a CPU auto would measure it at every start.
    dtype = "float32" if (rules.dtype, device.type) == ("auto", "cpu") else rules.dtype
    shared = {field.name: getattr(rules, field.name) for field in fields(Contender)} | {
        "vocab_size": table_rows(data["meta"]), "dtype": pick_dtype(dtype, device, rules.n_embd),
        "compile": pick_compile(rules.compile, device, 0), "min_lr": 0.0}
    conditions = {"data": {name: data["meta"][name] for name in ("tokens", "sha256")},
                  "evaluated": min(half, EVALUATED if rules.minutes else rules.evaluated),
                  "length": rules.tokens_per_parameter or rules.max_iters,
                  "minutes": rules.minutes, "settings": {
                      name: value for name, value in settings_of(build(TrainConfig, shared)).items()
                      if name not in (*DECIDED, "max_iters")}}
    folder = Path(rules.results, rules.name)
    # The workers of a race that was killed need a moment to end
    with only_writer(folder, patience=10, setting="results"), Stop() as stop:
        path = folder / "results.json"
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        plan = kept.get("plan") or conditions | {
            "machine": f"{machine_name(device)}, torch {torch.__version__}",
            "tokens": 0 if rules.tokens_per_parameter else rules.max_iters * batch_tokens(rules)}
        other = [name for name, value in conditions.items() if plan[name] != value]
        if other:
            fail(f"{folder} holds a race of other {', '.join(other)}: give another --name")
        rules.seeds = plan.get("seeds", rules.seeds)
        race = Race(rules, shared | plan.get("smaller", {}), plan, kept.get("timing", {}), folder,
                    command)
        settings = [entry["settings"] for entry in race.survey()[0].values()]
        models = [outline(build(TrainConfig, one)) for one in settings]
        if rules.tokens_per_parameter:
            plan["tokens"] = round(rules.tokens_per_parameter * models[0].num_params())
        deadline = began + 60 * rules.minutes - STARTING if rules.minutes else math.inf
        if not race.timing and rules.minutes:
            fit_in_time(race, deadline - time.time())
        elif not race.timing:
            measure(race, settings)
        if rules.jobs:
            run_all(race, stop, deadline)
        results = save(race)
        if results["contenders"]:
            publish(results, folder)
    if stop.signal:
        print("stopped; the same command goes on, and finished runs are not made again",
              file=sys.stderr)
        raise SystemExit(128 + stop.signal)


if __name__ == "__main__":
    run_script(main)
