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
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Imported first: it reports a missing package in one line
from nanodva.errors import check_folder, fail, only_writer, run_script

# isort: split
import numpy as np

from nanodva import dataset
from nanodva.dataset import SPLITS, read_meta
from nanodva.readers import END_LINE, characters, open_text, read_parquet, read_plain, read_texts
from nanodva.settings import PathName, check, load_settings
from nanodva.sources import BUILT_IN, fetched, find_sources, plain, sha256
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
    max_tokens: int = 0        # stop after the document that reaches it; 0 takes everything
    num_proc: int = 0          # threads that encode; by default the number of cores
    check: bool = False        # prepare nothing: verify sizes, sha256 and ids of what is there
    adopt: bool = False        # prepare nothing: describe nanoGPT's train.bin, val.bin, meta.pkl
    data_dir: PathName = "data"  # where data sets live

    def __post_init__(self):
        sets = f"choose from {', '.join(BUILT_IN)}, or a name of your own with --input=PATH"
        if not self.name:
            fail(f"which data set? python prepare_data.py NAME: {sets}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            fail(f"name={self.name!r}: use letters, digits, '-', '_' and '.' only, and begin with "
                 "a letter or a digit; the folder it goes to is --data_dir")
        if self.name == "openwebtext" and not self.input:
            self.input = OPENWEBTEXT
        if not (self.name in BUILT_IN or self.input or self.check or self.adopt):
            fail(f"name={self.name!r}: {sets}")
        if self.val_input and (not self.input or self.val_fraction != -1):
            fail(f"val_input={self.val_input!r}: it goes with --input=PATH, the text for train, "
                 "and without --val_fraction")
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        self.spec = find_spec(self.tokenizer)
        self.is_char = self.spec["kind"] == "char"
        self.separator = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        if self.val_fraction == -1:
            self.val_fraction = 0.0005 if self.name == "openwebtext" else 0.1
        if not 0 < self.val_fraction < 1:
            fail(f"val_fraction={self.val_fraction}: it must lie between 0 and 1, since train.py "
                 "needs both splits; --val_input=PATH names texts of your own for val")
        check(self, least={"max_tokens": 0, "num_proc": 0})
        self.num_proc = self.num_proc or os.cpu_count()
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            fail(f"encoding={self.encoding!r}: Python knows latin-1, cp1252, utf-16 and many more, "
                 "but not this one")


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

def measure(source, config):
    """
    (length, is_separated) of one text: how many of its characters max_tokens allows, and whether
    lines that are <|endoftext|> separate documents in them.
    """
    length, is_separated, before, left = 0, False, "", config.max_tokens or sys.maxsize
    tokenizer = Tokenizer(config.spec) if config.max_tokens and not config.is_char else None
    with open_text(source, config) as file:
        for text in whole_words(characters(file)):
            is_separated = is_separated or END_LINE in before + text
            before = text[-len(END_LINE):]
            if tokenizer:
                ids = tokenizer.encode_array(text)[:left]
                left -= len(ids)
                # The last token may end inside a character.
                text = tokenizer.decode(ids).decode(errors="ignore")
            else:
                text = text[:left]
                left -= len(text)
            length += len(text)
            if left == 0:
                break
    return length, is_separated and not config.is_char


def read_single_text(source, config, length):
    """Yield the first `length` characters of one text in pieces: (text, "train"), (text, "val")."""
    boundary = int(length * (1 - config.val_fraction))
    with open_text(source, config) as file:
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


def read_documents(sources, val_sources, config):
    """Yield each document with its split: (text, "train") or (text, "val"); val_sources first."""
    import xxhash
    is_plays = config.name in ("plays", "plays_char") and not config.input
    for position, source in enumerate([*val_sources, *sources]):
        separator, ending = config.separator, ""
        if config.is_char:
            # Characters have no end-of-text. What separates documents in a file stays.
            ending = separator or ("\n" if source.kind in (".csv", ".tsv") else "")
        elif source.reader is read_plain:
            separator = separator or END_LINE
        for text in read_texts(fetched(source), config, separator):
            text = plain(text) if is_plays else text
            # A hash rather than a random number: equal documents are in the same split.
            is_val = position < len(val_sources) if val_sources else \
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

