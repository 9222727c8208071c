"""The pages keep their word: commands parse, links and pictures are there, the README is short."""
import ast
import re
import shlex
from pathlib import Path

import pytest

import prepare_data
import sample
import train
from nanodva.settings import read_settings
from tools import bench, convert, explain, race, report

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
SETTINGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig,
            "prepare_data.py": prepare_data.PrepareConfig, "tools.bench": bench.BenchConfig,
            "tools.race": race.RaceConfig, "tools.report": report.ReportConfig,
            "tools.convert": convert.ConvertConfig, "tools.explain": explain.ExplainConfig,
            "docs/bank_controls.py": race.RaceConfig}


def commands():
    """(page, command) of each line in the pages' blocks of code, and in their texts, that runs."""
    found = []
    for page, text in TEXTS.items():
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        # A notebook marks the shell's lines with !
        lines = [command.removeprefix("!") for block in blocks for line in block.splitlines()
                 for command in line.split(" && ")]
        inline = re.findall(r"`((?:python|make) [^`]+)`", text)
        lines += [code.replace("\n", " ") for code in inline]
        found += [(page, re.split(r"   | # ", line)[0]) for line in lines
                  if re.match(r"(python|torchrun|make) ", line)]
    return found


def links():
    """(page, target) of each link and picture that leads to a file of this project."""
    return [(page, target) for page, text in TEXTS.items()
            for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text)]


@pytest.mark.parametrize("page, command", commands())
def test_each_command_exists_and_parses(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("< prompt.txt", ""))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "torchrun":
        # What stands before the script is torchrun's own
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
    if words[1] == "-m":
        words = ["python", *words[2:]]
    script, arguments = words[1], words[2:]
    if script == "venv":
        assert arguments == [".venv"]                                  # as in the Makefile
        return
    if script == "pytest":
        assert all((ROOT / path).exists() for path in arguments)
        return
    if script.startswith("data/"):
        assert (ROOT / script).exists()
        return
    if script in ("prepare_data.py", "tools.convert"):
        first = "name" if script == "prepare_data.py" else "source"
        arguments = [f"--{first}={arguments[0]}", *arguments[1:]]
    read_settings(SETTINGS[script], [word for word in arguments if word != "--help"])


def test_there_are_commands_on_the_front_page():
    shown = {command for page, command in commands() if page == "README.md"}
    assert {"make demo", "make test"} <= shown and len(shown) > 12


@pytest.mark.parametrize("page, target", links())
def test_each_link_and_picture_is_there(page, target):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    assert (folder / target).exists()


def test_the_front_page_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024


def test_the_presets_comments_hold_no_figures_of_their_own():
    known = re.findall(r"\d+\.\d+", TEXTS["race.md"])
    for preset in sorted((ROOT / "config").glob("*.py")):
        comments = " ".join(re.findall(r"^# (.*)", preset.read_text(), re.MULTILINE))
        # A setting, as in --dropout=0.2, is no claim
        for figure in re.findall(r"\d+\.\d+", re.sub(r"--\S+", "", comments)):
            assert figure in known, f"{preset.name}: {figure}"


def test_python_on_the_pages_is_python():
    for text in TEXTS.values():
        for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            # Lines of a method stand on the page without the method around them
            ast.parse("def method():\n" + re.sub("^", "    ", code, flags=re.MULTILINE))
