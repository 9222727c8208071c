"""
Text -> data/NAME/{train.bin, val.bin, meta.json}: token ids that train.py maps into memory.

    python prepare_data.py shakespeare_char                  Tiny Shakespeare (shakespeare: BPE)
    python prepare_data.py plays_char                        38 whole plays, offline (plays: BPE)
    python prepare_data.py openwebtext --max_tokens=100e6    the start of it, or all 9 B tokens
    python prepare_data.py mine --input=notes.txt            one text, split 90/10
    python prepare_data.py mine --input='corpus/*.jsonl.gz'  documents: .txt .csv .json .parquet
    python prepare_data.py mine --input=hf:REPO@REVISION     a data set of the Hugging Face hub
    python prepare_data.py mine --check                      is data/mine as meta.json says?
    python prepare_data.py mine --adopt                      make meta.json for nanoGPT's .bin files

The input is a file, a folder or a glob, or several with commas between them; docs/texts.md says
what is read, and how. A finished data set stays as it is until the new one is complete. The same
input always gives the same bytes.
"""
import math
import os
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

# First of all, since it says in one line which package is missing
from nanodva.errors import check_folder, fail, run_script

# isort: split
import numpy as np

from nanodva.dataset import FEW, adopt, balance, encode_all, read_meta, write_ids, write_meta
from nanodva.readers import (
    END_LINE,
    READERS,
    characters,
    open_text,
    read_csv,
    read_parquet,
    read_plain,
    read_texts,
    read_tsv,
)
from nanodva.settings import PathName, check, load_settings
from nanodva.sources import BUILT_IN, counted, fetched, find_sources, plain, sha256
from nanodva.tokenizer import Tokenizer, bpe_size, read_tokenizer

OPENWEBTEXT = "hf:Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"
OPENWEBTEXT_TOKENS = 9.1e9
# The validation split of the plays: a comedy, a history and two tragedies, 9.6 % of the text.
VAL_PLAYS = ("twelfth-night", "henry-v", "julius-caesar", "macbeth")


@dataclass
class PrepareConfig:
    name: str = ""             # a built-in data set, or a name of your own (the first argument)
    input: PathName = ""       # files, folders, globs, or hf:REPO[:CONFIGURATION][@REVISION]
    tokenizer: PathName = ""   # char, gpt2, gpt2:N, or a GPT-2's folder; default: char for *_char
    column: str = "text"       # the column with the text in .csv, .tsv, .json(l), .parquet
    separator: str = ""        # stands between documents of a .txt; default: <|endoftext|> lines
    encoding: str = ""         # of text files; by default UTF-8, or what a byte-order mark says
    val_fraction: float = 0.0  # share of val; by default 0.1, for openwebtext nanoGPT's 0.0005
    max_tokens: int = 0        # stop after the document that reaches it; 0 takes everything
    num_proc: int = 0          # threads that encode; by default the number of cores
    check: bool = False        # prepare nothing: verify sizes, sha256 and ids of what is there
    adopt: bool = False        # prepare nothing: describe nanoGPT's train.bin, val.bin, meta.pkl
    data_dir: PathName = "data"  # where data sets live

    def __post_init__(self):
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        self.val_fraction = self.val_fraction or (0.0005 if self.name == "openwebtext" else 0.1)
        self.num_proc = self.num_proc or os.cpu_count()
        self.separator = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        sets = f"choose from {', '.join(BUILT_IN)}, or a name of your own with --input=PATH"
        if not self.name:
            fail(f"which data set? python prepare_data.py NAME: {sets}")
        if os.path.exists(self.name) and not (self.input or self.check or self.adopt
                                              or self.name in BUILT_IN):
            fail(f"name={self.name!r}: did you mean  python prepare_data.py "
                 f"{shlex.quote(Path(self.name).stem)} --input={shlex.quote(self.name)} ?")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            fail(f"name={self.name!r}: use letters, digits, '-', '_' and '.' only, and begin with "
                 "a letter or a digit; the folder it goes to is --data_dir")
        if self.name == "openwebtext" and not self.input:
            self.input = OPENWEBTEXT
        if not (self.name in BUILT_IN or self.input or self.check or self.adopt):
            fail(f"name={self.name!r}: {sets}")
        self.spec = {"kind": self.tokenizer}
        if os.path.isdir(self.tokenizer) and self.tokenizer not in ("char", "gpt2"):
            self.spec = read_tokenizer(Path(self.tokenizer))
            if self.spec is None:
                fail(f"tokenizer={self.tokenizer!r}: this folder has neither tokenizer.json nor "
                     "vocab.json, the files of a GPT-2's tokenizer")
        elif self.tokenizer != "char" and bpe_size(self.tokenizer) == bpe_size("gpt2"):
            self.spec = {"kind": "gpt2"}
        if not 0 < self.val_fraction < 1:
            fail(f"val_fraction={self.val_fraction}: it must lie between 0 and 1")
        check(self, least={"max_tokens": 0, "num_proc": 1})
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            fail(f"encoding={self.encoding!r}: Python knows latin-1, cp1252, utf-16 and many more, "
                 "but not this one")
        self.is_plays = self.name in ("plays", "plays_char") and not self.input


