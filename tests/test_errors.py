"""errors.py: what every script prints, and how it ends."""
import os
import runpy
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, python

from nanodva.errors import UserError, run_script


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
    (UserError("n_layer=0"), 2, "error: n_layer=0\n"),
    (KeyboardInterrupt(), 130, "stopped at once\n"),
    (OSError(28, "No space left on device", "x.pt"), 2, "error: x.pt: No space left on device\n"),
    (OSError("odd"), 2, "error: a file: odd\n"), (SystemExit(143), 143, "")], ids=repr)
def test_a_script_ends_with_one_line_and_the_right_status(capsys, error, status, err):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == status and capsys.readouterr().err == err


def test_a_script_that_succeeds_or_that_is_broken_ends_as_python_ends_it():
    assert run_script(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in  python prepare_data.py --help | head -1"""
    process = subprocess.Popen([sys.executable, "prepare_data.py", "--help"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    process.stdout.close()
    assert process.wait(timeout=100) == 141 and process.stderr.read() == b""


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py"])
def test_importing_a_script_starts_nothing(capsys, script):
    handler = signal.getsignal(signal.SIGINT)
    runpy.run_path(str(ROOT / script), run_name="not_main")
    assert capsys.readouterr() == ("", "") and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py"])
def test_a_python_without_the_packages_says_which_are_missing(script):
    """-S leaves out site-packages, as the system's own Python has it."""
    result = subprocess.run([sys.executable, "-I", "-S", "-c", "import sys, runpy;"
                             f"sys.path.insert(0, {str(ROOT)!r});"
                             f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "lacks torch" in result.stderr and "source .venv/bin/activate" in result.stderr
