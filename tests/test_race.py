"""tools/race.py: a small race from end to end, what it chooses, and kills."""
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command_line, ids_of, message_of
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT
from nanodva.optimizers import build_optimizer
from nanodva.settings import build, change, read_settings
from nanodva.weights import load_model
from tools import race

TINY = dict(dataset="tiny_char", n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=16,
            batch_size=4, max_iters=12, device="cpu", dtype="float32", compile=False, evaluated=160,
            contenders="gpt2,dva+bank", seeds=2, lrs="0.01,0.03,0.1", rounds=2)


class Here:
    """A worker that is this process: it makes the run that it was sent when its line is wanted."""

    def send(self, job):
        self.job = job

    def recv(self):
        return race.carry_out(*self.job)


def stay_here(monkeypatch):
    """Races make their runs in this process: others take seconds to start."""
    @contextmanager
    def workers(count):
        yield [Here()]

    monkeypatch.setattr(race, "workers", workers)
    monkeypatch.setattr(race, "wait", lambda connections, seconds: connections)


@pytest.fixture
def here(monkeypatch):
    stay_here(monkeypatch)


@pytest.fixture
def argv(data_dir, tmp_path, monkeypatch):
    """argv(**changes): the command line of a tiny race, which writes below tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda **changes: command_line(TINY | {"data_dir": data_dir} | changes)


FOLDER = Path("out", "race", "tiny_char-tokens")


def lines_of():
    return race.read_lines(FOLDER / "runs.jsonl")


def results_of():
    return json.loads((FOLDER / "results.json").read_text())


def assert_the_same_again():
    """A run whose weights were kept has the losses that it has in this process, uninterrupted."""
    weights = next(Path("out", "race_runs").rglob("best.pt"))
    config = torch.load(weights, weights_only=True)["config"] | {"out_dir": "again"}
    again = race.carry_out(build(train.TrainConfig, config), 160, True)
    [line] = [line for line in lines_of() if line["seed"] == config["seed"]]
    assert (line["val"], line["test"]) == (again["val"], again["test"])


@pytest.fixture
def entered(argv, tmp_path):
    """entered(**changes): the Race of a command line, of which nothing is timed or run."""
    def entered(**changes):
        rules = build(race.RaceConfig, read_settings(race.RaceConfig, argv(**changes)))
        shared = {name: getattr(rules, name) for name in race.Contender.__dataclass_fields__}
        plan = {"tokens": rules.max_iters * 64, "data": {"tokens": {"train": 10_000}},
                "evaluated": 160, "seconds_per_token": 1e-3}
        return race.Race(rules, shared | {"vocab_size": 24}, plan, {}, tmp_path, "")
    return entered


def line_of(run, val, test=1.0):
    """The line in runs.jsonl of a run that was never made, with its losses on both halves."""
    return {"seed": run.seed, "settings": race.settings_of(run), "val": val, "test": test,
            "broken": None, "tokens": run.max_iters * 64, "parameters": 1, "flops_per_token": 1,
            "curve": []}


def settle(entry, loss):
    """What a Race finds when all runs that it needs have a loss, loss(run)."""
    for _ in range(100):
        found, missing = entry.survey()
        if not missing:
            return found
        line = line_of(missing[0][1], loss(missing[0][1]))
        entry.finished[race.key_of(line["settings"], line["seed"])] = line
    raise AssertionError("it never ends")


def distance(rate, best):
    return abs(math.log(rate / best))


# ---- a race ------------------------------------------------------------------------------------

def test_a_race_of_three_from_end_to_end(argv, tmp_path, here, capsys):
    rules = dict(contenders="gpt2,bank=dva+bank,in time=bank:match=time", bank_lrs="0.5,1,2")
    race.main(argv(**rules))
    results, printed = results_of(), capsys.readouterr().out
    table, facts = (FOLDER / "table.md").read_text(), results["contenders"]
    assert table in printed
    for word in ("tiny_char", results["plan"]["data"]["sha256"]["train"][:12],
                 results["plan"]["machine"], torch.__version__):
        assert word in table
    for label, fact in facts.items():
        trials = fact["trials"]
        [best] = [trial for trial in trials if trial["best"]]
        assert best["loss"] == min(trial["loss"] for trial in trials)
        # The best has a worse rate on both sides, of the bank's rates too
        for name in ("learning_rate", "bank_lr")[:1 + (label != "gpt2")]:
            rates = {trial[name] for trial in trials}
            assert min(rates) < best[name] < max(rates)
        # The first seed chose, and others are reported, on the other half
        assert list(fact["losses"]) == ["1338", "1339"]
        losses = [pair[1] for pair in fact["losses"].values()]
        row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
        assert f"| {sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2**0.5:.4f} |" in row
        assert f"| {best['learning_rate']:g} |" in row and fact["curve"][-1][0] == fact["tokens"]
    # To half a step, and the rounding of its time
    seconds, steps = facts["in time"]["seconds"], facts["in time"]["tokens"] / 64
    assert abs(seconds - facts["gpt2"]["seconds"]) <= 0.52 * seconds / steps
    assert "in time" in (FOLDER / "race.svg").read_text()
    # Of a sweep no weights are kept, and of a reported run no more than the weights
    kept, reported = list(tmp_path.rglob("*.pt")), [run for run in lines_of() if run["seed"] > 1337]
    # Two contenders share their runs if equal time happens to be equal tokens
    assert len(kept) == len(reported) in (4, 6) and {path.name for path in kept} == {"best.pt"}

    # The same command makes nothing again, even by other code, and says the same
    before = [line | {"commit": "another"} for line in lines_of()]
    (FOLDER / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    race.main(argv(**rules))
    assert lines_of() == before and results_of() == results
    # Another length is another race, and a further contender is not
    assert "holds a race of other length: give another --name" in message_of(
        race.main, argv(max_iters=13))
    rules["contenders"] += ",dva:learning_rate=0.01"
    race.main(argv(**rules | dict(seeds=1)))
    assert lines_of()[:len(before)] == before and len(results_of()["contenders"]) == 4


@pytest.mark.slow
def test_a_worker_comes_to_what_this_process_comes_to(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    race.main(argv(contenders="gpt2:learning_rate=0.01", seeds=1, max_iters=4))
    assert not multiprocessing.active_children()
    assert_the_same_again()


# ---- what is chosen ----------------------------------------------------------------------------

@pytest.mark.parametrize("best, rates", [
    (0.03, [0.01, 0.03, 0.1]), (0.00111, [0.00037, 0.00111, 0.00333, 0.01, 0.03, 0.1]),
    (1.11, [0.01, 0.03, 0.1, 0.333, 1.11, 3.7])])
def test_a_sweep_goes_on_until_its_best_has_worse_on_both_sides(entered, best, rates):
    entry = entered(contenders="dva+bank")
    found = settle(entry, lambda run: distance(run.learning_rate, best)
                   + distance(run.bank_lr, 8))["dva+bank"]
    assert sorted({run.learning_rate for [run] in found["trials"]}) == pytest.approx(rates)
    assert found["settings"]["learning_rate"] == best and found["settings"]["bank_lr"] == 8
    assert {run.seed for [run] in found["trials"]} == {1337}
    banks = {run.bank_lr for [run] in found["trials"] if run.learning_rate == best}
    assert min(banks) < 8 < max(banks)


def test_choices_are_made_one_after_the_other_and_taken_over(entered):
    """A loss whose best rate depends on what is chosen, so the rates have to be tried again."""
    def loss(run):
        rate = 0.03 if run.weight_decay == 0.1 else 0.015
        return (distance(run.learning_rate, rate) - 9 * (run.weight_decay == 0.3)
                - (run.qk_dim == 4) - (run.warmup_iters == 4) + 5 * (run.block == "gpt2"))

    text = "gpt2,dva=dva:weight_decay=0.1|0.3|0.5:qk_dim=8|4:warmup=0.1|0.33,wide=dva:n_embd=32"
    found = settle(entered(contenders=text), loss)
    chosen = found["dva"]["settings"]
    assert [chosen[name] for name in ("weight_decay", "qk_dim", "warmup", "learning_rate")] == [
        0.3, 4, 0.33, 0.015]
    # Three rates, two of weight decay, one each, and rates around the best: 0.015, 0.06, 0.0075
    assert len(found["dva"]["trials"]) == 3 + 2 + 1 + 1 + 3
    wide = found["wide"]
    assert wide["settings"] == chosen | {"n_embd": 32} and len(wide["trials"]) == 3
    assert [run.learning_rate for [run] in wide["trials"]] == [0.0075, 0.015, 0.03]
    assert [run.seed for run in wide["runs"]] == [1338, 1339]
    assert all(run.qk_dim == 4 and run.warmup_iters == 4 for run in wide["runs"])
    assert found["gpt2"]["settings"]["weight_decay"] == 0.1


def test_several_seeds_choose_by_their_mean(entered):
    def loss(run):
        # The first seed is lucky with a rate that is bad for the others
        lucky = run.seed == 1337 and run.learning_rate == 0.03
        return distance(run.learning_rate, 0.1) - 2 * lucky

    for choosing, rate in ((1, 0.03), (3, 0.1)):
        found = settle(entered(contenders="gpt2", choosing=choosing), loss)["gpt2"]
        assert found["settings"]["learning_rate"] == rate
        assert {run.seed for runs in found["trials"] for run in runs} == {
            1337 - i for i in range(choosing)}
        assert [run.seed for run in found["runs"]] == [1338, 1339]


def test_equal_time_waits_for_the_reference_and_its_own_settings(entered, monkeypatch):
    # The reference cannot match its own time
    text = "gpt2=gpt2:n_head=1|2,dva=dva:qk_dim=8|4:match=tokens,time=dva:match=time"
    entry = entered(contenders=text, match="time")
    assert {label for label, _ in entry.survey()[1]} == {"gpt2", "dva"}

    def measure(entry, settings):
        # qk_dim 4 halves the time of dva; two heads take twice the time of one
        [one] = settings
        time = one["n_head"] if one["block"] == "gpt2" else one["qk_dim"] / 10
        entry.timing[race.shape_of(one)] = time

    monkeypatch.setattr(race, "measure", measure)
    # Two heads and short queries win
    found = settle(entry, lambda run: distance(run.learning_rate, 0.03) - 2 * (
        run.n_head == 2 and run.block == "gpt2") - (run.qk_dim == 4))
    assert [found[label]["runs"][0].max_iters for label in ("gpt2", "dva")] == [12, 12]
    assert found["time"]["runs"][0].max_iters == 12 * 2 / 0.4
    assert [run.lr_decay_iters for [run] in found["time"]["trials"]] == [60] * 3


def test_contenders_are_made_from_what_was_given(entered):
    text = ("fixed=dva+bank:learning_rate=0.02:bank_lr=3,gpt2,dva:batch_size=8,dva,"
            "gpt2:rotary=True,dva+bank:n_layer=12,base=dva:n_embd=32,on top=base+bank")
    found, _ = entered(contenders=text).survey()
    models = [build(race.Contender, entry["settings"]) for entry in found.values()]
    assert [model.is_rotary for model in models] == [True, False] + [True] * 6
    assert [model.bank_layers for model in models] == [1, 0, 0, 0, 0, 4, 0, 1]
    assert [model.value_width for model in models] == [16, 16, 16, 16, 16, 16, 32, 32]
    # Equal tokens are fewer steps of a larger batch
    assert [found[label]["trials"][0][0].max_iters for label in list(found)[1:4]] == [12, 6, 12]
    # What fixes its rates is not swept
    assert found["fixed"]["trials"] == []
    assert {(run.learning_rate, run.min_lr, run.bank_lr) for run in found["fixed"]["runs"]} == {
        (0.02, 0.02 * race.LAST, 3)}


def test_a_rate_that_breaks_counts_as_infinitely_bad(argv, here):
    race.main(argv(contenders="gpt2:optimizer=adamw:warmup=0", grad_clip=0, lrs="0.01,1e30",
                   seeds=1))
    broken = [line for line in lines_of() if line["broken"]]
    assert [line["settings"]["learning_rate"] for line in broken] == [1e30]
    assert race.final_loss(broken[0]) == math.inf and "broken" in broken[0]["broken"]
    rates = {line["settings"]["learning_rate"] for line in lines_of()}
    assert len(rates) >= 3 and "broken" in (FOLDER / "table.md").read_text()


# ---- what is evaluated ---------------------------------------------------------------------------

def test_every_second_window_chooses_and_the_others_are_reported(argv, here, data_dir):
    race.main(argv(contenders="dva:learning_rate=0.01", seeds=1, evaluated=10**9))
    [line], [weights] = lines_of(), Path("out", "race_runs").rglob("best.pt")
    ids = torch.from_numpy(ids_of(data_dir / "tiny_char", "val").astype("int64"))
    x, y = (part.unfold(0, 16, 16) for part in (ids[:-1], ids[1:]))
    with torch.no_grad():
        logits = load_model(weights)(x)
    losses = F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)
    # 250 tokens of each half are 15 windows
    losses = losses[torch.arange(30) * 31 // 30]
    assert [line["val"], line["test"]] == pytest.approx(
        [losses[half::2].mean().item() for half in (0, 1)], abs=2e-5)
    # Fewer tokens lie evenly over the split
    model = lambda x: F.one_hot(x, 600).float()                        # noqa: E731
    starts = [x[:, 0].tolist() for half in (0, 1)
              for x, *_ in race.losses_of(model, np.arange(501), 16, 160, "cpu", half)]
    assert [len(first) for first in starts] == [10, 10]
    together = sorted(sum(starts, []))
    assert together[0] == 0 and together[-1] > 450 and set(np.diff(together)) <= {16, 32}


@pytest.mark.parametrize("block", ["gpt2", "dva"])
def test_the_flops_of_muon_are_those_that_torch_counts(block):
    cfg = build(train.TrainConfig, dict(block=block, n_layer=2, n_head=2, n_embd=16, qk_dim=8,
                                        block_size=8, vocab_size=32, optimizer="muon"))
    model = GPT(cfg)
    optimizer = build_optimizer(model, cfg)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == race.muon_flops(cfg) > 0
    assert race.muon_flops(change(cfg, optimizer="adamw")) == 0


def test_a_shape_is_timed_with_its_own_settings(entered, monkeypatch):
    """Also if they are train.py's defaults, and the race begins with others."""
    timed = []
    monkeypatch.setattr(race, "training_step", lambda cfg, device: timed.append(cfg) or (lambda: 0))
    entry = entered(contenders="gpt2:n_head=1,dva:qk_dim=64:n_head=12", n_head=2)
    race.measure(entry, [found["settings"] for found in entry.survey()[0].values()])
    assert [(cfg.block, cfg.n_head, cfg.qk_dim, cfg.n_embd) for cfg in timed] == [
        ("gpt2", 1, 8, 16), ("dva", 12, 64, 16)]


