"""errors.py: what every script prints, how it ends, and files that are written whole."""
import errno
import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, full_disk, message_of, python

from nanodva.errors import UserError, fail, naming_file, replacing, run_script

SCRIPTS = ["train.py", "sample.py", "prepare_data.py", "tools/race.py", "tools/report.py",
           "tools/explain.py", "tools/convert.py", "tools/bench.py"]


@pytest.mark.parametrize("console", ["cp1252", "ascii", "utf-8"])
def test_a_file_gets_every_character_whatever_the_console_is(console):
    """A redirect on Windows is cp1252, which has no Greek; a shell's odd byte has no encoding."""
    code = """if True:
        import sys
        from nanodva import errors
        def main():
            print("Ελλάδα 🙂 \\udcff")
            errors.fail("Ελλάδα")
        errors.run_script(main)"""
    result = python(code, PYTHONIOENCODING=console)
    assert result.stdout == "Ελλάδα 🙂 ?\n"
    assert result.stderr == "error: Ελλάδα\n" and result.returncode == 2


@pytest.mark.parametrize("error, status, err", [
    (UserError("n_layer=0"), 2, "error: n_layer=0\n"), (SystemExit(143), 143, "")], ids=repr)
def test_a_script_ends_with_one_line_and_the_right_status(capsys, error, status, err):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == status and capsys.readouterr().err == err


def test_ctrl_c_ends_a_script_that_was_started_with_it_ignored(capsys):
    """As a shell starts what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: signal.raise_signal(signal.SIGINT))
    assert end.value.code == 130 and capsys.readouterr().err == "stopped at once\n"


def a_full_disk_elsewhere():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "another/file")


@pytest.mark.parametrize("mistake", [
    a_full_disk_elsewhere, lambda: open("no/such/file"), lambda: subprocess.run(["no-command"]),
    lambda: 1 / 0, lambda: int("six")])
def test_a_mistake_in_the_code_keeps_its_traceback(mistake):
    """Also in a block that writes a file of ours."""
    def main():
        with replacing("no-model.pt"):
            mistake()
    for code in (mistake, main):
        with pytest.raises((OSError, ArithmeticError, ValueError)) as caught:
            run_script(code)
        assert not isinstance(caught.value, UserError)
    assert not os.path.exists("no-model.pt.tmp")


def test_a_message_is_one_line_and_keeps_the_blanks_of_a_path():
    assert message_of(fail, "no a  b/c\n   in\x0bit\r\n") == "no a  b/c in it"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("is_full, status, err", [
    (True, 2, "error: cannot write standard output: No space left on device\n"),
    # As in  python prepare_data.py --help | head -1
    (False, 141, "")])
def test_output_on_a_full_disk_and_to_a_reader_that_has_seen_enough(is_full, status, err,
                                                                    unbuffered):
    out, closed = os.pipe()
    os.close(out)
    with open("/dev/full" if is_full else closed, "w") as file:
        result = subprocess.run([sys.executable, "prepare_data.py", "--help"], cwd=ROOT, text=True,
                                stdout=file, stderr=subprocess.PIPE,
                                env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (status, err)


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("action, path, use, reason", [
    ("read", "no/such", open, "No such file or directory"),
    ("write", "/proc/a/b", os.makedirs, "No such file or directory"),
    ("read", "config", open, "Is a directory"), ("read", "a" * 300, os.stat, "File name too long")])
def test_what_the_disk_refuses_names_the_file_and_the_fix(action, path, use, reason):
    with pytest.raises(UserError) as caught, naming_file(action, path, "give another"):
        use(path)
    assert str(caught.value) == f"cannot {action} {path}: {reason}; give another"


@pytest.mark.parametrize("write", [lambda file: file.write(bytes(20_000)),
                                   lambda file: torch.save(torch.zeros(5000), file)])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, write, before):
    path = tmp_path / "a  b.pt"
    if before:
        path.write_bytes(before)
    with full_disk() as fill, pytest.raises(UserError) as caught, replacing(path) as file:
        fill(10_000)
        write(file)
    fix = "what it held before is untouched" if before else "name another place"
    assert str(caught.value) == f"cannot write {path}: {os.strerror(errno.EFBIG)}; {fix}"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] \
        == ([(path.name, before)] if before else [])


# ---- importing -----------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_starts_nothing(capsys, script):
    handler = signal.getsignal(signal.SIGINT)
    runpy.run_path(str(ROOT / script), run_name="not_main")
    assert capsys.readouterr() == ("", "") and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_packages_says_which_are_missing(script):
    """-S leaves out site-packages, as the system's own Python has it."""
    result = subprocess.run([sys.executable, "-I", "-S", "-c", "import sys, runpy;"
                             f"sys.path.insert(0, {str(ROOT)!r});"
                             f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "lacks torch" in result.stderr and "source .venv/bin/activate" in result.stderr


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_script_runs_with_a_closed_stream(name):
    process = python(f"import sys; sys.{name} = None; from nanodva.errors import run_script; "
                     "run_script(lambda: (print('out'), print('err', file=sys.stderr), sys.stdin))")
    assert process.returncode == 0 and "Traceback" not in process.stderr
