"""torchrun on the real script: many processes do what one does, and one that fails ends them."""
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, comparable, largest_difference, records, refused

import train
from nanodva.checkpoints import load_checkpoint


def torchrun(tmp_path, change, argv):
    """A torchrun of two processes that has begun: train.py, after `change`, some lines of code."""
    script = tmp_path / "changed.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import torch, train\nfrom nanodva.errors import run_script\n{change}\n"
                      "run_script(train.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               script, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_follow_one_are_stopped_and_one_goes_on(run, arguments, tmp_path):
    """
    2 x 2 micro-batches instead of 1 x 4: the same tokens, the same losses. A scheduler's SIGTERM
    to torchrun saves, and one process goes on. Dropout is on, and the last batch of an evaluation
    is smaller. Compiling goes all of Dynamo's way but for the C++ compiler, which takes a minute.
    """
    settings = dict(n_layer=1, gradient_accumulation_steps=4, block="dva", bank_layers=1,
                    eval_iters=7, lr_decay_iters=60)
    process = torchrun(tmp_path, """
compile = torch.compile
torch.compile = lambda model, **options: compile(model, **options, backend="aot_eager")""",
                       arguments("parts", compile=True, max_iters=100_000, **settings))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 6: loss"):
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=200)
    out = "".join(lines) + rest
    # The first of the processes alone speaks, and the group is left in good order
    assert out.count("continue:  python train.py --init_from=resume") == 1, err
    assert "float32, compiled" in out and "destroy_process_group" not in err
    step = load_checkpoint(tmp_path / "parts" / "last.pt")["step"]
    assert step >= 7
    run("parts", init_from="resume", max_iters=step + 3, compile=False)
    run("straight", max_iters=step + 3, **settings)
    two, one = (records(tmp_path / name)[0] for name in ("parts", "straight"))
    assert (two["world_size"], one["world_size"]) == (2, 1) and two["params"] == one["params"]
    two, one = (tmp_path / name for name in ("parts", "straight"))
    assert largest_difference(comparable(two), comparable(one)) < 1e-4
    two, one = (load_checkpoint(folder / "last.pt")["model"] for folder in (two, one))
    assert largest_difference(two, one) < 1e-3


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_reason(arguments, tmp_path):
    process = torchrun(tmp_path, """
original = train.learning_rate
def failing(step, cfg):
    if step == 3 and os.environ["RANK"] == "1":
        train.fail("process 1 has had enough")
    return original(step, cfg)
train.learning_rate = failing""", arguments(max_iters=100_000))
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("error: process 1 has had enough\n") == 1
    assert "step 2:" in out and "step 4:" not in out


@pytest.mark.parametrize("steps", [4, 1])
def test_accumulation_that_does_not_divide_is_refused(run, monkeypatch, tmp_path, steps):
    monkeypatch.setattr(train, "WORLD", 3)
    with refused(f"gradient_accumulation_steps={steps} does not divide among 3 processes",
                 "use a multiple of 3"):
        run(gradient_accumulation_steps=steps)
    assert not (tmp_path / "out").exists()