# ---- what belongs to train, and what to val ------------------------------------------------------

def measure(source, config, watch):
    """
    (length, characters, is_separated) of one text, as far as max_tokens: its number of characters,
    the set of them if these are the tokens, and whether lines separate documents in it.
    """
    length, alphabet, is_separated, before = 0, set(), False, ""
    is_char, left = config.tokenizer == "char", config.max_tokens or math.inf
    tokenizer = Tokenizer(config.spec) if left < math.inf and not is_char else None
    with open_text(source, config, watch) as file:
        for text in whole_words(characters(file, left if is_char else math.inf)):
            is_separated = is_separated or END_LINE in before + text
            before = text[-len(END_LINE):]
            if is_char:
                alphabet.update(text)
            if tokenizer:
                ids = tokenizer.encode_array(text)[:left]
                left -= len(ids)
                # The last token may end inside a character.
                text = tokenizer.decode(ids).decode(errors="ignore")
            length += len(text)
            if left == 0:
                break
    return length, alphabet, is_separated and not is_char


def read_single_text(source, config, length, watch):
    """Yield the first `length` characters of one text in pieces: (text, "train"), (text, "val")."""
    boundary = int(length * (1 - config.val_fraction))
    with open_text(source, config, watch) as file:
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


def read_documents(sources, config, watch):
    """Yield each document with its split: (text, "train") or (text, "val")."""
    import xxhash
    is_char = config.tokenizer == "char"
    separator = config.separator or ("" if is_char else END_LINE)
    # Characters have no end-of-text. What stands between documents in a file stays there.
    kept = {read_plain: config.separator, read_csv: "\n", read_tsv: "\n"} if is_char else {}
    for source in sources:
        ending = kept.get(source.reader, "")
        for text in read_texts(fetched(source), config, watch, separator):
            if config.is_plays:
                text = plain(text)
                in_val = Path(source.path).stem in VAL_PLAYS
            else:
                # A hash rather than a random number: duplicates never stand in both splits.
                in_val = xxhash.xxh3_64_intdigest(text.encode()) < config.val_fraction * 2**64
            yield text + ending, "val" if in_val else "train"


def find_alphabet(documents, max_tokens):
    """The characters, sorted, of the documents until max_tokens is reached."""
    alphabet, size = set(), 0
    for text, _ in documents:
        alphabet.update(text)
        size += len(text)
        if 0 < max_tokens <= size:
            break
    return "".join(sorted(alphabet))


# ---- making a data set ---------------------------------------------------------------------------

def prepare(config, folder, partial):
    """Make the data set in the folder `partial`, and move it to `folder` when it is complete."""
    if config.input == OPENWEBTEXT:
        check_space(partial, min(config.max_tokens or OPENWEBTEXT_TOKENS, OPENWEBTEXT_TOKENS))
    sources, skipped = find_sources(config, folder)
    check_readers(config, sources, skipped)
    is_single = len(sources) == 1 and sources[0].reader is read_plain and not (
        config.separator or sources[0].path.startswith("hf:"))
    is_char, alphabet = config.tokenizer == "char", None
    with progress_of(config, sources, passes=2 if is_char or is_single else 1) as progress:
        # A single text is read twice, since its length says where to split it.
        if is_single:
            length, alphabet, is_separated = measure(sources[0], config, progress.update)
            is_single = not is_separated

        def read():
            if is_single:
                return read_single_text(sources[0], config, length, progress.update)
            return read_documents(sources, config, progress.update)

        # So is every text for its characters: their ids follow from the whole alphabet.
        if is_char and not is_single:
            alphabet = find_alphabet(read(), config.max_tokens)
        if is_char:
            config.spec["alphabet"] = "".join(sorted(alphabet))
        tokenizer = Tokenizer(config.spec)
        # Each document ends with end-of-text; a single text, and characters, know no such token.
        has_end = tokenizer.end_of_text is not None and not is_single
        end = np.array([tokenizer.end_of_text] if has_end else [], dtype=np.uint32)
        encoded = encode_all(read(), tokenizer.spec, config.num_proc, end)
        limit = math.inf if is_single else config.max_tokens or math.inf
        dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
        tokens, sizes, count, documents = write_ids(encoded, partial, dtype, limit)

    if config.separator and count <= len(sources):
        fail(f"--separator={config.separator!r} does not occur in {sources[0].path}")
    share = tokens["val"] / max(1, sum(tokens.values()))
    is_near = config.val_fraction / 2 <= share <= 2 * config.val_fraction and share < 1
    if not (is_near or is_single or config.is_plays or count > FEW):
        partial, tokens, sizes = balance(partial, dtype, documents, config.val_fraction, tokenizer,
                                         end)
    # A model learns from a token and the one after it
    if min(tokens.values()) < 2:
        fail(f"{config.name}: {tokens['train']:,} tokens for train and {tokens['val']:,} for val, "
             "and each needs at least 2: give more text, or another --val_fraction than "
             f"{config.val_fraction}")
    source = describe(config.name, sources) | ({} if is_single else {"documents": count})
    write_meta(partial, tokenizer, dtype, tokens, sizes, source)
    # There is no data set without its meta.json. It goes first and comes last, so that nobody
    # reads a mixture of the old set and the new one.
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(partial / name, folder / name)


