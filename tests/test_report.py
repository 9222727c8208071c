"""tools/report.py: the figures of a race, compared with figures by hand."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from nanodva.errors import UserError
from tools import report


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


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10])
def test_the_quantiles_leave_two_and_a_half_percent_above_them(freedom):
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    width = report.STUDENT[freedom - 1] / 200_000
    t = (np.arange(200_000) + 0.5) * width
    area = width * (density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)).sum()
    assert area == pytest.approx(0.475, abs=2e-5)


def test_steps_to_a_loss_lie_on_straight_lines():
    steps, losses = [0, 100, 200, 300, 400], [4.0, 3.0, 2.0, 2.5, 1.5]
    wanted = {4.5: 0, 4.0: 0, 3.5: 50, 2.0: 200, 2.25: 175, 1.75: 375, 1.5: 400, 1.4: math.inf}
    for target, step in wanted.items():
        assert report.steps_to(steps, losses, target) == step


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
                  "bytes": {"train": 9, "val": 30}, "sha256": {"train": "0123456789abcdef"},
                  "torch": "2", "reported": {"tokens": 5, "bytes": 10}}
    rules = {"seeds": 2, "seed": 7, "match": "tokens"}
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


def test_a_rate_is_bracketed_by_a_lower_one_and_a_higher_one():
    tried = {0.02: [0.01, 0.02, 0.04], 0.01: [0.01, 0.02], 0.04: [0.02, 0.04]}
    assert [report.is_bracketed(best, rates) for best, rates in tried.items()] == [True, False,
                                                                                   False]
    # One rate, or none, was tried
    assert not report.is_bracketed(0.02, [0.02]) and not report.is_bracketed(0.02, [])
    facts = made_up("dva+bank", [1.0], [1.0], [[4.0, 3.0, 2.0]] * 2)
    facts["dva+bank"]["settings"] = facts["dva+bank"]["settings"] | {"bank_layers": 1}
    results = results_of(facts)
    assert results["figures"]["dva+bank"]["bracketed"] == {"learning_rate": True, "bank_lr": False}
    assert "| 0.02 | 8 (not bracketed) |" in report.table(results)
    assert "chose them" in report.table(results) and "seed 7" in report.table(results)


def test_the_table_says_where_batches_differ():
    facts = FACTS | made_up("dva:batch_size=8", [1.0] * 2, [1.0] * 2, [[4.0, 3.0, 2.0]] * 2)
    word = "equal seeds do not see equal batches"
    assert word not in report.table(results_of(facts))
    own = facts["dva:batch_size=8"]["settings"]
    # The same windows of a step, cut otherwise
    facts["dva:batch_size=8"]["settings"] = own | dict(batch_size=2, gradient_accumulation_steps=2)
    assert word not in report.table(results_of(facts))
    facts["dva:batch_size=8"]["settings"] = own | dict(batch_size=8)
    assert word in report.table(results_of(facts))


def test_the_table_shows_drift_and_verdicts_and_seeds_that_never_got_there():
    facts = FACTS | made_up("broke", [1.0], [1.0], [[], []], broken="a loss is nan")
    facts["broke"]["ms_before"] = facts["broke"]["ms_after"] = [1.0, 1.0]
    facts["broke"]["sweep"] = facts["broke"]["sweep"][1:]
    text = report.table(results_of(facts, ["dva"]))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "| 5.00 |" in rows["dva"] and "| 5.25 (before 5.00, after 5.50) |" in rows["dva+bank"]
    assert "(1 of 2 seeds)" in rows["dva+bank"] and "not told apart" in rows["dva+bank"]
    assert "| 1.5000 ± 0.0000 | 1.082 ± 0.000 |" in rows["dva"]        # 1.5 / ln 2 x 5 / 10
    assert "0.312 ± 0.088" in rows["dva"] and "not bracketed" in rows["broke"]
    assert "broken" in rows["broke"] and "abacus" in text and "0123456789ab" in text


def test_pictures_name_their_lines_and_let_the_page_shine_through(tmp_path):
    path = tmp_path / "race.svg"
    report.draw_race(results_of(FACTS), path)
    picture = path.read_text()
    for name, colour in zip(FACTS, report.COLOURS, strict=False):
        assert re.search(rf"fill: {colour.lower()}[^>]*>{re.escape(name)}<", picture)
    assert "fill: #ffffff" not in picture and "fill: #000000" not in picture
    report.draw_race(results_of(FACTS), path)
    assert path.read_text() == picture


# ---- runs of train.py --------------------------------------------------------------------------

def write_run(folder, losses, dataset="tiny"):
    """Leave metrics.jsonl as a run does that a kill ended after these (train, val) losses."""
    records = [{"step": -1, "config": {"dataset": dataset}}]
    records += [{"step": i, "train_loss": train} | ({} if val is None else {"val_loss": val})
                for i, (train, val) in enumerate(losses)]
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "train_lo')


def test_the_losses_of_a_run_are_drawn_beside_it(tmp_path, capsys):
    write_run(tmp_path / "one", [(2.0, 1.2), (3.0, None), (1.0, 2.2), (2.5, None), (1.5, 4.2)])
    report.main([str(tmp_path / "one")])
    path = tmp_path / "one" / "loss.svg"
    assert f"the picture is {path}" in capsys.readouterr().out
    picture = path.read_text()
    assert f">{tmp_path / 'one'}<" in picture and "fill: #ffffff" not in picture
    # In SVG y grows downwards: a loss falls there by as much as it does in the file
    thin, strong = (curve_in(picture, f"{report.COLOURS[0].lower()}; stroke-width: {width}")
                    for width in ("0.5", "2"))
    scale = (strong[-1][1] - strong[0][1]) / (4.2 - 1.2)
    assert [x for x, _ in strong] == pytest.approx([thin[i][0] for i in (0, 2, 4)])
    heights = [(y - strong[0][1]) / scale + 1.2 for _, y in thin]
    assert scale < 0 and heights == pytest.approx([2.0, 3.0, 1.0, 2.5, 1.5], abs=1e-3)


def curve_in(svg, stroke):
    """[(x, y), ...] of the first line that is drawn with a stroke."""
    path = re.search(rf'd="M ([^"]+)"[^>]*stroke: {stroke}', svg)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_several_runs_are_one_picture_and_unlike_texts_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        write_run(Path(f"run{i}"), [(4.0, 4.0), (3.0, 3.0 + i / 10)], "b" if i == 5 else "a")
    report.main(["run0", "run1", "run2", "run3", "run4"])
    assert "differ" not in capsys.readouterr().out
    picture = Path("run0", "loss.svg").read_text()
    assert all(f">run{i}<" in picture for i in range(5))
    # The fifth has the colour of the first, and dashes
    dashed = "stroke-dasharray: [0-9.,]+; stroke-dashoffset: 0; stroke: "
    assert len(re.findall(dashed + report.COLOURS[0].lower(), picture)) == 2
    report.main(["run4", "run5", "--picture=two.svg"])
    assert "the data sets a, b differ" in capsys.readouterr().out and Path("two.svg").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "which run shall be drawn"),
    (["empty", "--picture=empty/metrics.jsonl"], "is there and is no .svg: name a new file"),
    (["nowhere"], "no nowhere/metrics.jsonl: give the out_dir"),
    (["empty"], "metrics.jsonl holds no evaluation yet")])
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("empty"), [])
    with pytest.raises(UserError, match=re.escape(message)):
        report.main(argv)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.jsonl"]
