"""
Text -> data/NAME/{train.bin, val.bin, meta.json}: token ids that train.py maps into memory.

    python prepare_data.py shakespeare_char                  Tiny Shakespeare (shakespeare: BPE)
    python prepare_data.py plays_char                        38 whole plays, offline (plays: BPE)
    python prepare_data.py openwebtext --max_tokens=100e6    the start of it, or all 9 B tokens
    python prepare_data.py mine --input=notes.txt            one text, split 90/10
    python prepare_data.py mine --input='corpus/*.jsonl.gz'  documents: .txt .md .csv .json .parquet
    python prepare_data.py mine --input=hf:REPO@REVISION     a data set of the Hugging Face hub
    python prepare_data.py mine --input=FILE --tokenizer=RUN text for a model that you have
    python prepare_data.py mine --check                      is data/mine as meta.json says?
    python prepare_data.py mine --adopt                      make meta.json for nanoGPT's .bin files

The input is a file, a folder or a glob, or several with commas between them; docs/texts.md says how
each kind of file is read. A finished data set stays as it is until the new one is complete. The
same input always gives the same bytes.
"""
import math
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Imported first: it reports a missing package in one line
from nanodva.errors import fail, only_writer, run_script

# isort: split
import numpy as np

from nanodva import dataset, readers
from nanodva.dataset import SPLITS, read_meta
from nanodva.readers import END_LINE, characters, open_text
from nanodva.settings import PathName, check, load_settings
from nanodva.sources import BUILT_IN, find_sources, plain
from nanodva.tokenizer import END_OF_TEXT, Tokenizer, bpe_size, read_tokenizer

OPENWEBTEXT = "hf:Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"


@dataclass
class PrepareConfig:
    name: str = ""             # a built-in data set, or a name of your own (the first argument)
    input: PathName = ""       # files, folders, globs, or hf:REPO[:CONFIGURATION][@REVISION]
    val_input: PathName = ""   # the same, for val; all of --input is for train then
    tokenizer: PathName = ""   # gpt2, gpt2:N, char (default of *_char), or a folder: run, data set
    column: str = "text"       # the column with the text in .csv, .tsv, .json(l), .parquet
    separator: str = ""        # splits texts into documents; default: <|endoftext|> lines of a .txt
    encoding: str = ""         # of text files; by default UTF-8, or what a byte-order mark says
    val_fraction: float = -1.0  # share of val; -1 is 0.1, and for openwebtext nanoGPT's 0.0005
    max_tokens: int = 0        # stop with the document that reaches it; own val texts extra; 0: all
    num_proc: int = 0          # threads that encode; by default the number of cores
    check: bool = False        # prepare nothing: verify the sizes and sha256 of what is there
    adopt: bool = False        # prepare nothing: describe nanoGPT's train.bin, val.bin, meta.pkl
    data_dir: PathName = "data"  # where data sets live

    def __post_init__(self):
        is_known = self.name in BUILT_IN or self.input or self.check or self.adopt
        if not is_known or not re.fullmatch(r"\w[\w.-]*", self.name):
            fail(f"name={self.name!r}: choose from {', '.join(BUILT_IN)}, or with --input=PATH a "
                 "name of your own of letters, digits, '-', '_' and '.'; the folder it goes to is "
                 "--data_dir")
        if self.name == "openwebtext" and not self.input:
            self.input = OPENWEBTEXT
        if self.val_input and (not self.input or self.val_fraction != -1):
            fail(f"val_input={self.val_input!r}: it goes with --input=PATH, the text for train, "
                 "and without --val_fraction")
        self.is_plays = self.name in ("plays", "plays_char") and not self.input
        if self.is_plays and self.val_fraction != -1:
            fail(f"val_fraction={self.val_fraction}: the plays come with four of them for val; "
                 "leave it out")
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        self.spec = find_spec(self.tokenizer)
        self.is_char = self.spec["kind"] == "char"
        self.separator = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        if self.val_fraction == -1:
            self.val_fraction = 0.0005 if self.name == "openwebtext" else 0.1
        if not 0 < self.val_fraction < 1:
            fail(f"val_fraction={self.val_fraction}: it must lie between 0 and 1; "
                 "--val_input=PATH names texts of your own for val")
        check(self, least={"max_tokens": 0, "num_proc": 0})
        self.num_proc = self.num_proc or os.cpu_count()
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            fail(f"encoding={self.encoding!r}: {error}; Python knows latin-1, cp1252, utf-16 ...")


