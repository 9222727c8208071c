"""tools/report.py: the figures of a race, compared with figures by hand."""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nanodva.errors import UserError
from tools import report

ROOT = Path(__file__).parents[1]


def test_intervals_are_those_of_students_t():
    # Differences -0.1, -0.2, -0.3: mean -0.2, sd 0.1, t(2) = 4.303, margin 4.303 x 0.1 / sqrt(3)
    three = report.compare([1.9, 1.8, 1.7], [2.0, 2.0, 2.0])
    assert three["mean"] == pytest.approx(-0.2) and three["n"] == 3
    assert three["high"] - three["mean"] == pytest.approx(0.24843, abs=1e-5)
    assert three["mean"] - three["low"] == pytest.approx(0.24843, abs=1e-5)
    assert three["verdict"] == "not told apart"
    # -0.1, -0.2, -0.3, -0.2, -0.2: sd 0.0707, t(4) = 2.776, margin 0.0878
    five = report.compare([1.9, 1.8, 1.7, 1.8, 1.8], [2.0] * 5)
    assert five["high"] == pytest.approx(-0.2 + 0.08779, abs=1e-5) and five["verdict"] == "better"
    assert report.compare([2.0] * 5, [1.9, 1.8, 1.7, 1.8, 1.8])["verdict"] == "worse"
    # Paired: the seeds differ by much more than the contenders
    assert report.compare([1.010, 2.011, 3.012], [1.0, 2.0, 3.0])["verdict"] == "worse"
    assert report.compare([1.0], [2.0]) == {"mean": -1.0, "low": None, "high": None, "n": 1,
                                            "verdict": "not told apart"}
    assert report.compare([1.0, math.inf], [1.0, 1.0])["verdict"] == "broken"


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_the_quantiles_leave_two_and_a_half_percent_above_them(freedom):
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    t = np.linspace(0, report.STUDENT[freedom - 1], 200001)
    area = np.trapezoid(density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t)
    assert area == pytest.approx(0.475, abs=2e-5)


def test_steps_to_a_loss_lie_on_straight_lines():
    steps, losses = [0, 100, 200, 300, 400], [4.0, 3.0, 2.0, 2.5, 1.5]
    wanted = {4.5: 0, 4.0: 0, 3.5: 50, 2.0: 200, 2.25: 175, 1.75: 375, 1.5: 400, 1.4: math.inf}
    for target, step in wanted.items():
        assert report.steps_to(steps, losses, target) == step
    assert report.steps_to([], [], 1.0) == math.inf


def made_up(name, ms_before, ms_after, curves, broken=None):
    """The facts of a contender with one curve for each seed, evaluated at steps 0, 50, 100."""
    runs = [{"seed": seed, "steps": [0, 50, 100], "val": curve, "test": curve, "broken": broken}
            for seed, curve in enumerate(curves)]
    sweep = [{"learning_rate": rate, "bank_lr": 8.0, "loss": 2.0} for rate in (0.01, 0.02, 0.04)]
    settings = dict(max_iters=100, n_layer=2, n_embd=16, block_size=16, batch_size=4, compile=False,
                    gradient_accumulation_steps=1, optimizer="muon", dtype="float32", bank_layers=0)
    return {name: {"settings": settings, "parameters": 12345, "flops_per_token": 1,
                   "ms_before": ms_before, "ms_after": ms_after, "learning_rate": 0.02,
                   "bank_lr": 8.0, "sweep": sweep, "runs": runs}}


def results_of(facts, against=()):
    conditions = {"dataset": "tiny", "tokens": {"train": 9, "val": 10}, "machine": "abacus",
                  "bytes": {"train": 9, "val": 20}, "sha256": {"train": "0123456789abcdef"},
                  "torch": "2"}
    rules = {"seeds": 2, "match": "tokens", "sweep_share": 0.25}
    return {"name": "by hand", "rules": rules, "threads": 1, "conditions": conditions,
            "commit": "c0ffee", "contenders": facts,
            "figures": report.figures_of(facts, against)}


FACTS = (made_up("gpt2", [10.0, 10.0], [10.0, 10.0], [[4.0, 3.0, 2.1], [4.0, 3.0, 1.9]])
         | made_up("dva", [4.0, 6.0], [5.0, 5.0], [[4.0, 2.0, 1.5], [4.0, 2.5, 1.5]])
         | made_up("dva+bank", [5.0, 5.0], [5.5, 5.5], [[4.0, 3.0, 2.5], [4.0, 3.0, 1.5]]))


def test_times_to_the_reference_loss_by_hand():
    figures = report.figures_of(FACTS, ["dva"])
    assert figures["gpt2"]["seconds"] == pytest.approx(1.0)            # 100 steps of 10 ms
    # The loss to reach is 2.0: dva has it after 50 and 75 steps of 5 ms
    assert figures["dva"]["seconds_to_reference"] == pytest.approx(
        {"mean": 0.3125, "sd": 0.125 / 2**0.5, "n": 2})
    assert figures["dva"]["step_time_ratio"] == pytest.approx(0.5)
    # One of two seeds got there, two thirds of the way from step 50 to 100, at 5.25 ms
    reached = figures["dva+bank"]["seconds_to_reference"]
    assert reached["n"] == 1 and reached["mean"] == pytest.approx((50 + 50 / 1.5) * 5.25e-3)
    assert figures["dva+bank"]["against"].keys() == {"gpt2", "dva"}
    assert figures["dva"]["against"]["gpt2"]["mean"] == pytest.approx(-0.5)
    assert all(entry["bracketed"] for entry in figures.values())


