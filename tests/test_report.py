"""tools/report.py: the figures of a race, compared with figures by hand."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, contents, refused

from tools import report


def seeds(losses):
    return dict(enumerate(losses))


@pytest.mark.parametrize("ours, theirs, n, mean, margin, verdict", [
    # Differences -0.1, -0.2, -0.3: mean -0.2, sd 0.1, t(2) = 4.303, margin 4.303 x 0.1 / sqrt(3)
    ([1.9, 1.8, 1.7], [2.0] * 3, 3, -0.2, 0.24843, "not told apart"),
    # -0.1, -0.2, -0.3, -0.2, -0.2: sd 0.0707, t(4) = 2.776
    ([1.9, 1.8, 1.7, 1.8, 1.8], [2.0] * 5, 5, -0.2, 0.08779, "better"),
    ([2.0] * 5, [1.9, 1.8, 1.7, 1.8, 1.8], 5, 0.2, 0.08779, "worse"),
    # Paired: the seeds differ by much more than the contenders
    ([1.010, 2.011, 3.012], [1.0, 2.0, 3.0], 3, 0.011, 0.00248, "worse"),
    # Only the seeds that both have finished: one has no interval
    ([1.0], [2.0, 9.0], 1, -1.0, None, "too few seeds"),
    # sd 0, so an interval without 0
    ([1.0, 2.0], [1.5, 2.5], 2, -0.5, 0.0, "too few seeds"),
    ([1.0, None], [1.0, 1.0], 2, None, None, "broken")])
def test_intervals_are_those_of_students_t(ours, theirs, n, mean, margin, verdict):
    found = report.compare(seeds(ours), seeds(theirs))
    ends = [None, None] if margin is None else [mean - margin, mean + margin]
    assert [found[name] for name in ("low", "mean", "high")] == pytest.approx(
        [ends[0], mean, ends[1]], abs=1e-5)
    assert (found["n"], found["verdict"]) == (n, verdict)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10])
def test_the_quantiles_leave_two_and_a_half_percent_above_them(freedom):
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    width = report.STUDENT[freedom - 1] / 200_000
    t = (np.arange(200_000) + 0.5) * width
    area = width * (density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)).sum()
    assert area == pytest.approx(0.475, abs=2e-5)


def fact(block="gpt2", losses=((1.0, 2.1), (1.0, 1.9)), flops=1e12, seconds=10.0, **settings):
    """What a contender's runs came to, with (loss that chooses, reported loss) for each seed."""
    trials = [{"learning_rate": rate, "weight_decay": 0.1, "loss": loss, "best": rate == 0.02}
              for rate, loss in ((0.01, 2.0), (0.02, 1.5), (0.04, None))]
    return dict(block=block, n_layer=2, n_embd=16, learning_rate=0.02, optimizer="muon",
                bank_layers=0) | settings | {
            "parameters": 12345, "tokens": 1000, "flops": flops, "seconds": seconds,
            "trials": trials, "losses": seeds([pair and list(pair) for pair in losses]),
            "curve": [[500, 3.0], [1000, 2.0]]}


def results_of(name="2x16", against=(), **facts):
    plan = {"machine": "abacus, torch 2",
            "data": {"tokens": {"train": 9}, "sha256": {"train": "0123456789abcdef"}},
            "evaluated": 64}
    return {"name": name, "command": "python -m tools.race", "dataset": "tiny",
            "dtype": "float32", "plan": plan, "seeds": 2,
            "choosing": 2, "against": list(against), "contenders": facts}


