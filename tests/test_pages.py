"""Of the pages, commands parse, links and pictures exist, and the README is short."""
import ast
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, contents

import prepare_data
import sample
import train
from nanodva.settings import read_settings
from tools import bench, convert, explain, race, report

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
SETTINGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig,
            "prepare_data.py": prepare_data.PrepareConfig, "tools.bench": bench.BenchConfig,
            "tools.race": race.RaceConfig, "tools.report": report.ReportConfig,
            "tools.convert": convert.ConvertConfig, "tools.explain": explain.ExplainConfig}


def commands():
    """(page, command) of each line in the pages' blocks of code, and in their texts, that runs."""
    found = []
    for page, text in TEXTS.items():
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        # A notebook marks the shell's lines with !
        lines = [command.removeprefix("!") for block in blocks for line in block.split("\n")
                 for command in line.strip().split(" && ")]
        inline = re.findall(r"`((?:python|make) [^`]+)`", text)
        lines += [code.replace("\n", " ") for code in inline]
        found += [(page, re.split(r"   | # ", line)[0]) for line in lines
                  if re.match(r"(python|torchrun|make) ", line)]
    return found


def parse(command):
    """Raise if the command's script, its settings or its target of make do not exist."""
    words = shlex.split(command.replace("< prompt.txt", ""))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "torchrun":
        # The words before the script are torchrun's own
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
    script, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if script == "-c":
        compile(arguments[0], "page", "exec")
    elif script == "venv":
        assert arguments == [".venv"]                                  # as in the Makefile
    elif script == "pytest":
        assert all((ROOT / path).exists() for path in arguments if not path.startswith("-"))
    elif script.startswith(("data/", "docs/")):
        assert (ROOT / script).exists()
    else:
        if script in ("prepare_data.py", "tools.convert"):
            first = "name" if script == "prepare_data.py" else "source"
            arguments = [f"--{first}={arguments[0]}", *arguments[1:]]
        if script == "tools.report":
            # The other words are folders of runs
            arguments = [word for word in arguments if word.startswith("-")]
        read_settings(SETTINGS[script], [word for word in arguments if word != "--help"])


def test_each_command_exists_and_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page, command in commands():
        try:
            parse(command)
        except Exception as error:
            error.add_note(f"{page}: {command}")
            raise
    assert len(commands()) > 50


def test_each_link_and_picture_is_there_and_the_front_page_is_short():
    missing = [(page, target) for page in PAGES
               for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text())
               if not (page.parent / target).exists()]
    assert missing == []
    assert PAGES[0].stat().st_size <= 9 * 1024


def test_a_lesson_names_panels_and_buttons_as_the_page_does():
    rows = re.findall(r"^\|.*", TEXTS["class.md"], re.MULTILINE)
    labels = {label for row in rows for label in re.findall(r"\*\*(.+?)\*\*", row)}
    labels -= {"loss", "Loss"}
    page = (ROOT / "docs" / "try.html").read_text()
    assert len(labels) > 10
    assert [label for label in labels if not re.search(rf">\s*{re.escape(label)}\b", page)] == []


def test_python_on_the_pages_is_python():
    for text in TEXTS.values():
        for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            # The page shows lines of a method without the method around them
            ast.parse("def method():\n" + re.sub("^", "    ", code, flags=re.MULTILINE))


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def files_in(folder):
    return {name for name, content in contents(folder).items() if content is not None}


@pytest.fixture
def make(tmp_path):
    """make(target, ..., answer, folder): what make prints, called in a folder with the Makefile."""
    if not shutil.which("make") or not shutil.which("tar"):
        pytest.skip("needs make and tar")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(*words, answer="", folder=tmp_path):
        return subprocess.run(["make", *words], cwd=folder, input=answer, text=True, check=True,
                              capture_output=True).stdout
    return make


def test_make_clean_removes_what_make_made_and_distclean_asks_for_more(make, tmp_path):
    # Of "out-my run" the second word is no name of its own
    others = {"Makefile", "data/mine/mine.txt", "run"}
    written = {"out/last.pt", "out-my run/last.pt", "data/mine/train.bin"}
    touch(tmp_path, written | others)
    touch(tmp_path, [".venv/installed", "nanoDVA-offline/wheels/x", "out-demo/last.pt",
                     "out-try/last.pt", "data/plays_char/val.bin", "tools/__pycache__/x"])
    for target, answer, left in [("clean", "", written | others),
                                 ("distclean", "", written | others), ("distclean", "yes", others)]:
        make(target, answer=answer)
        assert files_in(tmp_path) == left


def test_make_offline_writes_a_folder_that_installs_from_its_wheels(make, tmp_path):
    copied = {"requirements.txt", "constraints.txt", "requirements-dev.txt", "data/mine/train.bin",
              "tools/output.py"}
    # What is installed is newer
    touch(tmp_path, [*copied, ".venv/installed", "out-demo/last.pt",
                     "nanoDVA-offline/wheels/of_another_system.whl"])
    (tmp_path / ".venv" / "bin").mkdir()
    for program in ("python", "pip"):
        path = tmp_path / ".venv" / "bin" / program
        path.write_text(f'#!/bin/sh\necho {program} "$@" >> called\n')
        path.chmod(0o755)
    make("offline")
    assert (tmp_path / "called").read_text().count("pip download") == 2
    folder = tmp_path / "nanoDVA-offline"
    assert files_in(folder) == copied | {"Makefile", "called", "wheels/of_another_system.whl"}
    lines = re.findall(".*pip install.*", make("demo", "-n", folder=folder))
    assert len(lines) == 2 and all("--no-index --find-links wheels" in line for line in lines)
    (tmp_path / ".venv" / "installed").unlink()
    assert "--no-index" not in make("demo", "-n")
