"""tools/race.py: a small race from end to end, and kills."""
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command_line, ids_of, message_of, records

import train
from nanodva.dataset import open_data
from nanodva.machine import Stop
from nanodva.settings import build, change, read_settings
from nanodva.tokenizer import Tokenizer
from nanodva.weights import load_model
from tools import race

TINY = dict(dataset="tiny_char", n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=16,
            batch_size=4, gradient_accumulation_steps=1, warmup_iters=2, max_iters=12,
            eval_interval=4, device="cpu", dtype="float32", compile=False, optimizer="muon",
            contenders="gpt2,dva+bank", seeds=2, lrs="0.01,0.03,0.1", rounds=2)


class Here(Executor):
    """A pool of workers that does everything at once and in this process."""

    def submit(self, function, run):
        future = Future()
        future.set_result(function(run))
        return future


@pytest.fixture
def here(monkeypatch):
    """Races have no processes of their own, which take seconds to start."""
    monkeypatch.setattr(race, "ProcessPoolExecutor", lambda *arguments: Here())


@pytest.fixture
def argv(data_dir, tmp_path, monkeypatch):
    """argv(**changes): the command line of a tiny race, which writes below tmp_path."""
    monkeypatch.chdir(tmp_path)

    def argv(**changes):
        return command_line(TINY | {"data_dir": data_dir} | changes)

    return argv


def entered(argv):
    """(RaceConfig, {contender: TrainConfig}) of a command line, before any step."""
    given = read_settings(race.RaceConfig, [str(ROOT / "config" / "race_laptop.py"), *argv],
                          without=race.DECIDED)
    rules = build(race.RaceConfig, given)
    data = race.halve(open_data(rules), rules.block_size, 500)
    return rules, race.enter(rules, given, data, {"machine": "none"}, torch.device("cpu"))


def lengths_of(rules, contenders, times=None):
    """race.set_lengths() of a race that is not shortened."""
    steps = next(iter(contenders.values())).max_iters
    return race.set_lengths(contenders, rules, times or {}, steps)


def finish(run, val, test, steps=(0, 10), broken=None):
    """Leave behind what a finished run does."""
    Path(run.out_dir).mkdir(parents=True)
    result = {"steps": list(steps), "val": val, "test": test, "broken": broken}
    Path(run.out_dir, "result.json").write_text(json.dumps(result))


# ---- a race ------------------------------------------------------------------------------------

def test_a_race_of_two_from_end_to_end(argv, tmp_path, here, capsys):
    race.main(argv())
    folder, printed = tmp_path / "out" / "race" / "tiny_char-tokens", capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    table = (folder / "table.md").read_text()
    assert table in printed
    for word in ("second half", "tiny_char", results["conditions"]["sha256"]["train"][:12],
                 results["conditions"]["machine"], torch.__version__, results["commit"]):
        assert word in table
    for name, fact in results["contenders"].items():
        # The best has a worse rate on both sides, of the bank's rates too
        sweep = fact["sweep"]
        rates = {run["learning_rate"]: run["loss"] for run in sweep
                 if run["bank_lr"] == train.TrainConfig.bank_lr}
        assert min(rates, key=rates.get) == fact["learning_rate"] not in (min(rates), max(rates))
        banks = {run["bank_lr"]: run["loss"] for run in sweep
                 if run["learning_rate"] == fact["learning_rate"]}
        assert len(banks) >= 3 if name == "dva+bank" else len(banks) == 1
        assert min(banks, key=banks.get) == fact["bank_lr"]
        # The first seed chose, and others are reported, on the other half
        assert [run["seed"] for run in fact["runs"]] == [1338, 1339]
        assert all(run["steps"] == [0, 4, 8, 12] for run in fact["runs"])
        losses = [run["test"][-1] for run in fact["runs"]]
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2**0.5:.4f} |" in row
        assert f"| {fact['learning_rate']:g} |" in row
    assert re.search(r"\] (better|worse|not told apart) \|", table)
    assert "dva+bank" in (folder / "race.svg").read_text()
    assert not list(tmp_path.rglob("*.pt"))

    # The same command runs nothing again and says the same
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    race.main(argv())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == times
    assert json.loads((folder / "results.json").read_text()) == results

    # Another race does not take its place unasked
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    message = message_of(race.main, argv(contenders="gpt2,dva"))
    assert "which differs in contenders, dva, dva+bank: " in message
    assert "--overwrite=True" in message
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    race.main(argv(contenders="gpt2", seeds=1, lrs="0.03", overwrite=True))
    assert "dva+bank" not in (folder / "table.md").read_text()