def test_the_table_compares_each_with_the_others_and_none_with_itself():
    facts = dict(gpt2=fact(losses=[(1.0, 2.1), (1.0, 1.9), (1.0, 2.0)]),
                 dva=fact("dva", [(1.0, 1.6), (1.0, 1.4), (1.0, 1.5)], seconds=5.0),
                 broke=fact(losses=[(1.0, 2.0), None]), early=fact("dva", [(1.0, 1.6)]))
    text = report.table(results_of(against=["dva"], **facts))
    for part in ("| 2.0000 ± 0.1000 | 3 |  | +0.5000 [+0.5000, +0.5000] worse |\n| dva |",
                 "| 0.500 | 0.02 | 1.5000 ± 0.1000 | 3 | -0.5000 [-0.5000, -0.5000] better |  |\n",
                 "| 2.0000 | 2 | broken | broken |\n", "abacus", "0123456789ab",
                 "| 1.6000 | 1 | -0.5000 too few seeds | +0.0000 too few seeds |\n",
                 # Only the settings in which trials differ
                 "- dva, 3 trials. learning_rate 0.01: 2.0000; * learning_rate 0.02: 1.5000; "
                 "learning_rate 0.04: broken\n"):
        assert part in text


def curve_in(svg, stroke):
    """[(x, y), ...] of the first line that is drawn with a stroke."""
    path = re.search(rf'd="M ([^"]+)"[^>]*stroke: {stroke}', svg)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_pictures_name_their_lines_and_let_the_page_shine_through(tmp_path):
    path = tmp_path / "race.svg"
    results = results_of(gpt2=fact(), dva=fact("dva", seconds=5.0))
    report.draw_race(results, path)
    picture = path.read_text()
    for name, colour in zip(results["contenders"], report.COLOURS, strict=False):
        assert re.search(rf"fill: {colour.lower()}[^>]*>{re.escape(name)}<", picture)
    assert "fill: #ffffff" not in picture and "fill: #000000" not in picture
    # Half of the seconds are half of the way
    gpt2, dva = (curve_in(picture, f"{colour.lower()}; stroke-width: 2")
                 for colour in report.COLOURS[:2])
    assert (gpt2[1][0] - gpt2[0][0]) == pytest.approx(2 * (dva[1][0] - dva[0][0]), abs=1e-3)
    report.draw_race(results, path)
    assert path.read_text() == picture
    report.draw_race(results, path, ["dva"], over="tokens")
    assert ">gpt2<" not in path.read_text() and "tokens of training" in path.read_text()


# ---- the ladder ----------------------------------------------------------------------------------

def rungs():
    """Two races in which GPT-2's loss falls as compute ** -0.1, and DVA takes half of it."""
    races = []
    for name, compute in (("small", 1e12), ("large", 16e12)):
        def losses(compute):
            loss = 20 * compute ** -0.1
            return [(loss, loss - 0.01), (loss, loss + 0.01)]
        races.append(results_of(
            name, gpt2=fact(losses=losses(compute), flops=compute, seconds=compute / 1e11),
            dva=fact("dva", losses(2 * compute), flops=compute, seconds=compute / 1e11),
            # None of these counts: one takes too long, others have banks or AdamW, one lacks a
            # seed, and of one a run broke
            **{f"dva{i}": fact("dva", **dict(losses=[(0.1, 0.1)] * 2, flops=1.0) | other)
               for i, other in enumerate((
                   dict(seconds=compute / 9e10), dict(bank_layers=1, seconds=1.0),
                   dict(optimizer="adamw", seconds=1.0), dict(losses=[(0.1, 0.1)], seconds=1.0),
                   dict(losses=[(0.1, 0.1), None], seconds=1.0)))}))
    return races


def test_the_multiplier_is_the_compute_for_the_same_loss():
    races = rungs()
    a, b = report.power_law(report.frontier(races, "gpt2", "flops"))
    assert math.exp(a) == pytest.approx(20) and b == pytest.approx(0.1)
    # A loss 1 % above theirs, with an interval of 1 %, at the same compute
    theirs = fact(losses=[(1.0, 1.0)] * 2)
    for low, high, ends in ((0.0, 0.02, [1.0, 1.02 ** 10]), (None, None, [None, None])):
        gap = {"mean": 0.01, "low": low, "high": high}
        assert report.multiplier(theirs, theirs, gap, b, "flops") == pytest.approx(
            [1.01 ** 10, *ends])