def find_spec(tokenizer):
    """The spec, for Tokenizer, of the tokenizer that the setting names."""
    path = Path(tokenizer)
    if tokenizer == "char":
        return {"kind": "char"}
    if tokenizer == "gpt2" or not path.exists():
        return {"kind": "gpt2" if bpe_size(tokenizer) == bpe_size("gpt2") else tokenizer}
    if (path / "meta.json").is_file():
        return read_meta(path)["tokenizer"]
    spec = read_tokenizer(path)
    if spec is None:
        # A run, which needs torch
        from nanodva.weights import read_weights
        weights = read_weights(path)
        spec = weights["tokenizer"]
        if spec is None or weights["assumed"]:
            fail(f"tokenizer={tokenizer!r} has neither tokenizer.json nor vocab.json and does not "
                 "say what its tokens are: name its data set, as data/NAME, or gpt2")
    return spec


# ---- what belongs to train, and what to val ------------------------------------------------------

def measure(path, config):
    """
    (length, is_separated) of one text: how many of its characters max_tokens allows, and whether
    lines that are <|endoftext|> separate documents in them.
    """
    length, is_separated, before, left = 0, False, "", config.max_tokens or math.inf
    tokenizer = Tokenizer(config.spec) if config.max_tokens and not config.is_char else None
    with open_text(path, config) as file:
        for text in whole_words(characters(file, left if config.is_char else math.inf)):
            is_separated = is_separated or END_LINE in before + text
            before = text[-len(END_LINE):]
            if tokenizer:
                ids = tokenizer.encode_array(text)[:left]
                left -= len(ids)
                # The last token may end inside a character.
                text = tokenizer.decode(ids).decode(errors="ignore")
            length += len(text)
            if left == 0:
                break
    return length, is_separated and not config.is_char


def read_single_text(path, config, length):
    """Yield the first `length` characters of one text in pieces: (text, "train"), (text, "val")."""
    boundary = int(length * (1 - config.val_fraction))
    with open_text(path, config) as file:
        for count, split in [(boundary, "train"), (length - boundary, "val")]:
            for text in whole_words(characters(file, count)):
                yield text, split


def whole_words(pieces):
    """The text in pieces, cut only where it changes no token: GPT-2's end before a space."""
    held = []
    for piece in pieces:
        last = re.match(r".*\S(?=[ \n])", piece, re.DOTALL)
        if last:
            yield "".join([*held, last[0]])
            held, piece = [], piece[last.end():]
        held.append(piece)
    if any(held):
        yield "".join(held)


def read_documents(paths, val_paths, config):
    """Yield each document with its split: (text, "train") or (text, "val"); val_paths first."""
    import xxhash
    for position, path in enumerate([*val_paths, *paths]):
        separator, ending = config.separator, ""
        if config.is_char:
            # Characters have no end-of-text. What separates documents in a file stays.
            ending = separator or ("\n" if readers.suffix_of(path) in (".csv", ".tsv") else "")
        elif readers.reader_of(path) is readers.read_plain:
            separator = separator or END_LINE
        for text in readers.read_texts(path, config, separator):
            text = plain(text) if config.is_plays else text
            # A hash rather than a random number: equal documents are in the same split.
            is_val = position < len(val_paths) if val_paths else \
                xxhash.xxh3_64_intdigest(text.encode()) < config.val_fraction * 2**64
            yield text + ending, "val" if is_val else "train"


def until(max_tokens, documents, counted):
    """The documents until those of the splits `counted` reach max_tokens, if that is above 0."""
    size = 0
    for document in documents:
        yield document
        size += len(document[0]) if document[1] in counted else 0
        if 0 < max_tokens <= size:
            return


# ---- making a data set ---------------------------------------------------------------------------