@pytest.mark.slow
def test_a_worker_comes_to_what_this_process_comes_to(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    race.main(argv(contenders="gpt2:learning_rate=0.01", seeds=1, max_iters=4, rounds=1))
    assert not multiprocessing.active_children()
    results = json.loads(Path("out/race/tiny_char-tokens/results.json").read_text())
    [fact] = results["contenders"].values()
    [found] = fact["runs"]
    cfg = build(train.TrainConfig, fact["settings"])
    run = change(race.run_of(cfg, 0.01, cfg.bank_lr, found["seed"]), out_dir="again")
    assert race.carry_out(run)
    here = race.result_of(run)
    assert here["steps"] == [0, 4] and here == {name: found[name] for name in here}


def invented(best_rate, best_bank):
    """A carry_out whose loss is the higher, the farther its rates are from the best ones."""
    def carry_out(run):
        loss = (abs(math.log(run.learning_rate / best_rate))
                + abs(math.log(run.bank_lr / best_bank)))
        # If the second half chose, it would choose the contrary
        finish(run, [9.0, loss], [9.0, -loss])
        return True
    return carry_out


def test_what_is_still_to_do_is_told_first_and_never_grows_unannounced(argv, here, monkeypatch,
                                                                       capsys):
    # The first rates are too low, so that the sweeps have to go on
    monkeypatch.setattr(race, "carry_out", invented(0.001, 100))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    race.main(argv(lrs="0.0001,0.0002", seeds=3))
    lines = capsys.readouterr().out.splitlines()
    assert "pip install matplotlib" in lines[-1]
    assert lines[0].startswith("a race of gpt2,dva+bank on tiny_char")
    # Twice two rates and three seeds, and two more rates of the bank
    assert lines[1].startswith("the plan: 2 contenders, seeds to report: 3; runs to go: at least "
                               "12, until about")
    counts = [re.search(r"; runs to go: (at least )?(\d+), until about \d\d:\d\d$", line).groups()
              for line in lines[1:] if "runs to go" in line]
    numbers = [int(number) for _, number in counts]
    assert len(numbers) > 18 and numbers[-1] == 0 and 0 not in numbers[:-1]
    for (least, number), (_, following) in zip(counts, counts[1:], strict=False):
        assert int(following) == int(number) - 1 or least


class Clock:
    """A module time in which nothing passes but what adds to `now`."""
    strftime, localtime = time.strftime, time.localtime

    def __init__(self):
        self.now = 0.0

    def time(self):
        return self.now


def test_a_race_is_shortened_to_its_minutes(argv, here, monkeypatch, capsys):
    monkeypatch.setattr(race, "carry_out", invented(0.1, 32))
    monkeypatch.setattr(race, "time_steps",
                        lambda *_: {"gpt2": [10.0] * 2, "dva": [5.0] * 2, "dva+bank": [5.0] * 2})
    monkeypatch.setattr(race, "time", Clock())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    changes = dict(max_iters=20_000, warmup_iters=2000, contenders="gpt2,dva,dva+bank", seeds=2,
                   lrs="0.001,0.002")
    monkeypatch.setattr(race, "EVALUATED", 100)
    race.main(argv(minutes=2, **changes))
    printed = capsys.readouterr().out
    assert "the plan: 3 contenders, seeds to report: 2; runs to go: 14, until" in printed
    results = json.loads(Path("out/race/tiny_char-tokens/results.json").read_text())
    fact = results["contenders"]["dva+bank"]
    steps = fact["settings"]["max_iters"]
    assert fact["settings"]["lr_decay_iters"] == steps
    assert fact["settings"]["warmup_iters"] == round(steps / 10)
    # All 14 runs with their evaluations take less than two minutes, and hardly less than one
    evaluations = 0.4 * 200 / (4 * 16)
    assert results["conditions"]["reported"] == {"tokens": 100, "bytes": 100}
    assert all(cfg["settings"]["eval_iters"] == 100 for cfg in results["contenders"].values())
    sweeps, seeds = steps + 2 * evaluations, steps + 4 * evaluations
    expected = (2 * 10 + 2 * 5 + 4 * 5) * sweeps / 1e3 + (2 * 10 + 2 * 5 + 2 * 5) * seeds / 1e3
    assert 60 < expected < 0.85 * 120
    # The sweeps end with the rates that are given, which the table says
    assert len(fact["sweep"]) == 4 and "0.002 (not bracketed) | 32 |" in printed
    # Rather fewer seeds than hardly any steps
    race.main(argv(minutes=0.43, name="short", **changes | {"seed": 1, "seeds": 9}))
    assert "3 contenders, seeds to report: 5; runs to go: 23, until" in capsys.readouterr().out
    assert "minutes=0.2 is too short for runs of 100 steps with 2 seeds" in message_of(
        race.main, argv(minutes=0.2, seed=99, overwrite=True, **changes))


@pytest.mark.parametrize("slower, seeds", [(1, 5), (1.5, 4), (9, 2)])
def test_a_slower_machine_gets_fewer_seeds(argv, here, monkeypatch, capsys, slower, seeds):
    rules, contenders = entered(argv(contenders="gpt2,dva", minutes=1, seeds=5))
    contenders = lengths_of(rules, contenders)
    times, clock, counts = {"gpt2": [100.0], "dva": [50.0]}, Clock(), []

    def carry_out(run):
        clock.now += slower * race.seconds_of([(run.block, run)], times)
        counts.append(run.seed)
        finish(run, [9.0, 9.0], [9.0, 9.0])
        return True

    monkeypatch.setattr(race, "time", clock)
    monkeypatch.setattr(race, "carry_out", carry_out)
    known, later = race.missing_runs(contenders, rules)
    deadline = 1.3 * race.seconds_of([*known.values(), *later], times)
    with Stop() as stop:
        race.run_all(contenders, rules, times, stop, deadline)
    assert rules.seeds == seeds and (clock.now <= deadline or seeds == 2)
    # Six runs to choose, then seed by seed
    assert counts == [1337] * 6 + [1338 + i // 2 for i in range(2 * seeds)]
    printed = capsys.readouterr().out
    assert printed.count("too slow for 5 seeds") == (slower > 1)


# ---- what the numbers follow from --------------------------------------------------------------

def test_the_cache_knows_all_code_that_the_numbers_follow_from(argv, tmp_path, monkeypatch):
    rules, _ = entered(argv())
    data = race.halve(open_data(rules), 16, 500)
    files = [tmp_path / file.relative_to(ROOT) for name in race.CODE for file in ROOT.glob(name)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file.relative_to(tmp_path), file)
    # A block of one's own, as docs/bank_controls.py has
    mine = tmp_path / "mine.py"
    mine.write_text("")
    monkeypatch.setattr(race, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(mine), raising=False)
    found = [race.conditions_of(rules, data, torch.device("cpu"))["code"]]
    for file in (mine, *files):
        with open(file, "a") as opened:
            opened.write("# changed\n")
        found.append(race.conditions_of(rules, data, torch.device("cpu"))["code"])
    assert len(set(found)) == len(found) == len(files) + 2
    assert {"train.py", "weights.py", "settings.py", "optimizers.py"} <= {file.name
                                                                          for file in files}


def test_bits_per_byte_are_those_of_the_reported_half(argv, gpt2_files):
    rules, _ = entered(argv())
    data = race.halve(open_data(rules), 16, 500)
    char = {"kind": "char", "alphabet": "aé"}
    words = Tokenizer({"kind": "gpt2:300"})
    ids = words.encode("and the cat sat on the mat")
    for spec, test, wanted in (
            (char, [1, 1, 0], {"tokens": 3, "bytes": 5}),
            # End-of-text is predicted, too, but it is no text
            (words.spec, [*ids, words.end_of_text], {"tokens": len(ids) + 1, "bytes": 26})):
        part = {"meta": data["meta"] | {"tokenizer": spec}, "test": np.array(test)}
        assert race.conditions_of(rules, part, torch.device("cpu"))["reported"] == wanted


def test_the_losses_are_those_of_the_two_halves(argv, tmp_path, data_dir):
    _, contenders = entered(argv(contenders="dva"))
    run = change(race.run_of(contenders["dva"], 0.01, 8.0, 1), lr_decay_iters=12)
    halves = race.halve(open_data(run), 16, 500)
    with Stop() as stop:
        train.train(run, torch.device("cpu"), stop, data=halves)
    ids = torch.from_numpy(ids_of(data_dir / "tiny_char", "val").astype("int64"))
    half = len(ids) // 2
    model = load_model(Path(run.out_dir, "last.pt"))
    for part, name in ((ids[:half], "val_loss"), (ids[half:], "test_loss")):
        # All windows of 16 that fit
        part = part[:(len(part) - 1) // 16 * 16 + 1]
        with torch.no_grad():
            logits = model(part[:-1].view(-1, 16))
        loss = F.cross_entropy(logits.flatten(0, 1), part[1:]).item()
        assert records(run.out_dir)[-1][name] == pytest.approx(loss, abs=1e-5)


def test_a_rate_that_breaks_counts_as_infinitely_bad(argv):
    rules, contenders = entered(argv(contenders="gpt2", warmup_iters=0, grad_clip=0,
                                     optimizer="adamw", lrs="0.01,1e30"))
    cfg = change(contenders["gpt2"], lr_decay_iters=12)
    runs, best, _ = race.tune("gpt2", cfg, rules)
    assert best is None
    for run in runs:
        assert race.carry_out(run)
    assert "broken" in race.result_of(runs[1])["broken"]
    assert race.final_loss(runs[1]) == math.inf > race.final_loss(runs[0])
    more, _, _ = race.tune("gpt2", cfg, rules)
    assert [run.learning_rate for run in more] == [1e-34, 0.01, 1e30]


# ---- who runs ----------------------------------------------------------------------------------

def test_contenders_are_made_from_what_was_given(argv):
    text = "gpt2,dva,gpt2:rotary=True,dva+bank:n_layer=12,dva+bank:n_embd=32,dva:bank_lr=2"
    _, contenders = entered(argv(contenders=text))
    models = list(contenders.values())
    assert [model.rotary for model in models] == [False, True, True, True, True, True]
    assert [model.bank_layers for model in models] == [0, 0, 0, 4, 1, 0]
    assert [model.value_dim for model in models] == [16, 16, 16, 16, 32, 16]
    # 23 letters and the space
    assert all(model.vocab_size == 24 for model in models)
    assert contenders["dva:bank_lr=2"].bank_lr == 2


def test_a_block_of_ones_own_races_without_banks(argv):
    _, contenders = entered(argv(contenders="gpt2,mean"))
    assert race.carry_out(race.run_of(contenders["mean"], 0.01, 8.0, 1))
    assert "cannot hold a bank" in message_of(entered, argv(contenders="mean+bank"))


def test_equal_time_gives_each_the_reference_time(argv):
    rules, contenders = entered(argv(contenders="gpt2,dva,dva:max_iters=5", match="time"))
    times = {"gpt2": [8.0, 8.0, 99.0], "dva": [5.0, 5.0, 1.0], "dva:max_iters=5": [1.0]}
    lengths = lengths_of(rules, contenders, times)
    assert [cfg.max_iters for cfg in lengths.values()] == [12, 19, 5]  # 12 x 8 / 5, rounded
    assert [cfg.lr_decay_iters for cfg in lengths.values()] == [12, 19, 5]
    assert [cfg.eval_interval for cfg in lengths.values()] == [4, 6, 2]


def test_equal_tokens_count_the_batch(argv):
    rules, contenders = entered(argv(contenders="gpt2,dva:batch_size=8"))
    lengths = lengths_of(rules, contenders)
    assert [cfg.max_iters for cfg in lengths.values()] == [12, 6]


@pytest.mark.parametrize("best_rate, best_bank, rates", [
    (0.03, 8, [0.01, 0.03, 0.1]), (0.001, 8, [0.0001, 0.001, 0.01, 0.03, 0.1]),
    (1.11, 32, [0.01, 0.03, 0.1, 0.333, 1.11, 3.7])])
def test_a_sweep_goes_on_until_its_best_has_worse_on_both_sides(argv, best_rate, best_bank, rates):
    rules, contenders = entered(argv(contenders="dva+bank", lrs="0.01,0.03,0.1"))
    cfg = contenders["dva+bank"]
    while True:
        runs, best, later = race.tune("dva+bank", cfg, rules)
        if best:
            break
        # As long as the learning rate is not chosen, two of three bank_lrs are still to be tried
        assert later == (0 if len({run.bank_lr for run in runs}) > 1 else 2)
        for run in runs:
            assert run.seed == 1337 and run.eval_interval == run.max_iters
            if race.result_of(run) is None:
                invented(best_rate, best_bank)(run)
    tried = sorted({run.learning_rate for run in runs})
    if best_rate == 0.001:
        rates = [0.000370, 0.00111, 0.00333, 0.01, 0.03, 0.1]
        best_rate = 0.00111
    assert tried == pytest.approx(rates) and best.learning_rate == best_rate
    assert best.bank_lr == best_bank
    banks = {run.bank_lr for run in runs if run.learning_rate == best_rate}
    assert min(banks) < best_bank < max(banks)


def test_what_fixes_its_rates_is_not_swept(argv):
    text = "dva+bank:learning_rate=0.02:bank_lr=3,gpt2:learning_rate=0.05"
    rules, contenders = entered(argv(contenders=text, seeds=3))
    known, later = race.missing_runs(contenders, rules)
    runs = [run for _, run in known.values()]
    # Seed by seed, without the first, which would choose
    assert [(run.block, run.learning_rate, run.seed) for run in runs] == [
        (block, rate, seed) for seed in (1338, 1339, 1340)
        for block, rate in (("dva", 0.02), ("gpt2", 0.05))]
    assert (runs[0].bank_lr, runs[0].min_lr, later) == (3, 0.002, [])


# ---- stops and kills ---------------------------------------------------------------------------

LONG = dict(max_iters=400, eval_interval=100, contenders="gpt2", lrs="0.01", seeds=1, rounds=1)


def start_race(argv, mark):
    """
    A race in a process and a process group of its own, which hands the environment variable MARK
    on to its workers.
    """
    environment = os.environ | {"MARK": f"{mark} of {os.getpid()}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / "tools" / "race.py", *argv], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def processes(mark):
    """The numbers of all processes to which start_race(argv, mark) gave its mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark} of {os.getpid()}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            # It ended meanwhile, or is another user's
            continue
    return found


def wait_until(condition, seconds=60):
    """Wait until condition() holds; whether it does in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_training(folder, lines, runs=1):
    """Have so many runs below the folder written so many lines?"""
    counts = [path.read_text().count("\n") for path in folder.rglob("metrics.jsonl")]
    return sum(count >= lines for count in counts) >= runs


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@pytest.mark.slow
@linux
def test_a_race_that_is_told_to_stop_ends_its_worker_and_goes_on_later(
        argv, here, tmp_path, monkeypatch, capsys):
    process = start_race(argv(**LONG), "stop")
    assert wait_until(lambda: is_training(tmp_path, 2))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
    assert "Traceback" not in err and not processes("stop")
    [last] = tmp_path.rglob("last.pt")
    checkpoint = torch.load(last, weights_only=True)
    assert 0 < checkpoint["step"] < 400 and not list(tmp_path.rglob("result.json"))

    # The rest as if in that script, but without processes, which take seconds to start
    monkeypatch.setattr(sys.modules["__main__"], "__file__", race.__file__, raising=False)
    race.main(argv(**LONG))
    assert "| gpt2 |" in capsys.readouterr().out
    [result] = tmp_path.rglob("result.json")
    # It went on, and came to what an uninterrupted run comes to
    log = (result.parent / "log.txt").read_text()
    assert log.count("step 0: loss") == 1 and log.count("step 300: loss") == 1
    whole = build(train.TrainConfig, checkpoint["config"] | {"out_dir": str(tmp_path / "whole")})
    assert race.carry_out(whole)
    assert race.result_of(whole) == json.loads(result.read_text())


@linux
@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 2])
@pytest.mark.parametrize("ending", ["signal to all", "kill"])
def test_no_process_is_left_of_a_race_that_is_ended(argv, tmp_path, ending, lines):
    """Either while the workers start, or while both train."""
    mark = f"{ending}-{lines}"
    process = start_race(argv(**LONG | dict(jobs=2, lrs="0.01,0.03")), mark)
    assert wait_until(lambda: len(processes(mark)) >= 4)
    assert wait_until(lambda: lines == 0 or is_training(tmp_path, lines, runs=2))
    if ending == "kill":
        process.kill()
        process.communicate()
        assert wait_until(lambda: not processes(mark), seconds=20)
    else:
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
        assert "Traceback" not in err and not processes(mark)


@linux
@pytest.mark.slow
def test_a_race_whose_worker_dies_says_so_and_stops_the_other(argv, tmp_path):
    changes = LONG | dict(max_iters=20_000, eval_interval=5000, jobs=2,
                          lrs="0.01,0.03")
    process = start_race(argv(**changes), "dies")
    assert wait_until(lambda: is_training(tmp_path, 2, runs=2))
    workers = [number for number in processes("dies")
               if "spawn_main" in Path("/proc", number, "cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: a worker died" in err
    assert "Traceback" not in err and not processes("dies")
    [saved] = tmp_path.rglob("last.pt")
    assert torch.load(saved, weights_only=True)["step"] % 5000


# ---- what the user gets wrong ------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(match="steps"), "match='steps': choose from tokens, time"),
    (dict(lrs="1e-3,fast"), "lrs='1e-3,fast': give rates above 0"),
    (dict(minutes=-1), "minutes=-1.0: it must be at least 0"),
    (dict(lrs="0"), "lrs='0': give rates above 0"),
    (dict(bank_lrs="-1"), "bank_lrs='-1': give rates"),
    (dict(contenders="gpt2,dvaa"), "choose from gpt2, dva"),
    (dict(contenders="gpt2,gpt2"), "names one of them twice"),
    (dict(contenders="gpt2,dva:qk=3"), "unknown setting 'qk'"),
    (dict(contenders="gpt2,dva+blank"), "only bank can follow the +"),
    (dict(contenders="gpt2,dva:help"), "then :setting=value"),
    (dict(contenders="gpt2,dva:block=gpt2"), "its block stands in front"),
    (dict(contenders="gpt2,dva:seed=3"), "seed is not for a contender to set"),
    (dict(contenders="gpt2,dva:block_size=8"), "block_size is not for a contender"),
    (dict(against="dva"), "against: 'dva' is none of the contenders gpt2, dva+bank"),
    (dict(seeds=0), "seeds=0: it must be at least 1"),
    (dict(block_size=300), "half of the validation split holds 250 tokens"),
    (dict(dataset="nowhere"), "prepare_data.py nowhere"),
    (dict(learning_rate=1), "learning_rate on the command line: this tool decides it"),
    (dict(out_dir="x"), "out_dir on the command line: this tool decides it")], ids=str)
def test_a_wrong_race_is_one_line_and_leaves_nothing(argv, tmp_path, changes, message):
    assert message in message_of(race.main, argv(**changes))
    assert not (tmp_path / "out").exists()
