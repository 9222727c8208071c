"""torchrun on the real script: many processes do what one does, and one that fails ends them."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import comparable, records, refused

import train
from nanodva.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent


def torchrun(processes, script, argv):
    """A torchrun of the script that has begun, whose output is text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", script, *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def changed_script(tmp_path, lines):
    """The path of a script that changes something in train.py, and then runs it."""
    path = tmp_path / "changed.py"
    path.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                    f"import torch, train\nfrom nanodva.errors import run_script\n{lines}\n"
                    "run_script(train.main)\n")
    return str(path)


def largest_difference(a, b):
    """The largest |difference| in the metrics of two runs, which have the same lines and names."""
    a, b = comparable(a), comparable(b)
    assert [line.keys() for line in a] == [line.keys() for line in b]
    return max(abs(x[name] - y[name]) for x, y in zip(a, b, strict=True) for name in x)


# Dropout is on, and the last batch of an evaluation is smaller
SETTINGS = dict(gradient_accumulation_steps=4, block="dva", bank_layers=1, eval_iters=7)


def test_two_processes_follow_one_compiled_or_not(run, arguments, tmp_path):
    """
    2 x 2 micro-batches instead of 1 x 4: the same tokens, the same losses. Compiling goes all of
    Dynamo's way but for the C++ compiler, which would take a minute.
    """
    settings = SETTINGS | dict(n_layer=1)
    run("one", **settings)
    script = changed_script(tmp_path, """
compile = torch.compile
torch.compile = lambda model, **options: compile(model, **options, backend="aot_eager")""")
    process = torchrun(2, script, arguments("two", compile=True, **settings))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # The first of the processes alone speaks, and the group is left in good order
    assert out.count("done: step 12") == 1 and "float32, compiled" in out
    assert "destroy_process_group" not in err
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4
    one, two = (records(tmp_path / name)[0] for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2) and one["params"] == two["params"]
    one, two = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3


def test_four_processes_are_stopped_and_one_goes_on(run, arguments, tmp_path):
    """A scheduler's SIGTERM to torchrun saves; neither change leaves a trace in the losses."""
    process = torchrun(4, "train.py", arguments("parts", max_iters=100_000, lr_decay_iters=60,
                                                **SETTINGS))
    for line in process.stdout:
        if line.startswith("step 6: loss"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=200)
    assert out.count("continue:  python train.py --init_from=resume") == 1, err
    step = load_checkpoint(tmp_path / "parts" / "last.pt")["step"]
    assert step >= 7
    run("parts", init_from="resume", max_iters=step + 3)
    run("straight", max_iters=step + 3, lr_decay_iters=60, **SETTINGS)
    assert largest_difference(tmp_path / "straight", tmp_path / "parts") < 1e-4


def test_a_process_that_fails_ends_the_job_with_its_reason(arguments, tmp_path):
    script = changed_script(tmp_path, """
original = train.learning_rate
def failing(step, cfg):
    if step == 3 and os.environ["RANK"] == "1":
        train.fail("process 1 has had enough")
    return original(step, cfg)
train.learning_rate = failing""")
    began = time.time()
    process = torchrun(2, script, arguments())
    out, err = process.communicate(timeout=200)
    assert process.returncode != 0 and err.count("error: process 1 has had enough\n") == 1
    assert "step 2:" in out and "step 4:" not in out and time.time() - began < 100


@pytest.mark.parametrize("steps, words", [(4, "use a multiple of 3"), (1, "use a multiple of 3")])
def test_accumulation_that_does_not_divide_is_refused(run, monkeypatch, tmp_path, steps, words):
    monkeypatch.setattr(train, "WORLD", 3)
    with refused(f"gradient_accumulation_steps={steps} does not divide among 3 processes", words):
        run(gradient_accumulation_steps=steps)
    assert not (tmp_path / "out").exists()