def test_a_ladder_is_written_from_small_to_large(tmp_path, capsys):
    for results in rungs():
        (tmp_path / results["name"]).mkdir()
        (tmp_path / results["name"] / "results.json").write_text(json.dumps(results))
    report.main([f"--ladder={tmp_path}"])
    text = (tmp_path / "ladder.md").read_text()
    assert text in capsys.readouterr().out
    assert text.index("[small](small/table.md)") < text.index("[large](large/table.md)")
    assert text.count("| 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |") == 2
    picture = (tmp_path / "ladder.svg").read_text()
    assert ">gpt2, compute^-0.100<" in picture and ">dva, compute^-0.100<" in picture
    assert ">gpt2<" in (tmp_path / "curves.svg").read_text()
    # One race has no slope
    assert "no compute multiplier yet" in report.ladder_table(rungs()[:1])


def test_the_published_ladder_is_what_the_tool_makes_of_its_runs():
    folder = ROOT / "docs" / "race"
    races = [json.loads(path.read_text()) for path in folder.glob("*/results.json")]
    for results in races:
        path = folder / results["name"]
        assert report.table(results) == (path / "table.md").read_text()
        lines = [json.loads(line) for line in (path / "runs.jsonl").read_text().splitlines()]
        known = {(line["seed"], line.get("test")) for line in lines}
        for fact in results["contenders"].values():
            # The seed that chose the settings is not among those reported
            assert "1337" not in fact["losses"]
            assert {(int(seed), pair[1]) for seed, pair in fact["losses"].items()} <= known
    if races:
        races.sort(key=lambda results: results["contenders"]["gpt2"]["flops"])
        assert report.ladder_table(races) == (folder / "ladder.md").read_text()


# ---- runs of train.py --------------------------------------------------------------------------

def write_run(folder, losses, data="0123", windows=20):
    """Leave metrics.jsonl as a run does that a kill ended after these (train, val) losses."""
    records = [{"step": 0, "config": {}, "measured_on": {"data": data, "windows": windows}}]
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


def test_several_runs_are_one_picture_and_unlike_texts_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        write_run(Path(f"run{i}"), [(4.0, 2.5), (3.0, 3.0 + i / 10)], "b" if i == 5 else "a",
                  windows=20 if i else 40)
    report.main(["run1", "run2", "run3", "run4", "run0"])
    printed = capsys.readouterr().out
    assert "the same number of windows" in printed and "the same text" not in printed
    assert "| run4 | 1 | 3.4000 | 2.5000 |" in printed
    picture = Path("run1", "loss.svg").read_text()
    assert all(f">run{i}<" in picture for i in range(5))
    # The fifth has the colour of the first, and dashes
    dashed = "stroke-dasharray: [0-9.,]+; stroke-dashoffset: 0; stroke: "
    assert len(re.findall(dashed + report.COLOURS[0].lower(), picture)) == 2
    report.main(["run4", "run5", "--picture=two.svg"])
    printed = capsys.readouterr().out
    assert "the same text" in printed and "windows" not in printed and Path("two.svg").exists()


@pytest.mark.parametrize("argv, metrics, message", [
    ([], b"", "which run shall be drawn"), (["--ladder=run"], b"", "ladder='run' holds no race"),
    (["run", "--picture=run/metrics.jsonl"], b"", "is there and is no .svg: name a new file"),
    (["nowhere"], b"", "no nowhere/metrics.jsonl: give the out_dir"),
    (["run"], b'{"step": 0}\n', "metrics.jsonl holds no evaluation yet"),
    *[(["run"], damaged, "metrics.jsonl is damaged")
      for damaged in (b"garbage\n", b"[]\n", b'{"step": 1}\n\xff\n')]])
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, argv, metrics, message):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run", "metrics.jsonl").write_bytes(metrics)
    with refused(message):
        report.main(argv)
    assert contents(tmp_path) == {"run": None, "run/metrics.jsonl": metrics}