# ---- minutes -------------------------------------------------------------------------------------

@pytest.fixture
def timed(argv, here, monkeypatch, capsys):
    """
    timed(seconds, slower): (results, seconds that passed, what was printed) of a race of 2 minutes
    whose steps take so many seconds when they are timed, and `slower` times that in its runs.
    """
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, value in dict(EVALUATED=64, STARTING=0, outline=lambda cfg: None,
                            muon_flops=lambda cfg: 0).items():
        monkeypatch.setattr(race, name, value)

    def timed(seconds, slower=1.0, **changes):
        now, entries = [0.0], []
        monkeypatch.setattr(time, "time", lambda: now[0])

        def measure(entry, settings):
            entries.append(entry)
            for other in settings:
                size = other["n_layer"] * other["n_embd"] / 32
                entry.timing[race.shape_of(other)] = size * (1 if other["block"] == "gpt2" else 0.5)
            entry.plan.setdefault("seconds_per_token", seconds / 64)
            return 1.0

        def carry_out(run, *_):
            now[0] += slower * entries[0].seconds_of(run)
            return line_of(run, 1.0)

        monkeypatch.setattr(race, "measure", measure)
        monkeypatch.setattr(race, "carry_out", carry_out)
        race.main(argv(minutes=2, contenders="gpt2,dva", seeds=5, lrs="0.01,0.02", max_iters=2000,
                       **changes))
        return results_of(), now[0], capsys.readouterr().out

    return timed