def check_readers(config, sources, skipped):
    """Say what is read. Raise UserError for a setting that none of the sources needs."""
    readers = {source.reader for source in sources}
    needed = {"column": readers != {read_plain}, "separator": read_plain in readers,
              "encoding": readers != {read_parquet}}
    for name, is_needed in needed.items():
        value = getattr(config, name)
        if not is_needed and value != getattr(PrepareConfig, name):
            fail(f"--{name}={value!r} means nothing for {sources[0].path}: leave it out")
    if config.input:
        labels = [source.kind if source.kind in READERS else
                  f"{source.kind or 'file without a suffix'} as plain text" for source in sources]
        print(f"reading {counted(labels)}" + (f"; skipped {counted(skipped)}" if skipped else ""))


def progress_of(config, sources, passes):
    """A bar that counts the bytes read from the sources, where there is somebody to see it."""
    from tqdm import tqdm
    size = sum(os.path.getsize(s.path) for s in sources if not s.path.startswith("hf:"))
    return tqdm(desc=config.name, total=None if config.max_tokens else size * passes or None,
                unit="B", unit_scale=True, disable=None)


def describe(name, sources):
    """What meta.json says about the sources."""
    paths = [source.path for source in sources]
    names = [path if path.startswith("hf:") else os.path.basename(path) for path in paths]
    found = {"name": name, "files": [names[0], "...", names[-1]] if len(names) > 100 else names}
    if len(paths) == 1 and not paths[0].startswith("hf:"):
        found["sha256"] = sha256(paths[0])
    return found


def check_space(folder, tokens):
    """Raise UserError where the disk that folder is on has no room for the tokens."""
    need, free = 2 * tokens / 1e9, shutil.disk_usage(folder).free / 1e9
    if free < need:
        fail(f"{folder} needs {need:.1f} GB and {free:.1f} GB are free: try --max_tokens=100e6, "
             "or --data_dir on another disk")


@contextmanager
def partial_folder(folder):
    """A new folder folder/partial, removed at the end, and with it the folders left empty."""
    partial = folder / "partial"
    # A killed run may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    created = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            # A folder that holds a data set by now is not empty, and stays.
            with suppress(OSError):
                parent.rmdir()


# ---- the command ---------------------------------------------------------------------------------

def name_in(argv):
    """
    The arguments with --name= before the first one without dashes. Raises UserError, with a guess
    at what was meant, for a second one.
    """
    need_value = {f"--{field.name}" for field in fields(PrepareConfig) if field.type is not bool}
    words = [position for position, word in enumerate(argv) if not word.startswith("-")
             and (position == 0 or argv[position - 1] not in need_value)]
    if len(words) > 1:
        name, path = sorted((argv[position] for position in words[:2]), key=os.path.exists)
        fail(f"{argv[words[1]]!r} is not a setting: did you mean  python prepare_data.py "
             f"{shlex.quote(name)} --input={shlex.quote(path)} ?")
    return [f"--name={word}" if [position] == words else word for position, word in enumerate(argv)]


def main(argv=None):
    config = load_settings(PrepareConfig, name_in(sys.argv[1:] if argv is None else argv))
    folder = Path(config.data_dir) / config.name
    check_folder("data_dir", folder.parent)
    try:
        if config.adopt:
            adopt(folder)
        elif not config.check:
            with partial_folder(folder) as partial:
                prepare(config, folder, partial)
        meta = read_meta(folder, deep=config.check)
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}; another place is "
             f"named with --data_dir")
    name = f"{folder} is sound" if config.check else folder
    documents = meta.get("source", {}).get("documents")
    print(f"{name}: {meta['tokens']['train']:,} tokens for train, {meta['tokens']['val']:,} for "
          f"val; {f'{documents:,} documents; ' if documents else ''}{meta['dtype']}, vocabulary "
          f"{meta['vocab_size']:,}")


if __name__ == "__main__":
    run_script(main)