def prepare(config, paths, val_paths, partial):
    """Make the data set in the folder `partial`."""
    everything = [*paths, *val_paths]
    kinds = {readers.reader_of(path) for path in everything}
    for name, default, kind in [("column", "text", readers.read_plain),
                                ("encoding", "", readers.read_parquet)]:
        if kinds == {kind} and getattr(config, name) != default:
            fail(f"--{name}={getattr(config, name)!r} means nothing for {paths[0]}: leave it out")
    is_single = len(everything) == 1 and kinds == {readers.read_plain} and not (
        config.separator or config.input.startswith("hf:"))
    if is_single:
        # A single text is read twice: its length decides where to split it.
        length, is_separated = measure(paths[0], config)
        is_single = not is_separated

    max_tokens = 0 if is_single else config.max_tokens
    counted = ("train",) if val_paths else SPLITS

    def read(doing):
        from tqdm import tqdm
        documents = read_single_text(paths[0], config, length) if is_single else \
            read_documents(paths, val_paths, config)
        # A character is a token. What follows may hold others than the alphabet.
        documents = until(max_tokens, documents, counted) if config.is_char else documents
        return tqdm(documents, doing, unit=" texts", disable=None)

    if config.spec == {"kind": "char"}:
        # The ids follow from all characters, so these need a pass of their own.
        alphabet = set()
        for text, _ in read("reading"):
            alphabet.update(text)
        config.spec["alphabet"] = "".join(sorted(alphabet))
    tokenizer = Tokenizer(config.spec)
    # Each document ends with end-of-text; a single text does not, and characters lack that token.
    has_end = tokenizer.end_of_text is not None and not is_single
    end = np.array([tokenizer.end_of_text] if has_end else [], dtype=np.uint32)
    encoded = dataset.encode_all(read("encoding"), tokenizer.spec, config.num_proc, end)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    count, marks, first = dataset.write_ids(until(max_tokens, encoded, counted), partial, dtype)
    # Without separators each file is one document
    if config.separator and kinds == {readers.read_plain} and count == len(everything) and not any(
            readers.has_separator(path, config) for path in everything):
        others = " and the other texts" if len(everything) > 1 else ""
        fail(f"--separator={config.separator!r} does not occur in {paths[0]}{others}")
    if marks and END_OF_TEXT not in config.separator:
        print(f"{END_OF_TEXT} is {marks:,} times inside the texts, as ordinary tokens: if it ends "
              f"a document there, add --separator='{END_OF_TEXT}'")
    if not is_single and not val_paths:
        dataset.balance(partial, first, dtype, config.val_fraction, end)
    names = [path if path.startswith("hf:") else os.path.basename(path) for path in everything]
    source = {"name": config.name, "files": names[:100]}
    if not is_single:
        source["documents"] = count
    tokens = dataset.write_meta(partial, tokenizer, dtype, source)["tokens"]
    if has_end and count > 100 and tokens["val"]:
        ends = np.flatnonzero(np.memmap(partial / "val.bin", dtype) == tokenizer.end_of_text)
        share = np.diff(ends, prepend=-1).max(initial=0) / tokens["val"]
        if share > 0.05:
            print(f"one text is {share:.0%} of val, and so of every loss on val: leave it out, or "
                  "give val a larger share")
    # A model learns from a token and the one after it
    if min(tokens.values()) < 2:
        fail(f"{config.name}: {tokens['train']:,} tokens for train and {tokens['val']:,} for val, "
             "and each needs at least 2: give more text, or another --val_fraction")


# ---- the command ---------------------------------------------------------------------------------

def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--name={argv[0]}"
    config = load_settings(PrepareConfig, argv)
    folder = Path(config.data_dir) / config.name
    try:
        if config.adopt:
            dataset.adopt(folder)
        elif not config.check:
            make(config, folder)
        meta = read_meta(folder, deep=config.check)
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}; choose another "
             "place with --data_dir")
    name = f"{folder} is sound" if config.check else folder
    documents = meta["source"].get("documents")
    print(f"{name}: {meta['tokens']['train']:,} tokens for train, {meta['tokens']['val']:,} for "
          f"val; {f'{documents:,} documents; ' if documents else ''}{meta['dtype']}, vocabulary "
          f"{meta['vocab_size']:,}")


def make(config, folder):
    """Make the data set in a new folder inside `folder`, and move it there when it is complete."""
    paths, val_paths = find_sources(config, folder)
    with only_writer(folder, setting="data_dir"):
        # A killed process leaves its own
        for old in folder.glob(".partial-*"):
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            prepare(config, paths, val_paths, Path(partial))
            # meta.json is removed first and written last, so that a half-replaced set is never read
            (folder / "meta.json").unlink(missing_ok=True)
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(Path(partial, name), folder / name)


if __name__ == "__main__":
    run_script(main)
