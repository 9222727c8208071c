"""torchrun on the real scripts: many processes give what one gives, and one that fails ends them all."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics, one_error, runs_differ

import train
from model import GPT, ModelConfig
from tools import scaling

ROOT = Path(__file__).parent.parent


def launch(processes, script, argv):
    """A torchrun of the script, whose output is text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torchrun(processes, script, argv):
    process = launch(processes, script, argv)
    out, err = process.communicate(timeout=150)
    assert "destroy_process_group" not in err                          # torch would warn, had we left the group standing
    return process.returncode, out, err


def wrapper(tmp_path, lines):
    """A script that changes train.py before it runs it."""
    path = tmp_path / "wrapper.py"
    path.write_text(f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport torch, train\n{lines}\ntrain.main()\n")
    return str(path)


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_follow_one(run, arguments, tmp_path, processes):
    """4 accumulation steps on 1 process, 2 x 2, 4 x 1: the same tokens, the same losses (dropout is on)."""
    settings = dict(gradient_accumulation_steps=4, block="dva", bank_layers=1, eval_iters=7)
    assert run("one", **settings)[0] == 0
    status, out, err = torchrun(processes, "train.py", arguments("many", **settings))
    assert status == 0, err
    assert out.count("done: step 12") == 1                             # rank 0 alone speaks
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert (one[0].pop("world_size"), many[0].pop("world_size")) == (1, processes) and one[0] == many[0]
    assert [line.keys() for line in one] == [line.keys() for line in many]
    largest = max(abs(a[name] - b[name]) for a, b in zip(one[1:], many[1:]) for name in a)
    print(f"{processes} processes: losses and gradient norms differ by at most {largest:.1e}")
    assert largest < 1e-5
    weights = [train.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "many")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_stopped_on_two_resumed_on_one(run, arguments, tmp_path):
    """A SIGTERM to torchrun (a scheduler's) saves; one process goes on where two were, without a trace in the losses."""
    process = launch(2, "train.py", arguments("parts", max_iters=100_000, lr_decay_iters=60))
    for line in process.stdout:
        if line.startswith("step 6:"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=100)
    assert "continue:  python train.py --init_from=resume" in out, err
    step = train.load_checkpoint(tmp_path / "parts" / "last.pt")["step"]
    assert run("parts", init_from="resume", max_iters=step + 5)[0] == 0
    run("straight", max_iters=step + 5, lr_decay_iters=60)
    straight, parts = metrics(tmp_path / "straight"), metrics(tmp_path / "parts")
    assert len(straight) == len(parts)
    assert max(abs(a[name] - b[name]) for a, b in zip(straight[1:], parts[1:]) for name in a) < 1e-4


def test_a_rank_that_fails_ends_the_job(arguments, tmp_path):
    script = wrapper(tmp_path, """
original = train.learning_rate
def failing(step, cfg):
    if step == 3 and os.environ["RANK"] == "1":
        train.fail("rank 1 has had enough")
    return original(step, cfg)
train.learning_rate = failing""")
    began = time.time()
    status, out, err = torchrun(2, script, arguments())
    assert status != 0 and err.count("error: rank 1 has had enough\n") == 1
    assert "step 2:" in out and "step 4:" not in out and time.time() - began < 60


def test_compiled(run, arguments, tmp_path):
    """Compile and DDP together. Dynamo's whole path, but for the C++ compiler, which would take a minute."""
    script = wrapper(tmp_path, """
compile = torch.compile
torch.compile = lambda model, **options: compile(model, **options, backend="aot_eager")""")
    status, out, err = torchrun(2, script, arguments("many", compile=True, dropout=0))
    assert status == 0 and "float32, compiled" in out, err
    run("one", dropout=0)
    a, b = (metrics(tmp_path / name)[-1]["val_loss"] for name in ("one", "many"))
    assert abs(a - b) < 1e-5
    checkpoint = train.load_checkpoint(tmp_path / "many" / "last.pt")
    assert not [name for name in checkpoint["model"] if name.startswith(("module.", "_orig_mod."))]


def test_accumulation_that_does_not_divide(run, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    error = one_error(run(gradient_accumulation_steps=4))
    assert "gradient_accumulation_steps=4 does not divide among 3 processes: use a multiple of 3" in error


def test_scaling_arithmetic():
    """dva sends half; two processes send each gradient once, many send it almost twice."""
    shape = dict(vocab_size=50304, dropout=0.0)
    gpt2, dva = (scaling.gradient_bytes(ModelConfig(block=block, **shape)) for block in ("gpt2", "dva"))
    assert gpt2 == 4 * 124_373_760 and 0.45 < dva / gpt2 < 0.55        # nanoGPT's 124 M without biases, token table padded
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=10, block_size=4)
    assert scaling.gradient_bytes(config) == sum(p.numel() * p.element_size() for p in GPT(config).parameters())
    seconds, rate, lost = scaling.scaling(ModelConfig(**shape), 2, gbit=gpt2 * 8 / 1e9, step_s=1.0)
    assert (seconds, rate, lost) == pytest.approx((1.0, 0.5, 0.5))
    assert scaling.scaling(ModelConfig(**shape), 64, gbit=gpt2 * 8 / 1e9, step_s=1.0)[0] == pytest.approx(2 * 63 / 64)
    assert scaling.scaling(ModelConfig(**shape), 1, gbit=1, step_s=1.0)[1:] == (1.0, 0.0)