def test_the_table_shows_drift_and_verdicts_and_seeds_that_never_got_there():
    facts = FACTS | made_up("broke", [1.0], [1.0], [[], []], broken="a loss is nan")
    facts["broke"]["ms_before"] = facts["broke"]["ms_after"] = [1.0, 1.0]
    facts["broke"]["sweep"] = facts["broke"]["sweep"][1:]
    text = report.table(results_of(facts, ["dva"]))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "| 5.00 |" in rows["dva"] and "| 5.25 (before 5.00, after 5.50) |" in rows["dva+bank"]
    assert "(1 of 2 seeds)" in rows["dva+bank"] and "not told apart" in rows["dva+bank"]
    assert "| 1.5000 ± 0.0000 | 1.082 ± 0.000 |" in rows["dva"]        # 1.5 / ln 2 x 10 / 20
    assert "0.312 ± 0.088" in rows["dva"] and "not bracketed" in rows["broke"]
    assert "broken" in rows["broke"] and "abacus" in text and "0123456789ab" in text


def test_pictures_name_their_lines_and_let_the_page_shine_through(tmp_path):
    report.draw_all(results_of(FACTS), ["gpt2", "dva"], tmp_path)
    picture, everything = ((tmp_path / name).read_text() for name in ("race.svg", "race-all.svg"))
    assert ">gpt2<" in picture and ">dva<" in picture and ">dva+bank<" not in picture
    assert all(f">{name}<" in everything for name in FACTS)
    assert report.COLOURS[0].lower() in picture and report.COLOURS[0].lower() not in everything
    assert "fill: #ffffff" not in picture and "fill: #000000" not in picture
    report.draw_all(results_of(FACTS), ["gpt2", "dva"], tmp_path)
    assert (tmp_path / "race.svg").read_text() == picture


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.draw_all(results_of(FACTS), ["gpt2"], tmp_path)
    printed = capsys.readouterr().out
    assert "pip install matplotlib" in printed and printed.count("\n") == 1


def write_races(folder, lines):
    """
    Two races, small and large, in which dva lies 0.5 below gpt2, with an interval, and 0.1 above
    it, and gaps.json with these lines. The options that draw it to gaps.svg.
    """
    above = (made_up("gpt2", [1.0], [1.0], [[4.0, 3.0, 1.9]])
             | made_up("dva", [1.0], [1.0], [[4.0, 3.0, 2.0]]))
    for name, facts in dict(small=FACTS, large=above).items():
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results_of(facts)))
    (folder / "gaps.json").write_text(json.dumps(lines))
    return [f"--gaps={folder / 'gaps.json'}", f"--picture={folder / 'gaps.svg'}"]


def test_gaps_are_drawn_on_the_right_side_of_the_line(tmp_path, capsys):
    pairs = [["small", "dva", "gpt2"], ["large", "dva", "gpt2"]]
    report.main(write_races(tmp_path, {"without banks": pairs}))
    picture = tmp_path / "gaps.svg"
    assert str(picture) in capsys.readouterr().out
    text = picture.read_text()
    assert ">without banks<" in text and text.count(">2 layers x 16<") == 2
    # In SVG y grows downwards
    x0, y0, x1, y1 = line_in(text, f"{report.COLOURS[0].lower()}; stroke-width: 2;")
    _, zero, _, end = line_in(text, f"{report.GREY}; stroke-linecap")
    assert zero == end and x0 < x1
    assert y1 < zero < y0 and (y0 - zero) / (zero - y1) == pytest.approx(5, rel=1e-3)


def line_in(svg, stroke):
    """x and y of both ends of the first straight line that is drawn with a stroke."""
    found = re.search(rf'd="M (\S+) (\S+) \nL (\S+) (\S+) \n"[^>]*stroke: {stroke}', svg)
    return map(float, found.groups())


@pytest.mark.parametrize("lines, message", [
    ({"a": [["small", "dva", "gpt3"]]},
     "the race by hand knows no gap of 'dva' to 'gpt3', but of dva to gpt2, dva+bank to gpt2"),
    ({str(i): [["small", "dva", "gpt2"]] for i in range(5)}, "with one to four lines"),
    ({}, "with one to four lines"), ({"a": []}, "with one to four lines"),
    ({"a": ["small"]}, "must hold {line: [[RACE, OURS, THEIRS], ...]}"), ([], "must hold {line"),
    ({"a": [["nowhere", "dva", "gpt2"]]}, "there is no")])
def test_a_picture_of_gaps_that_cannot_be_is_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=re.escape(message)):
        report.main(write_races(tmp_path, lines))
    assert not (tmp_path / "gaps.svg").exists()


def test_the_picture_in_docs_can_be_drawn_and_says_so_where_it_cannot(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    report.main([f"--picture={tmp_path / 'gaps.svg'}"])
    with pytest.raises(UserError, match="there is no nowhere.json"):
        report.main(["--gaps=nowhere.json"])
