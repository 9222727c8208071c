"""docs/why.py: which tokens a contender loses."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, message_of
from test_race import TINY, no_processes

from tools import race

spec = importlib.util.spec_from_file_location("why", ROOT / "docs" / "why.py")
why = importlib.util.module_from_spec(spec)
spec.loader.exec_module(why)


def test_the_kinds_of_a_window_by_hand():
    # After 0 comes 1 most often, after 1 comes 2, after 2 comes 0; 3 is followed by 0
    guesses = why.bigram_guesses(np.array([0, 1, 2, 0, 1, 2, 0, 3, 0, 1], dtype=np.uint16), 4)
    assert guesses.tolist() == [1, 2, 0, 0]
    x = torch.tensor([[0, 1, 3, 1, 3, 1, 2]])
    y = torch.tensor([[1, 3, 1, 3, 1, 2, 3]])
    # (1, 3) and (3, 1) return; (0, 1) and (1, 2) are guessed
    assert why.kinds_of(x, y, guesses).tolist() == [[0, 2, 2, 1, 1, 0, 2]]
    # Each row is a window of its own
    both = why.kinds_of(torch.tensor([[1, 3], [1, 3]]), torch.tensor([[3, 2], [3, 2]]), guesses)
    assert both.tolist() == [[2, 2], [2, 2]]


def test_the_parts_add_up_to_the_loss(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "workers", no_processes)
    monkeypatch.setattr(race, "wait", lambda connections, seconds: connections)
    race.main(command_line(TINY | dict(data_dir=data_dir, lrs="0.01", contenders="gpt2,dva")))
    folder = Path("out", "race", "tiny_char-tokens")
    facts = json.loads((folder / "results.json").read_text())["contenders"]
    # Weights that were deleted are trained again
    next(Path("out", "race_runs").rglob("best.pt")).unlink()
    capsys.readouterr()
    why.main([str(folder), f"--data_dir={data_dir}"])
    printed = capsys.readouterr().out
    assert printed.count("again ...") == 1
    heading, rows = printed.splitlines()[1], printed.splitlines()[3:5]
    shares = [int(part.split(" %")[0].split()[-1]) / 100 for part in heading.split("|")
              if "%" in part]
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        losses = [pair[1] for pair in facts[cells[0]]["losses"].values()]
        means = map(float, cells[1::2])
        # Shares are rounded to a percent
        assert sum(share * mean for share, mean in zip(shares, means, strict=True)) == \
            pytest.approx(sum(losses) / 2, abs=0.05)
    gaps = [float(cell.split()[0]) for cell in rows[1].split("|")[1:-1][2::2]]
    means = [sum(pair[1] for pair in facts[name]["losses"].values()) / 2 for name in facts]
    assert sum(gaps) == pytest.approx(means[1] - means[0], abs=3e-4)
    assert "which race?" in message_of(why.main, [])
    assert "contenders: x: choose from gpt2, dva" in message_of(
        why.main, [str(folder), "--contenders=x"])
