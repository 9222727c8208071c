"""tools/race.py: a small race from end to end, and kills."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare_data
import train
from model import BLOCKS
from nanodva.errors import UserError
from nanodva.machine import Stop
from nanodva.settings import build, change, load_settings, read_settings
from nanodva.weights import load_model
from tools import race

ROOT = Path(__file__).parents[1]
TINY = dict(dataset="tiny_char", n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=16,
            batch_size=4, gradient_accumulation_steps=1, warmup_iters=2, max_iters=12,
            eval_interval=4, device="cpu", dtype="float32", compile=False, optimizer="muon",
            contenders="gpt2,dva+bank", seeds=2, lrs="0.01,0.03,0.1", rounds=2)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the data set tiny_char: 4,500 + 500 characters of invented words."""
    folder = tmp_path_factory.mktemp("data")
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randint(1, 6))) for _ in range(60)]
    (folder / "tiny.txt").write_text(" ".join(choose.choices(words, k=2000))[:5000])
    prepare_data.main(["tiny_char", f"--input={folder / 'tiny.txt'}", f"--data_dir={folder}"])
    return folder


@pytest.fixture
def argv(data, tmp_path, monkeypatch):
    """argv(**changes): the command line of a tiny race, which writes below tmp_path."""
    monkeypatch.chdir(tmp_path)

    def argv(**changes):
        settings = TINY | {"data_dir": data} | changes
        return [f"--{name}={value}" for name, value in settings.items()]

    return argv


def entered(argv):
    """(RaceConfig, {contender: TrainConfig}) of a command line, before any step."""
    given = read_settings(race.RaceConfig, [str(ROOT / "config" / "race_laptop.py"), *argv])
    rules = build(race.RaceConfig, given)
    return rules, race.enter(rules, given, {"machine": "none"}, torch.device("cpu"))


def finish(run, val, test, steps=(0, 10), broken=None):
    """Leave behind what a finished run does."""
    Path(run.out_dir).mkdir(parents=True)
    result = {"steps": list(steps), "val": val, "test": test, "broken": broken}
    Path(run.out_dir, "result.json").write_text(json.dumps(result))


