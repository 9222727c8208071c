"""torchrun on the real script: many processes do what one does, and one that fails ends them."""
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    comparable,
    largest_difference,
    records,
    refused,
    runs_differ,
    tiny,
    tokens,
)

import train
from nanodva.checkpoints import load_checkpoint


def torchrun(tmp_path, change, argv, options=("--standalone", "--max_restarts=1")):
    """A torchrun of two processes that has begun: train.py, after `change`, some lines of code."""
    script = tmp_path / "changed.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import torch, train\nfrom nanodva.errors import run_script\n{change}\n"
                      "run_script(train.main)\n")
    # docs/distributed.md says why
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               *options, script, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


# Process 1 is killed in step 7, but only the first time
KILLED_ONCE = """
original, mark = train.learning_rate, __file__ + ".killed"
def killed(step, cfg):
    if (step, os.environ["RANK"]) == (7, "1") and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), 9)
    return original(step, cfg)
train.learning_rate = killed"""

# All of Dynamo's way but for the C++ compiler, which takes half a minute
COMPILED = """
compile = torch.compile
torch.compile = lambda model, **options: compile(model, **options, backend="aot_eager")"""


@pytest.mark.parametrize("change", [
    pytest.param("", id="undisturbed"),
    pytest.param(COMPILED + KILLED_ONCE, id="compiled and killed", marks=pytest.mark.slow)])
def test_two_processes_follow_one_are_stopped_and_one_goes_on(run, arguments, tmp_path, change):
    """
    2 x 2 micro-batches instead of 1 x 4: the same tokens, the same losses. A scheduler's SIGTERM
    to torchrun saves, and one process goes on. Dropout is on, and the last batch of an evaluation
    is smaller. Where one of the two is killed before, torchrun starts both again.
    """
    settings = dict(n_layer=1, gradient_accumulation_steps=4, block="dva", bank_layers=1,
                    eval_iters=7, lr_decay_iters=60)
    process = torchrun(tmp_path, change,
                       arguments("parts", init_from="auto", compile=change != "",
                                 max_iters=100_000, **settings))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 8: loss"):
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=200)
    out = "".join(lines) + rest
    # The first of the processes alone speaks, and the group is left in good order
    assert ("at step 5" in out) == (", compiled" in out) == (change != ""), err
    assert out.count("continue:  python train.py --init_from=resume") == 1, err
    assert "destroy_process_group" not in err
    step = load_checkpoint(tmp_path / "parts" / "last.pt")["step"]
    assert step >= 9
    run("parts", init_from="resume", max_iters=step + 3, compile=False)
    run("straight", max_iters=step + 3, **settings)
    two, one = (tmp_path / name for name in ("parts", "straight"))
    assert largest_difference(comparable(two), comparable(one)) < 1e-4
    assert [records(folder)[0]["world_size"] for folder in (two, one)] == [2, 1]
    two, one = (load_checkpoint(folder / "last.pt")["model"] for folder in (two, one))
    assert largest_difference(two, one) < 1e-3


@pytest.mark.slow
def test_two_machines_survive_a_killed_process(arguments, tmp_path):
    """
    Two launchers with two processes each stand for them. A run with a killed process ends with the
    same bits as an undisturbed run.
    """
    for name, change in {"straight": "", "killed": KILLED_ONCE}.items():
        argv = arguments(name, init_from="auto", gradient_accumulation_steps=4)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--max_restarts=1", "--nnodes=2", "--rdzv_backend=c10d",
                   f"--rdzv_endpoint=127.0.0.1:{port}"]
        launchers = [torchrun(tmp_path, change, argv, options) for _ in range(2)]
        outputs = [process.communicate(timeout=300) for process in launchers]
        assert [process.returncode for process in launchers] == [0, 0], outputs
        out = "".join(out for out, _ in outputs)
        assert ("at step 5" in out) == (name == "killed") and "done: step 12" in out
    assert records(tmp_path / "killed")[0]["world_size"] == 4
    assert runs_differ(tmp_path / "killed", tmp_path / "straight") == 0


LATE = """
original, reads = train.read_start, []
def late(given):
    reads.append(given)
    is_early = os.environ["RANK"] == "1" and len(reads) == 1
    return original(given | {"init_from": "scratch"} if is_early else given)
train.read_start = late"""


@pytest.mark.slow
def test_a_process_that_looked_before_the_old_job_ended_looks_again(arguments, trained, tmp_path):
    """Process 0 alone waits for the lock of a job whose place this one takes."""
    shutil.copytree(trained, tmp_path / "out")
    argv = arguments(init_from="auto", max_iters=14, gradient_accumulation_steps=2)
    out, err = torchrun(tmp_path, LATE, argv, ["--standalone"]).communicate(timeout=100)
    assert "done: step 14" in out, err


FAILING = """
original = train.learning_rate
def failing(step, cfg):
    if step == 3 and os.environ["RANK"] == "1":
        train.fail("process 1 has had enough")
    return original(step, cfg)
train.learning_rate = failing"""

DRIFTING = """
original = train.clip_grad_norm_
def drifting(parameters, most):
    parameters = list(parameters)
    parameters[0].grad[0] += float(os.environ["RANK"])
    return original(parameters, most)
train.clip_grad_norm_ = drifting"""


@pytest.mark.slow
@pytest.mark.parametrize("change, reason, last", [
    (FAILING, "error: process 1 has had enough\n", 2), (DRIFTING, "have drifted apart", -1)])
def test_a_process_that_fails_ends_the_job_with_its_reason(arguments, tmp_path, change, reason,
                                                           last):
    process = torchrun(tmp_path, change, arguments(max_iters=100_000), ["--standalone"])
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count(reason) == 1
    assert out.count("grad norm") == last + 1
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize("place", ["transformer.h.1.attn", "transformer.h.0", "transformer"])
def test_parameters_that_are_not_used_are_named(place):
    """As those of a reader's block may be. DDP would end in a traceback that does not name them."""
    model = tiny(block="dva", bank_layers=1)
    model.get_submodule(place).spare = torch.nn.Linear(3, 4)
    with refused(f"the loss does not depend on {place}.spare.weight, {place}.spare.bias: many "
                 f"processes need", "train in one process"):
        train.distribute(model, model, lambda model: model(tokens(2, 8), tokens(2, 8)).backward())


def test_accumulation_that_does_not_divide_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "WORLD", 3)
    with refused("gradient_accumulation_steps=4 does not divide among 3 processes",
                 "use a multiple of 3"):
        run(gradient_accumulation_steps=4)
    assert not (tmp_path / "out").exists()
