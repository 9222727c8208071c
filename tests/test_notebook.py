"""nanodva.ipynb runs from top to bottom, shortened, and is committed without outputs."""
import json
import sys
import types

from conftest import PLAY, ROOT

import model
import prepare_data
import train

CELLS = json.loads((ROOT / "nanodva.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_no_outputs_are_committed():
    assert CODE and all(cell["outputs"] == [] and cell["execution_count"] is None
                        for cell in CELLS if cell["cell_type"] == "code")


def test_the_cells_run_one_after_another(tmp_path, monkeypatch, capsys):
    prepare, learn = prepare_data.main, train.main
    monkeypatch.setattr(prepare_data, "main", lambda argv: prepare([*argv, f"--input={PLAY}"]))
    monkeypatch.setattr(train, "main", lambda argv: learn([*argv, "--max_iters=4", "--batch_size=2",
                                                           "--eval_interval=2", "--eval_iters=1"]))
    monkeypatch.setattr(model, "BLOCKS", dict(model.BLOCKS))
    # Only a notebook has IPython
    shown = []
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=shown.append))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    # As in Colab: the project is a folder beside the notebook
    (tmp_path / "nanoDVA").mkdir()
    for name in ("config", "model.py"):
        (tmp_path / "nanoDVA" / name).symlink_to(ROOT / name)
    names = {"__name__": "__main__"}
    for number, code in enumerate(CODE):
        exec(compile(code, f"code cell {number} of nanodva.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert out.count("\nROMEO:") == 2 and "largest difference" in out
    # What it shows of a block gives what that block computes
    block, text, gpt = names["last"], names["text"], names["gpt"]
    s, g, u = names["look"](block, text)
    attn, x = gpt.transformer.h[block].attn, names["input_of"](block, text)
    found = attn.c_proj(attn.norm(s @ u) * g)
    theirs = attn(x[None], None, gpt.rotary[:, :len(x)])[0]
    assert (found - theirs).abs().max() < 1e-5 < theirs.abs().max()
    assert (names["slow"] - names["fast"]).abs().max() < 1e-5
    assert "iframe" in shown[0] and "See it think" in shown[0]
    # The block without a gate has learnt something else
    first, second = (list(names["losses"](folder, "val_loss"))[1]
                     for folder in ("out-notebook", "out-notebook-no-gate"))
    assert len(first) == 3 and first[-1] != second[-1]
