"""The exercises of docs/dva.md, and their solutions: each command as it is typed, shortened."""
import importlib
import inspect
import re
import shlex
import textwrap

import pytest
from conftest import PLAY, ROOT, prepare, records
from test_race import stay_here

import model
from model import DynamicValueAttention

PAGE = (ROOT / "docs" / "dva.md").read_text().partition("## Exercises")[2]
SOLUTIONS = (ROOT / "docs" / "solutions.md").read_text()
# {number of the exercise: [arguments of python]}
COMMANDS = {int(number): [shlex.split(line) for line in re.findall(r"^ +python (.*)", text, re.M)]
            for number, text in re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", PAGE, re.M | re.S)}
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--qk_dim=8", "--batch_size=2"]
SHORT = ["--max_iters=4", "--warmup_iters=1"]
SHORTER = {"train.py": [*TINY, *SHORT, "--lr_decay_iters=4", "--eval_iters=1"],
           "tools.race": [*TINY, SHORT[0], "--minutes=0", "--seeds=2", "--rounds=1", "--lrs=3e-3"],
           "tools.bench": ["--n_layer=12", "--n_head=2", "--n_embd=16", "--rounds=1"],
           "tools.report": []}


def type_in(arguments):
    """What `python ARGUMENTS` does, in this process and shortened."""
    if arguments[0] == "-c":
        exec(arguments[1], {})
        return
    script, *arguments = arguments[1:] if arguments[0] == "-m" else arguments
    importlib.import_module(script.removesuffix(".py")).main([*arguments, *SHORTER[script]])


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A folder with the presets and, as plays_char, one of the plays."""
    prepare(tmp_path / "data", "plays_char", f"--input={PLAY}")
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    stay_here(monkeypatch)


def test_each_exercise_has_commands_and_folders_of_its_own():
    assert list(COMMANDS) == [1, 2, 3, 4, 5, 6] and all(COMMANDS.values())
    folders = [word for commands in COMMANDS.values() for arguments in commands
               for word in arguments if word.startswith("--out_dir=")]
    assert len(folders) == len(set(folders)) == 6 and "--out_dir=out-demo" not in folders
    assert all(f"## {number}. " in SOLUTIONS for number in COMMANDS)


def type_in_with(command, old, new):
    """First change DynamicValueAttention.forward as a reader does: `old`, found once, is `new`."""
    source = textwrap.dedent(inspect.getsource(DynamicValueAttention.forward))
    assert source.count(old) == 1
    names = dict(vars(model))
    exec(source.replace(old, new), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicValueAttention, "forward", names["forward"])
        type_in(command)


def test_gates(lesson, capsys):
    (with_gate, without, table), (sigmoid, all_three) = COMMANDS[1], COMMANDS[2]
    type_in(with_gate)
    type_in_with(without, " * g\n", "\n")
    line = re.search(r"change the line\s+`(.*?)`.*?to `(.*?)`", PAGE, re.S)
    type_in_with(sigmoid, line[1] + "\n", line[2] + "\n")
    losses = [records(folder)[-1]["val_loss"]
              for folder in ("out-gate", "out-gate-sigmoid", "out-no-gate")]
    assert len(set(losses)) == 3
    type_in(table)
    type_in(all_three)
    rows = capsys.readouterr().out.split("| run |")[-1]
    assert re.findall(r"^\| out-\S+ \| 4 \| (\S+) \|", rows, re.M) == [f"{x:.4f}" for x in losses]


def test_positions(lesson):
    *trainings, table = COMMANDS[3]
    # Exercise 1 has trained the first run of the table
    for command in (COMMANDS[1][0], *trainings, table):
        type_in(command)
    found = {records(word)[-1]["val_loss"] for word in table if word.startswith("out-")}
    assert len(found) == 4


def test_the_weights_are_those_of_the_solution(capsys):
    for command in COMMANDS[4]:
        type_in(command)
    for count in capsys.readouterr().out.split():
        assert f"{int(count):,}" in SOLUTIONS


def test_the_cache_holds_what_the_solution_says(capsys):
    type_in(COMMANDS[5][0])
    rows = re.findall(r"^\| (\S+) \|.*\| ([\d,]+) \|$", capsys.readouterr().out, re.M)
    # 12 layers, keys of 16, 64 and 64 channels, values of 16 and none in banks, and the token's id
    assert rows == [("gpt2", "1,544"), ("dva", "3,848"), ("dva:bank_layers=12", "3,080")]


def test_a_block_of_ones_own(lesson, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(class .*?)```", SOLUTIONS, re.S)
    names = dict(vars(model))
    exec(code, names)
    monkeypatch.setattr(model, "BLOCKS", names["BLOCKS"])
    type_in(*COMMANDS[6])
    table = (tmp_path / "out" / "race" / "plays_char-tokens" / "table.md").read_text()
    assert "| mine |" in table and "| dva |" in table