def error_of(function, *arguments):
    """The message of the UserError that function(*arguments) ends with: one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- a race ------------------------------------------------------------------------------------

def test_a_race_of_two_from_end_to_end(argv, tmp_path, capsys):
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
        # What chose is the first half, and what is reported is the second
        best = next(run for run in fact["runs"] if run["seed"] == 1337)
        assert best["val"][-1] == banks[fact["bank_lr"]] != best["test"][-1]
        assert [run["seed"] for run in fact["runs"]] == [1337, 1338]
        assert all(run["steps"] == [0, 4, 8, 12] for run in fact["runs"])
        losses = [run["test"][-1] for run in fact["runs"]]
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2**0.5:.4f} |" in row
        assert f"| {fact['learning_rate']:g} |" in row
    assert re.search(r"\| (better|worse|not told apart) \|", table)
    for name in ("race.svg", "race-all.svg"):
        assert "dva+bank" in (folder / name).read_text()
    assert not list(tmp_path.rglob("*.pt"))

    # The same command runs nothing again and says the same
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    race.main(argv())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == times
    assert json.loads((folder / "results.json").read_text()) == results

    # Another race does not take its place unasked
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    message = error_of(race.main, argv(contenders="gpt2,dva"))
    assert "contenders='gpt2,dva+bank'" in message and "--overwrite=True" in message
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    race.main(argv(contenders="gpt2", seeds=1, lrs="0.03", overwrite=True))
    assert "dva+bank" not in (folder / "table.md").read_text()


def test_the_losses_are_those_of_the_two_halves(argv, tmp_path, data):
    _, contenders = entered(argv(contenders="dva"))
    run = change(race.run_of(contenders["dva"], 0.01, 8.0, 1), lr_decay_iters=12)
    halves = race.halve(train.open_data(run), 16)
    with Stop() as stop:
        train.train(run, torch.device("cpu"), stop, data=halves)
    records = [json.loads(line) for line in
               Path(run.out_dir, "metrics.jsonl").read_text().splitlines()]
    tokens = np.fromfile(data / "tiny_char" / "val.bin", "uint16").astype("int64")
    half = len(tokens) // 2
    model = load_model(str(Path(run.out_dir, "last.pt")))
    for part, name in ((tokens[:half], "val_loss"), (tokens[half:], "test_loss")):
        # All windows of 16 that fit
        part = torch.from_numpy(part[:(len(part) - 1) // 16 * 16 + 1])
        with torch.no_grad():
            logits, _ = model(part[:-1].view(-1, 16), part[1:].view(-1, 16))
        loss = F.cross_entropy(logits.flatten(0, 1), part[1:]).item()
        assert records[-1][name] == pytest.approx(loss, abs=1e-5)


def test_a_rate_that_breaks_counts_as_infinitely_bad(argv):
    rules, contenders = entered(argv(contenders="gpt2", warmup_iters=0, grad_clip=0,
                                     optimizer="adamw", lrs="0.01,1e30"))
    cfg = change(contenders["gpt2"], lr_decay_iters=12)
    runs, best = race.tune("gpt2", cfg, rules)
    assert best is None
    for run in runs:
        assert race.carry_out(run)
    assert "broken" in race.result_of(runs[1])["broken"]
    assert race.final_loss(runs[1], "val") == math.inf > race.final_loss(runs[0], "val")
    more, _ = race.tune("gpt2", cfg, rules)
    assert [run.learning_rate for run in more] == [1e-34, 0.01, 1e30]


# ---- who runs ----------------------------------------------------------------------------------

def test_contenders_are_made_from_what_was_given(argv):
    text = "gpt2,dva,gpt2:rotary=True,dva+bank:n_layer=12,dva+bank:n_embd=32,dva:bank_lr=2"
    _, contenders = entered(argv(contenders=text))
    models = list(contenders.values())
    assert [model.rotary for model in models] == [False, True, True, True, True, True]
    assert [model.bank_layers for model in models] == [0, 0, 0, 4, 1, 0]
    assert [model.value_dim for model in models] == [16, 16, 16, 16, 32, 16]
    assert all(model.vocab_size == 17 for model in models)             # 16 letters and the space
    assert contenders["dva:bank_lr=2"].bank_lr == 2


def test_a_block_of_ones_own_races_without_banks(argv, monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, config, banked):
            super().__init__()
            self.linear = torch.nn.Linear(config.n_embd, config.n_embd)

        def forward(self, x, idx, cache=None):
            return x + self.linear(x)

    monkeypatch.setitem(BLOCKS, "mine", Mine)
    _, contenders = entered(argv(contenders="gpt2,mine"))
    assert race.carry_out(race.run_of(contenders["mine"], 0.01, 8.0, 1))
    assert "cannot hold a bank" in error_of(entered, argv(contenders="mine+bank"))


def test_equal_time_gives_each_the_reference_time(argv):
    rules, contenders = entered(argv(contenders="gpt2,dva,dva:max_iters=5", match="time"))
    times = {"gpt2": [8.0, 8.0, 99.0], "dva": [5.0, 5.0, 1.0], "dva:max_iters=5": [1.0]}
    lengths = race.set_lengths(contenders, rules, times)
    assert [cfg.max_iters for cfg in lengths.values()] == [12, 19, 5]  # 12 x 8 / 5, rounded
    assert [cfg.lr_decay_iters for cfg in lengths.values()] == [12, 19, 5]
    assert [cfg.eval_interval for cfg in lengths.values()] == [4, 6, 2]


def test_equal_tokens_count_the_batch(argv):
    rules, contenders = entered(argv(contenders="gpt2,dva:batch_size=8"))
    lengths = race.set_lengths(contenders, rules, {})
    assert [cfg.max_iters for cfg in lengths.values()] == [12, 6]


@pytest.mark.parametrize("best_rate, best_bank, rates", [
    (0.03, 8, [0.01, 0.03, 0.1]), (0.001, 8, [0.0001, 0.001, 0.01, 0.03, 0.1]),
    (1.11, 32, [0.01, 0.03, 0.1, 0.333, 1.11, 3.7])])
def test_a_sweep_goes_on_until_its_best_has_worse_on_both_sides(argv, best_rate, best_bank, rates):
    rules, contenders = entered(argv(contenders="dva+bank", lrs="0.01,0.03,0.1"))
    cfg = contenders["dva+bank"]
    while True:
        runs, best = race.tune("dva+bank", cfg, rules)
        if best:
            break
        for run in runs:
            if race.result_of(run) is None:
                # The farther from the best, the worse
                loss = (abs(math.log(run.learning_rate / best_rate))
                        + abs(math.log(run.bank_lr / best_bank)))
                # If the second half chose, it would choose the contrary
                finish(run, [9.0, loss], [9.0, -loss])
    tried = sorted({run.learning_rate for run in runs})
    if best_rate == 0.001:
        rates = [0.000370, 0.00111, 0.00333, 0.01, 0.03, 0.1]
        best_rate = 0.00111
    assert tried == pytest.approx(rates) and best.learning_rate == best_rate
    assert best.bank_lr == best_bank
    banks = {run.bank_lr for run in runs if run.learning_rate == best_rate}
    assert min(banks) < best_bank < max(banks)


def test_a_sweep_can_have_shorter_runs_than_the_seeds(argv):
    rules, contenders = entered(argv(contenders="gpt2", sweep_share=0.25, warmup_iters=4))
    cfg = race.set_lengths(contenders, rules, {})["gpt2"]
    runs, _ = race.tune("gpt2", cfg, rules)
    for run in runs:
        assert (run.max_iters, run.lr_decay_iters) == (3, 3)
        assert (run.warmup_iters, run.eval_interval) == (1, 3)
        finish(run, [9.0, abs(run.learning_rate - 0.03)], [9.0, 9.0])
    _, best = race.tune("gpt2", cfg, rules)
    seeds = race.seeds_of(best, cfg, rules)
    assert all((run.learning_rate, run.max_iters, run.warmup_iters) == (0.03, 12, 4)
               for run in seeds)
    assert len(race.missing_runs({"gpt2": cfg}, rules)) == 2


def test_a_contender_that_fixes_its_rates_is_not_swept(argv):
    rules, contenders = entered(argv(contenders="dva+bank:learning_rate=0.02:bank_lr=3"))
    [(name, cfg)] = contenders.items()
    runs, best = race.tune(name, cfg, rules)
    assert [(run.learning_rate, run.min_lr, run.bank_lr) for run in runs] == [(0.02, 0.002, 3)]
    assert best is None


# ---- stops and kills ---------------------------------------------------------------------------

LONG = dict(max_iters=400, eval_interval=100, contenders="gpt2", lrs="0.01", seeds=1, rounds=1)


def start_race(argv, mark):
    """
    A race in a process and a process group of its own, which hands the environment variable MARK
    on to its workers.
    """
    environment = os.environ | {"MARK": mark, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / "tools" / "race.py", *argv], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def processes(mark):
    """The numbers of all processes that have the environment variable MARK=mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            # It ended meanwhile, or is another user's
            continue
    return found