@pytest.mark.parametrize("seconds, width, seeds, steps", [
    # Fewer steps, then fewer seeds, then smaller models, with fewer than 100 steps if it must be
    (0.02, 16, [5], range(101, 2000)), (0.1, 16, [2, 3, 4], range(100, 140)),
    (0.5, 256, [2], range(1, 2000))])
def test_a_race_is_shrunk_to_its_minutes(timed, seconds, width, seeds, steps):
    results, passed, printed = timed(seconds, n_embd=width)
    count = results["contenders"]["gpt2"]["tokens"] // 64
    assert results["seeds"] in seeds and count in steps and 60 < passed < 120
    assert f"2 minutes have time for {results['seeds']} seeds and {count} steps" in printed
    assert ("of smaller models" in printed) == (width == 256)
    # The sweeps end with the rates that are given
    assert [(fact["n_embd"], len(fact["trials"])) for fact in results["contenders"].values()] == [
        (min(width, 64), 2)] * 2
    # How many runs are left is told first and then falls by one with each
    counts = re.findall(r"; runs to go: (\d+), until about \d\d:\d\d$", printed, re.M)
    assert [int(count) for count in counts] == [*range(4 + 2 * results["seeds"], -1, -1)]
    assert "pip install matplotlib" in printed


@pytest.mark.parametrize("slower, count", [(1.0, 5), (1.35, 4), (9.0, 2)])
def test_a_slower_machine_gets_fewer_seeds_and_is_told(timed, slower, count):
    results, passed, printed = timed(0.02, slower)
    assert results["seeds"] == count and (passed <= 120 or count == 2)
    assert printed.count("too slow for 5 seeds") == (slower > 1)
    # Four runs to choose, then seed by seed
    assert [line["seed"] for line in lines_of()] == [1337] * 4 + [
        1338 + i // 2 for i in range(2 * count)]


# ---- stops and kills ---------------------------------------------------------------------------

def processes(folder):
    """The folders in /proc of all processes but this one that have this current folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        # It may have ended meanwhile, or be another user's
        with suppress(OSError):
            if os.readlink(path / "cwd") == str(folder) and int(path.name) != os.getpid():
                found.append(path)
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return condition()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="reads /proc")
# Either while the workers start, or while both train. Of two runs, how many have to start again?
@pytest.mark.parametrize("ending, lines, status, message, again", [
    ("terminate", 0, 128 + signal.SIGTERM, "the same command goes on", 0),
    ("terminate", 20, 128 + signal.SIGTERM, "the same command goes on", 0),
    ("kill", 0, -signal.SIGKILL, "", 0), ("kill", 20, -signal.SIGKILL, "", 2),
    ("a worker's kill", 20, 2, "error: a worker died", 1)])
def test_a_race_that_is_ended_leaves_no_process_and_goes_on_later(argv, here, tmp_path, ending,
                                                                  lines, status, message, again):
    words = argv(max_iters=400, contenders="gpt2", lrs="0.01", rounds=1, jobs=2)
    process = subprocess.Popen([sys.executable, ROOT / "tools" / "race.py", *words], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    assert wait_until(lambda: len(processes(tmp_path)) >= 4)
    assert wait_until(lambda: 2 * (lines > 0) == sum(
        path.read_text().count("\n") >= lines for path in tmp_path.rglob("metrics.jsonl")))
    if ending == "a worker's kill":
        worker = next(path for path in processes(tmp_path)
                      if "spawn_main" in (path / "cmdline").read_text())
        os.kill(int(worker.name), signal.SIGKILL)
    else:
        getattr(process, ending)()
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and message in err and "Traceback" not in err
    # Its workers see that a race was killed a moment later
    assert wait_until(lambda: not processes(tmp_path), seconds=20 if ending == "kill" else 0)
    assert lines_of() == []

    race.main(words)
    logs = [path.read_text() for path in tmp_path.rglob("log.txt")]
    assert sum(log.count("step 0: loss") for log in logs) == 2 + again
    assert_the_same_again()


# ---- what the user gets wrong ------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(lrs="1e-3,fast"), "lrs='1e-3,fast': give rates above 0"),
    (dict(minutes=-1), "minutes=-1.0: it must be at least 0"),
    (dict(bank_lrs="-1"), "bank_lrs='-1': give rates"),
    (dict(contenders="gpt2,dvaa"), "'dvaa' is neither a block (gpt2, dva"),
    (dict(contenders="gpt2,wide=narrow:n_embd=8"), "nor the label of a contender before it"),
    (dict(contenders="gpt2,gpt2"), "names 'gpt2' twice"),
    (dict(contenders="gpt2,dva:qk=3"), "unknown setting 'qk'"),
    (dict(contenders="gpt2,dva:qk_dim=8|x"), "qk_dim='x'"),
    (dict(contenders="gpt2,dva+blank"), "only bank can follow the +"),
    (dict(contenders="gpt2,dva:help"), "after its block come settings"),
    (dict(contenders="gpt2,dva:block=gpt2"), "block is not for a contender to set"),
    (dict(contenders="gpt2,dva:block_size=8"), "block_size is not for a contender"),
    (dict(contenders="gpt2,mean+bank"), "cannot hold a bank"),
    (dict(against="dva"), "against: 'dva' is none of the contenders gpt2, dva+bank"),
    (dict(block_size=300), "half of the validation split holds 250 tokens"),
    (dict(dataset="nowhere"), "prepare_data.py nowhere"),
    (dict(tokens_per_parameter=3), "tokens would repeat the text, which has 4,500"),
    (dict(learning_rate=1), "learning_rate on the command line: this tool decides it")], ids=str)
def test_a_wrong_race_is_one_line_and_leaves_nothing(argv, tmp_path, changes, message):
    assert message in message_of(race.main, argv(**changes))
    assert not list(tmp_path.rglob("*.json*"))
