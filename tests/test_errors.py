"""errors.py: what every script prints, and how it ends."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT


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
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                            env=os.environ | {"PYTHONIOENCODING": console})
    assert result.stdout.decode() == "Ελλάδα 🙂 ?\n"
    assert result.stderr.decode() == "error: Ελλάδα\n" and result.returncode == 2
