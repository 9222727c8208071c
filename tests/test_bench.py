"""tools/bench.py on a tiny shape: its figures are of the right things."""
import re
import statistics
import time

import pytest
import torch
from conftest import command_line, refused

from nanodva.settings import build
from tools import bench

SIZES = dict(n_layer=3, n_head=2, n_embd=16, block_size=8, qk_dim=4, vocab_size=19, batch_size=2)
SHAPE = command_line(SIZES | dict(rounds=3, dtype="float32", max_new_tokens=8, num_samples=2,
                                  device="cpu"))
THREE = "--contenders=gpt2,dva:value_dim=32,dva+bank:dtype=bfloat16"


def rows_of(capsys, *argv):
    """[[cells of a row]] of the tables that the bench prints, called with SHAPE and these."""
    bench.main([*SHAPE, *argv])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines if "---" not in line]


def numbers(cells):
    return [float(cell.replace(",", "")) for cell in cells]


def test_it_times_every_contender_in_turn(capsys, monkeypatch):
    times = iter([9.0] * 6 + [10.0, 1.0, 100.0, 12.0, 2.0, 300.0, 11.0, 9.0, 200.0])

    def timed(device, function, *arguments):
        function(*arguments)
        return next(times)
    monkeypatch.setattr(bench, "timed", timed)
    heading, *rows = rows_of(capsys, "--what=train", THREE)
    assert [row[:3] for row in rows] == [["gpt2", "float32", "False"],
                                         ["dva:value_dim=32", "float32", "False"],
                                         ["dva+bank:dtype=bfloat16", "bfloat16", "False"]]
    for row, ms in zip(rows, (11, 2, 200), strict=True):
        parameters, flops, *rest = numbers(row[3:])
        assert rest == pytest.approx([ms, ms / 11, 16 / ms * 1e3, 16 * flops / ms / 1e6], rel=1e-3)
        cfg = bench.contender(row[0], SIZES)
        assert parameters == bench.build_model(cfg).num_params()


def test_times_are_milliseconds():
    assert 20 <= bench.timed(torch.device("cpu"), time.sleep, 0.02) < 20_000


def test_what_a_cache_holds_is_counted(capsys):
    heading, *rows = rows_of(capsys, "--what=sample", THREE, "--block_size=1")
    # Keys and values of three layers, in the last contender in bfloat16 and with a layer that has
    # a bank and so no values; and a token id of 8 bytes
    assert [int(row[4]) for row in rows] == [3 * 2 * 16 * 4 + 8, 3 * (4 + 32) * 4 + 8,
                                             (3 * 4 + 2 * 16) * 2 + 8]
    assert min(min(numbers(row[2:4])) for row in rows) > 0 and "of 2 texts" in heading[3]


def test_transformers_model_of_the_same_shape_samples_in_turn(capsys):
    heading, row = rows_of(capsys, "--what=transformers")
    assert row[:2] == ["gpt2", "float32"] and min(numbers(row[2:])) > 0


def test_a_profile_names_the_slowest_operations_of_a_step(capsys):
    heading, *rows = rows_of(capsys, "--what=profile", "--contenders=gpt2,dva", "--rounds=1")
    for name in ("gpt2", "dva"):
        found = [row for row in rows if row[0] == name]
        shares = numbers(row[4] for row in found)
        assert len(found) == 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1
        assert any(re.fullmatch("aten::(mm|addmm)", row[2]) for row in found)


@pytest.mark.parametrize("argument, message", [
    ("--contenders=gpt2+blank", "only bank can follow the +"),
    ("--contenders=gtp2", "choose from gpt2"),
    ("--contenders=dva:qk=3", "unknown setting 'qk'"),
    ("--contenders=dva:help", "then :setting=value"),
    ("--contenders=dva:block=gpt2", "this tool decides"),
    ("--contenders=dva:dtype=auto", "say outright which dtype"),
    ("--what=all", "name one or more of train, sample"),
    ("--block=dva", "block on the command line: this tool decides it"),
    ("--n_embd=2000000 --contenders=gpt2", "out of memory (tried to allocate"),
    ("--rounds=0", "rounds=0: it must be at least 1")])
def test_a_wrong_argument_is_one_line(argument, message):
    with refused(message):
        bench.main([*SHAPE, *argument.split()])


def test_a_contender_has_a_third_of_banks_unless_it_says_how_many():
    shape = dict(n_layer=7, n_embd=24, n_head=2)
    assert bench.contender("dva+bank", shape).bank_layers == 3
    assert bench.contender("gpt2+bank:bank_layers=2:n_layer=3", shape).bank_layers == 2
    assert bench.contender("dva+bank:n_layer=3", shape).bank_layers == 1


@pytest.mark.parametrize("optimizer, dtype, compiled", [
    ("adamw", "float32", False), ("muon", "bfloat16", False), ("muon", "float16", False),
    pytest.param("muon", "bfloat16", True, marks=pytest.mark.slow)])
def test_a_step_learns_in_every_precision(optimizer, dtype, compiled):
    cfg = build(bench.TrainConfig, SIZES | dict(
        block="dva", gradient_accumulation_steps=2, optimizer=optimizer, dtype=dtype,
        learning_rate=1e-2, compile=compiled))
    step = bench.training_step(cfg, torch.device("cpu"))
    losses = [step() for _ in range(20)]
    assert statistics.mean(losses[-3:]) < losses[0] - 0.3