def prepare(config, folder, partial):
    """Make the data set in the folder `partial`, and move it to `folder` when it is complete."""
    sources, val_sources = find_sources(config, folder)
    readers = {source.reader for source in [*sources, *val_sources]}
    for name, default, reader in ("column", "text", read_plain), ("encoding", "", read_parquet):
        if readers == {reader} and getattr(config, name) != default:
            fail(f"--{name}={getattr(config, name)!r} means nothing for {sources[0].path}: leave "
                 "it out")
    is_single = len(sources) == 1 and sources[0].reader is read_plain and not (
        val_sources or config.separator or sources[0].path.startswith("hf:"))
    if is_single:
        # A single text is read twice: its length decides where to split it.
        length, is_separated = measure(sources[0], config)
        is_single = not is_separated

    max_tokens = 0 if is_single else config.max_tokens
    counted = ("train",) if val_sources else SPLITS

    def read(doing):
        documents = read_single_text(sources[0], config, length) if is_single else \
            read_documents(sources, val_sources, config)
        return shown(documents, doing)

    if config.is_char:
        # The ids follow from all characters, so these need a pass of their own.
        alphabet = set()
        for text, _ in until(max_tokens, read("reading"), counted):
            alphabet.update(text)
        lacking = alphabet - set(config.spec.setdefault("alphabet", "".join(sorted(alphabet))))
        if lacking:
            fail(f"tokenizer={config.tokenizer!r} lacks {len(lacking)} of the characters: "
                 f"{''.join(sorted(lacking))[:100]!r}; take them out of the text, or train from "
                 "the start with --tokenizer=char")
    tokenizer = Tokenizer(config.spec)
    # Each document ends with end-of-text; a single text does not, and characters lack that token.
    has_end = tokenizer.end_of_text is not None and not is_single
    end = np.array([tokenizer.end_of_text] if has_end else [], dtype=np.uint32)
    encoded = dataset.encode_all(read("encoding"), tokenizer.spec, config.num_proc, end)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    count, marks, first = dataset.write_ids(until(max_tokens, encoded, counted), partial, dtype)
    if config.separator and count <= len(sources) + len(val_sources):
        fail(f"--separator={config.separator!r} does not occur in {sources[0].path}")
    if marks and END_OF_TEXT not in config.separator:
        print(f"{END_OF_TEXT} is {marks:,} times inside the texts, as ordinary tokens: if it ends "
              f"a document there, add --separator='{END_OF_TEXT}'")
    source = describe(config.name, [*sources, *val_sources])
    if not is_single:
        source["documents"] = count
        if not val_sources:
            partial = dataset.balance(partial, first, dtype, config.val_fraction, end)
    tokens = dataset.write_meta(partial, tokenizer, dtype, source)["tokens"]
    # A model learns from a token and the one after it
    if min(tokens.values()) < 2:
        fail(f"{config.name}: {tokens['train']:,} tokens for train and {tokens['val']:,} for val, "
             "and each needs at least 2: give more text" +
             ("" if val_sources else f", or another --val_fraction than {config.val_fraction}"))
    # meta.json is removed first and written last, so that a half-replaced set is never read.
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(partial / name, folder / name)


def shown(documents, doing):
    """The documents, with a bar that counts their characters on a terminal."""
    from tqdm import tqdm
    with tqdm(desc=doing, unit=" characters", unit_scale=True, disable=None) as bar:
        for text, split in documents:
            bar.update(len(text))
            yield text, split


def describe(name, sources):
    """What meta.json says about the sources."""
    paths = [source.path for source in sources]
    names = [path if path.startswith("hf:") else os.path.basename(path) for path in paths]
    found = {"name": name, "files": [names[0], "...", names[-1]] if len(names) > 100 else names}
    if len(paths) == 1 and not paths[0].startswith("hf:"):
        found["sha256"] = sha256(paths[0])
    return found


@contextmanager
def workplace(folder):
    """
    A new folder inside `folder`, to which no other process writes. It is removed at the end, and so
    are the folders around it that are new and empty.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with only_writer(folder, setting="data_dir"):
            # A killed process leaves its own
            for old in folder.glob(".partial-*"):
                shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
                yield Path(partial)
    finally:
        if created and list(folder.glob("*")) == [folder / "lock"]:
            (folder / "lock").unlink()
        for path in created:
            with suppress(OSError):
                path.rmdir()


# ---- the command ---------------------------------------------------------------------------------

def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--name={argv[0]}"
    config = load_settings(PrepareConfig, argv)
    folder = Path(config.data_dir) / config.name
    check_folder("data_dir", folder.parent)
    try:
        if config.adopt:
            dataset.adopt(folder)
        elif not config.check:
            with workplace(folder) as partial:
                prepare(config, folder, partial)
        meta = read_meta(folder, deep=config.check)
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}; choose another "
             "place with --data_dir")
    name = f"{folder} is sound" if config.check else folder
    documents = meta.get("source", {}).get("documents")
    print(f"{name}: {meta['tokens']['train']:,} tokens for train, {meta['tokens']['val']:,} for "
          f"val; {f'{documents:,} documents; ' if documents else ''}{meta['dtype']}, vocabulary "
          f"{meta['vocab_size']:,}")


if __name__ == "__main__":
    run_script(main)