def wait_until(condition, seconds=60):
    """Wait until condition() holds; whether it does in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_training(folder, lines, runs=1):
    """Have so many runs below the folder written so many lines?"""
    counts = [path.read_text().count("\n") for path in folder.rglob("metrics.jsonl")]
    return sum(count >= lines for count in counts) >= runs


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@linux
def test_a_race_that_is_told_to_stop_ends_its_worker_and_goes_on_later(argv, tmp_path):
    process = start_race(argv(**LONG), "stop")
    assert wait_until(lambda: is_training(tmp_path, 2))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
    assert "Traceback" not in err and not processes("stop")
    [last] = tmp_path.rglob("last.pt")
    step = torch.load(last, weights_only=True)["step"]
    assert 0 < step < 400 and not list(tmp_path.rglob("result.json"))

    race.main(argv(**LONG))
    [result] = tmp_path.rglob("result.json")
    # It went on, and came to what an uninterrupted run comes to
    log = (result.parent / "log.txt").read_text()
    assert log.count("step 0: loss") == 1 and log.count("step 300: loss") == 1
    _, contenders = entered(argv(**LONG))
    cfg = change(contenders["gpt2"], lr_decay_iters=400, out_dir="elsewhere")
    whole = race.run_of(cfg, 0.01, 8.0, 1337)
    assert race.carry_out(whole)
    assert race.result_of(whole) == json.loads(result.read_text())


@linux
@pytest.mark.parametrize("lines", [0, 2])
def test_a_signal_to_all_processes_of_a_race_stops_it(argv, tmp_path, lines):
    mark = f"all-{lines}"
    process = start_race(argv(**LONG | dict(jobs=2, lrs="0.01,0.03")), mark)
    # Either while the workers start, or while both train
    assert wait_until(lambda: len(processes(mark)) >= 4)
    assert wait_until(lambda: lines == 0 or is_training(tmp_path, lines, runs=2))
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
    assert "Traceback" not in err and not processes(mark)


@linux
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


@linux
@pytest.mark.parametrize("lines", [0, 2])
def test_a_race_that_is_killed_leaves_no_process(argv, tmp_path, lines):
    mark = f"kill-{lines}"
    process = start_race(argv(**LONG), mark)
    # Either while the worker starts, or while it trains
    assert wait_until(lambda: len(processes(mark)) >= 3)
    assert wait_until(lambda: lines == 0 or is_training(tmp_path, lines))
    process.kill()
    process.communicate()
    assert wait_until(lambda: not processes(mark), seconds=20)


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "run"

    def write_too():
        with race.only_writer(folder, patience=0.1):
            pass

    with race.only_writer(folder):
        # The lock belongs to an open file, so that a process can lock itself out
        assert f"another process writes in {folder}" in error_of(write_too)
    write_too()


# ---- what the user gets wrong ------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(match="steps"), "match='steps': there are tokens, time"),
    (dict(lrs="1e-3,fast"), "lrs='1e-3,fast': give rates above 0"),
    (dict(sweep_share=2), "sweep_share=2.0: it must be above 0 and at most 1"),
    (dict(lrs="0"), "lrs='0': give rates above 0"),
    (dict(bank_lrs="-1"), "bank_lrs='-1': give rates"),
    (dict(contenders="gpt2,dvaa"), "there are gpt2, dva"),
    (dict(contenders="gpt2,gpt2"), "names one of them twice"),
    (dict(contenders="gpt2,dva:qk=3"), "unknown setting 'qk'"),
    (dict(contenders="gpt2,dva+blank"), "behind the + stands bank"),
    (dict(contenders="gpt2,dva:help"), "then :setting=value"),
    (dict(contenders="gpt2,dva:block=gpt2"), "its block stands in front"),
    (dict(contenders="gpt2,dva:seed=3"), "seed is not for a contender to set"),
    (dict(contenders="gpt2,dva:block_size=8"), "block_size is not for a contender"),
    (dict(against="dva"), "against: 'dva' is none of the contenders gpt2, dva+bank"),
    (dict(highlight="gpt3"), "highlight: 'gpt3' is none"),
    (dict(seeds=0), "seeds=0: it must be at least 1"),
    (dict(block_size=300), "half of the validation split holds 250 tokens"),
    (dict(dataset="nowhere"), "prepare_data.py nowhere"),
    (dict(learning_rate=1), "learning_rate on the command line: this tool decides it"),
    (dict(out_dir="x"), "out_dir on the command line: this tool decides it")], ids=str)
def test_a_wrong_race_is_one_line_and_leaves_nothing(argv, tmp_path, changes, message):
    assert message in error_of(race.main, argv(**changes))
    assert not (tmp_path / "out").exists()


def test_help_offers_what_the_race_obeys_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as end:
        race.main(["--help"])
    offered = set(re.findall(r"^  --(\w+)=", capsys.readouterr().out, re.MULTILINE))
    assert end.value.code == 0 and not offered & (set(race.DECIDED) - {"seed", "overwrite"})
    assert {"contenders", "seeds", "seed", "n_layer", "max_iters", "optimizer", "jobs"} <= offered


def test_it_runs_as_a_script_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "race.py", "--contenders=gpt9"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no data/shakespeare_char")


@pytest.mark.parametrize("preset", sorted(ROOT.glob("config/race_*.py")), ids=str)
def test_the_presets_are_races(preset):
    load_settings(race.RaceConfig, [str(preset)])
