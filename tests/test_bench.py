"""tools/bench.py on a tiny shape: its figures are of the right things, printed and written."""
import json
import statistics

import pytest
import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile

from nanodva.errors import UserError
from tools import bench

SHAPE = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=8", "--qk_dim=4",
         "--vocab_size=19", "--batch_size=2", "--rounds=3", "--dtype=float32",
         "--max_new_tokens=8", "--num_samples=2", "--device=cpu"]


def parts_of(folder, *argv):
    """[(part, rows)] of what the bench writes, called with SHAPE and further arguments."""
    bench.main([*SHAPE, *argv, f"--json={folder / 'bench.json'}"])
    results = json.loads((folder / "bench.json").read_text())
    assert results["machine"] and results["torch"] == torch.__version__
    return [(part["part"], part["rows"]) for part in results["parts"]]


def test_it_times_every_contender_and_prints_what_it_writes(tmp_path, capsys):
    parts = dict(parts_of(tmp_path, "--contenders=gpt2,dva:value_dim=32,dva+bank:dtype=bfloat16"))
    printed = capsys.readouterr().out
    assert list(parts) == ["train", "sample"]
    train, sample = parts["train"], parts["sample"]
    assert [row["training"] for row in train] == ["gpt2", "dva:value_dim=32",
                                                  "dva+bank:dtype=bfloat16"]
    assert [row["dtype"] for row in train] == ["float32", "float32", "bfloat16"]
    for row in train:
        assert len(row["steps_ms"]) == 3
        assert row["ms per step"] == statistics.median(row["steps_ms"])
        assert row["ratio to the first"] == row["ms per step"] / train[0]["ms per step"]
        assert row["tokens/s"] == pytest.approx(2 * 8 / row["ms per step"] * 1e3)
        assert f"| {row['training']} | {row['dtype']} | False | {row['parameters']:,} |" in printed
    # Keys and values of three layers, at last in bfloat16 and with a layer that has a bank and so
    # no values; and a token id of 8 bytes
    held = [row["cache bytes per token"] for row in sample]
    assert held == [3 * 2 * 16 * 4 + 8, 3 * (4 + 32) * 4 + 8, (3 * 4 + 2 * 16) * 2 + 8]
    assert all(row["tokens/s"] > 0 and row["tokens/s of 2 texts"] > 0 for row in sample)


def test_transformers_model_of_the_same_shape_writes_in_turn(tmp_path):
    [(part, [row])] = parts_of(tmp_path, "--what=transformers")
    assert part == "transformers" and row["dtype"] == "float32"
    assert min(row["tokens/s"], row["transformers' tokens/s"], row["ratio of times"]) > 0


def test_attention_is_timed_in_each_way_and_one_that_fails_says_why(tmp_path, monkeypatch, capsys):
    def no_kernel(q, k, v, width):
        raise RuntimeError("No available kernel.\nThis line is left out.")

    monkeypatch.setattr(bench, "attend_in_pieces", no_kernel)
    [(part, rows)] = parts_of(tmp_path, "--what=attention", "--value_dim=256")
    found = {row["attention"]: row["ms"] for row in rows}
    assert list(found) == ["gpt2, 2 x 8", "4 x 64", "2 x 128", "1 x 256",
                           "2 x (4, 128), not padded", "explicit, 8 rows", "explicit, 256 rows",
                           "explicit, 512 rows"]
    for width, ms in zip((64, 128, 256), list(found.values())[1:4], strict=True):
        assert ms == "No available kernel.", width
    assert all(ms > 0 for name, ms in found.items() if " x " not in name or "," in name)
    assert "| 2 x 128 | float32 | False | No available kernel. |" in capsys.readouterr().out


def test_all_ways_of_dvas_attention_give_the_same_numbers():
    ways = bench.ways_of_attention(bench.BenchConfig(block_size=9, qk_dim=32, value_dim=256))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 9, width, dtype=torch.float64) for width in (32, 32, 256))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for name, (function, *widths) in ways.items():
        if not name.startswith("gpt2"):
            assert widths == [1, 32, 256]
            torch.testing.assert_close(function(q, k, v), wanted, msg=name)


