"""tools/bench.py on a tiny shape: what it prints is what it wrote, and its figures are of the right things."""
import functools
import json

import pytest

import model
from model import attend
from tools import bench

SHAPE = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=8", "--qk_dim=4", "--vocab_size=19", "--batch_size=2",
         "--rounds=2", "--compiles=False", "--dtypes=float32", "--max_new_tokens=8", "--num_samples=2", "--device=cpu"]


def test_it_times_every_contender_and_writes_what_it_prints(tmp_path, capsys):
    bench.main([*SHAPE, "--contenders=gpt2,dva:value_dim=32,dva+bank", f"--json={tmp_path / 'bench.json'}"])
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert [r["contender"] for r in results["train"]] == ["gpt2", "dva:value_dim=32", "dva+bank"]
    for row in results["train"]:
        assert row["tokens_per_s"] == pytest.approx(2 * 8 / row["ms_per_step"] * 1e3)
        assert row["ratio"] == pytest.approx(row["ms_per_step"] / results["train"][0]["ms_per_step"])
        assert f"| {row['contender']} | {row['params'] / 1e6:.2f} M |" in printed and f"| {row['ms_per_step']:.1f} |" in printed
    # float32: two layers of keys (4) and values (16), and a bank layer of keys and an 8-byte token id
    assert [r["cache_bytes_per_token"] for r in results["sample"]] == [3 * 2 * 16 * 4, 3 * (4 + 32) * 4, 2 * 20 * 4 + 4 * 4 + 8]
    assert 0 < results["data"][0]["ms_per_batch"] < 100


def test_attention_paths_take_turns(tmp_path, monkeypatch):
    used = []
    for name in ("fused", "explicit"):
        path = getattr(model, name)
        monkeypatch.setattr(model, name, functools.wraps(path)(lambda *args, path=path: (used.append(path.__name__), path(*args))[1]))
    bench.main([*SHAPE, "--contenders=dva", "--what=train", "--attentions=fused,explicit", f"--json={tmp_path / 'bench.json'}"])
    assert used == ["fused"] * 3 + ["explicit"] * 3 + used[6:] and used.count("fused") == used.count("explicit")   # 3 layers
    assert [row["attention"] for row in json.loads((tmp_path / "bench.json").read_text())["train"]] == ["fused", "explicit"]
    assert model.attend is attend                                      # and all is as it was


def test_the_profile_names_operators(capsys):
    bench.main([*SHAPE, "--contenders=dva", "--what=train", "--profile=True"])
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.parametrize("argument, said", [("--contenders=gpt2+blank", "+bank or nothing"), ("--contenders=gtp2", "there are gpt2"),
                                            ("--contenders=dva:qk=3", "unknown setting 'qk'"), ("--dtypes=int8", "'int8' is none of")])
def test_a_wrong_argument_is_one_line(argument, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SHAPE, argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error
