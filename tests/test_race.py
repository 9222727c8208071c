"""tools/race.py: a small race from end to end, and the arithmetic of its table on made-up curves."""
import json
import math
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from conftest import TINY, one_error, run_main

from model import GPT
from tools import race


class InThisProcess:
    """A ProcessPoolExecutor without processes, which take seconds to start."""

    def __init__(self, *_):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def track(tmp_path, monkeypatch, data_dir):
    """track(**changes): the command line of a tiny race that writes below tmp_path."""
    monkeypatch.setattr(race, "RACES", tmp_path / "out" / "race")
    monkeypatch.setattr(race, "ProcessPoolExecutor", InThisProcess)
    def track(**changes):
        settings = TINY | dict(data_dir=data_dir, gradient_accumulation_steps=1, name="tiny", contenders="gpt2,dva:shift=False",
                               seeds=2, lrs="0.002,0.02,0.2", rounds=5, max_iters=6, eval_interval=3) | changes
        settings.pop("learning_rate"), settings.pop("min_lr")          # the race's own
        return ["config/race_laptop.py", *(f"--{name}={value}" for name, value in settings.items())]
    return track


def test_a_race_of_two(track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(race, "ProcessPoolExecutor", ProcessPoolExecutor)                        # the real one, once
    race.main(track(jobs=2))
    folder, printed = tmp_path / "out" / "race" / "tiny", capsys.readouterr().out
    results, table = json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()
    assert list(results["contenders"]) == ["gpt2", "dva:shift=False"] and table in printed
    assert (folder / "race.png").read_bytes().startswith(b"\x89PNG")
    for name, r in results["contenders"].items():
        rates = {float(lr): loss for lr, loss in r["sweep"].items()}
        assert min(rates, key=rates.get) == r["learning_rate"] not in (min(rates), max(rates))   # a best with worse on both sides
        assert [curve["seed"] for curve in r["curves"]] == [1337, 1338]
        losses = [curve["val_loss"][-1] for curve in r["curves"]]
        assert losses[0] == rates[r["learning_rate"]] != losses[1]
        assert r["final_val_loss"] == pytest.approx({"mean": sum(losses) / 2, "sd": abs(losses[0] - losses[1]) / 2**0.5, "n": 2})
        assert all(curve["tokens"] == [0, 3 * 4 * 16, 6 * 4 * 16] for curve in r["curves"])
        assert r["seconds"] == pytest.approx(6 * r["ms_per_step"]["mean"] / 1e3) == r["curves"][0]["seconds"][-1]
        assert r["ms_per_step"]["n"] == 5 and r["ms_per_step"]["sd"] > 0
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        for figure in (f"{losses[0] / 2 + losses[1] / 2:.4f} ± ", f"{r['params']['mean'] / 1e6:.2f} M", f"{r['learning_rate']:g}",
                       f"{r['ms_per_step']['mean']:.1f} ± "):
            assert f"| {figure}" in row

    runs = {path: path.stat().st_mtime_ns for path in folder.parent.glob("runs/*/metrics.jsonl")}
    lost = next(path for path in runs if "seed1338" in str(path))
    lines = lost.read_text().splitlines(keepends=True)
    lost.write_text("".join(lines[:-1]) + lines[-1][:20])              # as a run that was killed leaves it
    monkeypatch.setattr(race, "ProcessPoolExecutor", InThisProcess)
    race.main(track(jobs=2))
    changed = [path for path in runs if path.stat().st_mtime_ns != runs[path]]
    again = json.loads((folder / "results.json").read_text())
    assert changed == [lost] and again == results
    assert not list(folder.parent.glob("runs/*/*.pt"))

    race.main(track(name="more", max_iters=7, lrs=folder / "results.json", seeds=1))             # its learning rates, taken over
    more = json.loads((folder.parent / "more" / "results.json").read_text())
    for name, r in more["contenders"].items():
        assert [float(lr) for lr in r["sweep"]] == [r["learning_rate"]] == [results["contenders"][name]["learning_rate"]]


def test_match_time_gives_each_the_reference_time(track, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "step_times", lambda *_: {
        "threads": 1, "times": {"gpt2": dict(ms=[8.0, 8.0], dtype="", compile=False), "dva": dict(ms=[4.0, 6.0], dtype="", compile=False)}})
    monkeypatch.setattr(race, "draw", lambda *_: None)
    race.main(track(match="time", contenders="gpt2,dva", lrs="0.02", seeds=1))
    results = json.loads((tmp_path / "out/race/tiny/results.json").read_text())["contenders"]
    assert [r["steps"] for r in results.values()] == [6, 10]           # 6 x 8 / 5, rounded
    assert [r["learning_rate"] for r in results.values()] == [0.02, 0.02]
    assert results["dva"]["seconds"] == pytest.approx(0.05) and results["gpt2"]["seconds"] == pytest.approx(0.048)
    assert results["dva"]["curves"][0]["tokens"][-1] == 10 * 4 * 16 and results["dva"]["final_val_loss"]["sd"] is None


@pytest.mark.parametrize("text", ["dva", "dva+bank", "gpt2+bank", "dva:qk_dim=16"])
def test_match_params_finds_the_depth(track, text):
    base = race.load(race.RaceConfig, track(n_layer=6, vocab_size=23))
    first = race.contender("gpt2", base)
    target = race.body_params(first)
    cfg = race.match_params(text, race.contender(text, base), target)
    model = GPT(cfg)
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight, *(bank.weight for bank in model.banks())]
    count = model.num_params() - sum(table.numel() for table in tables)
    assert count == race.body_params(cfg) and abs(count / target - 1) <= 0.05
    if "bank" in text:
        assert len(model.banks()) == cfg.n_layer // 3
    for n_layer in (cfg.n_layer - 1, cfg.n_layer + 1):                 # no other depth is nearer
        other = race.replace(cfg, n_layer=n_layer, bank_layers=n_layer // 3 if cfg.bank_layers else 0)
        assert abs(race.body_params(other) - target) >= abs(count - target)


def test_steps_to_a_loss():
    curve = [{"step": step, "val_loss": loss} for step, loss in ((0, 4.0), (100, 3.0), (200, 2.0), (300, 2.5), (400, 1.5))]
    assert [race.steps_to(curve, loss) for loss in (4.5, 4.0, 3.5, 2.0, 2.25, 1.75, 1.5)] == [0, 0, 50, 200, 175, 375, 400]
    assert race.steps_to(curve, 1.4) is None
    broken = [{"step": 0, "val_loss": 4.0}, {"step": 100, "val_loss": math.inf}]
    assert race.steps_to(broken, 3.0) is None


def test_the_ratio_and_its_uncertainty(track, monkeypatch, tmp_path):
    """Curves by hand: gpt2 ends at 2.0; dva reaches that after 50 and 75 of 100 steps, each taking half as long."""
    base = race.load(race.RaceConfig, track(max_iters=100, vocab_size=23, batch_size=1, contenders="gpt2,dva"))
    contenders = {text: race.contender(text, race.replace(base, lr_decay_iters=100)) for text in ("gpt2", "dva")}
    ends = {"gpt2": {1337: [4.0, 3.0, 2.1], 1338: [4.0, 3.0, 1.9]}, "dva": {1337: [4.0, 2.0, 1.5], 1338: [4.0, 2.5, 1.5]}}
    monkeypatch.setattr(race, "curve_of", lambda run: [
        dict(step=step, tokens=step * 16, val_loss=loss, val_bits_per_byte=loss)
        for step, loss in zip((0, 50, 100), ends[run.block][run.seed])])
    monkeypatch.setattr(race, "sweep", lambda text, cfg, _: ([race.run_of(cfg, 0.02, 1337)], race.run_of(cfg, 0.02, 1337)))
    times = {"gpt2": dict(ms=[8.0, 12.0], dtype="", compile=False), "dva": dict(ms=[4.0, 6.0], dtype="", compile=False)}
    results = race.summary(contenders, base, times)
    dva = results["dva"]
    assert dva["tokens_to_gpt2_loss"] == pytest.approx({"mean": 62.5 * 16, "sd": 25 / 2**0.5 * 16, "n": 2})
    assert dva["seconds_to_gpt2_loss"] == pytest.approx({"mean": 62.5 * 0.005, "sd": 25 / 2**0.5 * 0.005, "n": 2})
    assert dva["step_time_ratio"] == pytest.approx({"mean": 0.5, "sd": 0, "n": 2})   # the machine drifted, the ratio did not
    assert dva["time_to_gpt2_loss_ratio"] == pytest.approx({"mean": 0.3125, "sd": 0.3125 * 25 / 2**0.5 / 62.5, "n": 2})
    times["dva"]["ms"] = [4.8, 4.8]                                    # 0.6 and 0.4
    dva = race.summary(contenders, base, times)["dva"]
    relative = math.hypot(25 / 2**0.5 / 62.5, 0.2 / 2**0.5 / 0.5)      # of the seeds, and of the steps
    assert dva["time_to_gpt2_loss_ratio"] == pytest.approx({"mean": 0.3125, "sd": 0.3125 * relative, "n": 2})
    assert results["gpt2"]["tokens_to_gpt2_loss"]["n"] == 1            # one of its seeds never got there


def test_a_rate_that_breaks_loses(track, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "draw", lambda *_: None)
    race.main(track(contenders="gpt2", lrs="0.02,1e30", seeds=1, max_iters=4, warmup_iters=0, grad_clip=0, optimizer="adamw"))
    sweep = json.loads((tmp_path / "out/race/tiny/results.json").read_text())["contenders"]["gpt2"]["sweep"]
    assert sweep["1e+30"] == math.inf and all(math.isfinite(loss) for lr, loss in sweep.items() if lr != "1e+30")


@pytest.mark.parametrize("change, said", [(dict(match="steps"), "match='steps': there are tokens, time, params"),
                                          (dict(lrs="1e-3,fast"), "lrs='1e-3,fast': give learning rates"),
                                          (dict(lrs="0"), "lrs='0': give learning rates"),
                                          (dict(lrs="nowhere.json"), "lrs='nowhere.json' has no learning rate for 'gpt2'"),
                                          (dict(contenders="gpt2,dvaa"), "there are gpt2, dva"), (dict(seeds=0), "at least 1"),
                                          (dict(contenders="gpt2,dva:qk=3"), "unknown setting 'qk'"),
                                          (dict(match="params", contenders="gpt2,dva:n_layer=1"), "match=params wants 5 %"),
                                          (dict(dataset="nowhere"), "prepare_data.py nowhere")], ids=str)
def test_a_wrong_race_is_one_line(track, tmp_path, capsys, change, said):
    assert said in one_error(run_main(race.main, track(**change), capsys))
    assert not list(tmp_path.glob("out/race/runs/*"))
