"""tools/bench.py on a tiny shape: its figures are of the right things, printed and written."""
import json
import math
import statistics

import pytest
import torch

from model import explicit_attention
from nanodva.errors import UserError
from tools import bench

SHAPE = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=8", "--qk_dim=4",
         "--vocab_size=19", "--batch_size=2", "--rounds=3", "--compiles=False",
         "--dtypes=float32", "--max_new_tokens=8", "--num_samples=2", "--device=cpu"]
torch.set_num_threads(1)


def parts_of(folder, *argv):
    """[(part, rows)] of what the bench writes, called with SHAPE and further arguments."""
    bench.main([*SHAPE, *argv, f"--json={folder / 'bench.json'}"])
    results = json.loads((folder / "bench.json").read_text())
    assert results["machine"] and results["torch"] == torch.__version__
    return [(part["part"], part["rows"]) for part in results["parts"]]


def test_it_times_every_contender_and_prints_what_it_writes(tmp_path, capsys):
    parts = dict(parts_of(tmp_path, "--contenders=gpt2,dva:value_dim=32,dva+bank"))
    printed = capsys.readouterr().out
    assert list(parts) == ["train", "sample", "data"]
    train, sample = parts["train"], parts["sample"]
    assert [row["training"] for row in train] == ["gpt2", "dva:value_dim=32", "dva+bank"]
    for row in train:
        assert len(row["steps_ms"]) == 3
        assert row["ms per step"] == statistics.median(row["steps_ms"])
        assert row["ratio to the first"] == row["ms per step"] / train[0]["ms per step"]
        assert row["tokens/s"] == pytest.approx(2 * 8 / row["ms per step"] * 1e3)
        assert f"| {row['training']} | float32 | False | {row['parameters']:,} |" in printed
    # In float32: keys and values of three layers, once with a layer that has a bank and so no
    # values; and a token id of 8 bytes
    held = [row["cache bytes per token"] for row in sample]
    assert held == [3 * 2 * 16 * 4 + 8, 3 * (4 + 32) * 4 + 8, (3 * 4 + 2 * 16) * 4 + 8]
    assert all(row["tokens/s"] > 0 and row["tokens/s without cache"] > 0 for row in sample)
    assert 0 < parts["data"][0]["data loading, ms per batch"] < 100


def test_transformers_model_of_the_same_shape_writes_in_turn(tmp_path):
    [(part, [row])] = parts_of(tmp_path, "--what=transformers", "--contenders=gpt2")
    assert part == "transformers" and row["dtype"] == "float32"
    assert min(row["tokens/s"], row["transformers' tokens/s"], row["ratio of times"]) > 0


def test_attention_is_timed_in_all_its_forms(tmp_path):
    [(part, rows)] = parts_of(tmp_path, "--what=attention", "--contenders=gpt2,dva,dva:qk_dim=16")
    assert part == "attention" and all(row["ms"] > 0 for row in rows)
    forms = [(row["attention"], row["heads"], row["D"], row["M"]) for row in rows]
    assert forms[0] == ("gpt2's heads, fused", 2, 8, 8)
    assert ("value in pieces, fused", 1, 4, 16) in forms and ("fused", 1, 16, 16) in forms
    # There is nothing to cut where the value is as narrow as the key
    assert ("value in pieces, fused", 1, 16, 16) not in forms and len(forms) == 8


def test_all_forms_of_attention_give_the_same_numbers():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 12)
    wanted = bench.fused(q, k, v)
    for form in (bench.explicit_in_one, bench.fused_in_pieces, explicit_attention):
        assert (form(q, k, v) - wanted).abs().max() < 1e-5


def test_the_gpu_table_has_both_shapes_and_all_parts(tmp_path):
    # What the user gives comes before what the table would take
    parts = parts_of(tmp_path, "--what=gpu", "--rounds=1")
    names = [name for name, _ in parts]
    assert names == ["attention"] * 2 + ["sample", "train"] * 2 + ["train"] * 2
    names = [row["training"] for row in parts[3][1]]
    assert names == ["gpt2", "gpt2:rotary=True", "dva", "dva:qk_dim=768",
                     "gpt2+bank", "gpt2+bank:rotary=True", "dva+bank", "dva+bank:qk_dim=768"]


def test_a_step_is_one_of_training():
    cfg = bench.contender("dva+bank:optimizer=muon:dtype=float32:compile=False:batch_size=4",
                          dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=19,
                               gradient_accumulation_steps=2, learning_rate=0.01))
    assert cfg.bank_layers == 1 and cfg.batch_size == 4
    step = bench.training_step(cfg, torch.device("cpu"))
    losses = [step() for _ in range(6)]
    # It starts at the loss of knowing nothing, and always sees the same tokens
    assert losses[0] == pytest.approx(math.log(19), abs=0.1) and losses[-1] < losses[0] - 0.05


def test_torch_compile_fails_rather_than_give_up_in_silence():
    bench.compile_or_fail()
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit > 100


@pytest.mark.parametrize("argument, message", [
    ("--contenders=gpt2+blank", "behind the + stands bank"),
    ("--contenders=gtp2", "choose from gpt2"),
    ("--contenders=dva:qk=3", "unknown setting 'qk'"),
    ("--contenders=dva:", "then :setting=value"),
    ("--dtypes=int8", "dtypes: 'int8' is none of float32, bfloat16, float16"),
    ("--what=all", "what: 'all' is none of"),
    ("--what=transformers --contenders=dva", "the first contender is dva"),
    ("--what=gpu,train", "gpu stands alone"),
    ("--block=dva", "block on the command line: this tool decides it"),
    ("--rounds=0", "rounds=0: it must be at least 1")])
def test_a_wrong_argument_is_one_line(argument, message):
    with pytest.raises(UserError) as error:
        bench.main([*SHAPE, *argument.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