@pytest.mark.slow
def test_a_profile_accounts_for_the_whole_step(tmp_path):
    [(part, rows)] = parts_of(tmp_path, "--what=profile", "--contenders=gpt2,dva")
    assert part == "profile" and [row["profile"] for row in rows] == ["gpt2", "dva"]
    for row in rows:
        *parts, rest = list(row.values())[4:]
        assert len(parts) == 5 and min(parts) > 0
        assert rest == pytest.approx(max(0, row["ms per step"] - sum(parts)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operations_count_for_the_part_of_the_step_that_they_are(compiled):
    cfg = bench.contender(f"dva:dtype=float32:compile={compiled}",
                          dict(n_layer=2, n_embd=16, block_size=8, vocab_size=1999,
                               batch_size=2, gradient_accumulation_steps=2))
    step = bench.training_step(cfg, torch.device("cpu"))
    # Not by monkeypatch, which leaves no value at all: findings/monkeypatch_torch_config.sh
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": compiled}):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    found = {}
    for event in profiler.events():
        name = event.name.removeprefix("aten::")
        found.setdefault(bench.part_of_step(event, 1999), set()).add(name)
    assert {"mm", "embedding_dense_backward"} <= found["head and loss"] or compiled
    assert {"mm", "bmm"} & found["head and loss"] == {"mm"}
    assert "mm" in found["products"] and not {"mm", "bmm"} & found["norms, gate, sums"]
    assert {"_fused_adamw_", "_foreach_norm"} <= found["optimizer"]
    if compiled:
        kernels = {part: [name for name in names if "cpp_fused" in name]
                   for part, names in found.items()}
        assert any("softmax" in name for name in kernels["attention"])
        assert any("gather" in name for name in kernels["head and loss"])
        assert any("layer_norm" in name for name in kernels["norms, gate, sums"])
        assert kernels.get("", []) == []
    else:
        assert {"bmm", "_softmax", "_softmax_backward_data"} <= found["attention"]
        assert {"native_layer_norm", "linalg_vector_norm"} <= found["norms, gate, sums"]
        assert "HeadLoss" in found[""]


# ---- a GPU's first minutes -----------------------------------------------------------------------

def test_all_that_a_gpu_is_asked_for_is_accepted():
    for part in bench.GPU_PARTS:
        given = bench.read_settings(bench.BenchConfig, [*bench.GPU_SETTINGS, *part])
        cfg = bench.build(bench.BenchConfig, given)
        assert cfg.what in bench.PARTS and cfg.batch_size == 12
        for text in cfg.contenders.split(","):
            assert bench.contender(text, given).block_size == 1024


@pytest.mark.slow
def test_one_file_gathers_what_a_gpu_is_asked_for_whatever_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "GPU_PARTS", [
        ["--what=train", "--contenders=dva:n_embd=0"], ["--what=attention", "--dtype=float16"]])
    parts = parts_of(tmp_path, "--what=gpu", "--rounds=1", "--minutes=9")
    assert [name for name, _ in parts] == ["attention"]
    # What the user gives comes before what a GPU would be asked for
    assert {row["dtype"] for row in parts[0][1]} == {"float32"}
    report = json.loads((tmp_path / "bench.json").read_text())
    outcomes = [outcome["outcome"] for outcome in report["outcomes"]]
    assert outcomes == ["failed, exit status 2", "done"]
    printed = capfd.readouterr()
    assert "n_embd=0" in printed.err and "| done |" in printed.out


@pytest.mark.parametrize("minutes, outcome", [("0", "left out: the minutes are over"),
                                              ("0.01", "stopped: it took too long")])
def test_a_gpu_is_kept_no_longer_than_it_may(tmp_path, monkeypatch, minutes, outcome):
    monkeypatch.chdir(tmp_path)
    bench.main([*SHAPE, "--what=gpu", f"--minutes={minutes}"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["outcomes"][0]["outcome"] == outcome
    assert len(report["outcomes"]) == len(bench.GPU_PARTS) and report["parts"] == []


# ---- a step and its contenders -------------------------------------------------------------------

@pytest.mark.parametrize("argument, message", [
    ("--contenders=gpt2+blank", "only bank can follow the +"),
    ("--contenders=gtp2", "choose from gpt2"),
    ("--contenders=dva:qk=3", "unknown setting 'qk'"),
    ("--contenders=dva:", "then :setting=value"),
    ("--dtype=int8", "dtype='int8': choose from auto, float32, bfloat16, float16"),
    ("--contenders=dva:dtype=auto", "say outright which dtype"),
    ("--what=all", "what='all': name one or more of train, profile"),
    ("--what=gpu,train", "or gpu alone"),
    ("--block=dva", "block on the command line: this tool decides it"),
    ("--json=/", "json='/' is there and is no .json"),
    ("--rounds=0", "rounds=0: it must be at least 1")])
def test_a_wrong_argument_is_one_line(argument, message):
    with pytest.raises(UserError) as error:
        bench.main([*SHAPE, *argument.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
