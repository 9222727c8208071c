"""
Text -> data/NAME/{train.bin, val.bin, meta.json}: token ids that train.py maps into memory.

    python prepare_data.py shakespeare_char                  Tiny Shakespeare (shakespeare: BPE)
    python prepare_data.py plays_char                        38 whole plays, offline (plays: BPE)
    python prepare_data.py openwebtext --max_tokens=100e6    the start of it, or all 9 B tokens
    python prepare_data.py mine --input=notes.txt            one text, split 90/10
    python prepare_data.py mine --input='corpus/*.jsonl.gz'  documents: .txt .jsonl .parquet
    python prepare_data.py mine --input=hf:REPO@REVISION     a data set of the Hugging Face hub
    python prepare_data.py mine --check                      is data/mine as meta.json says?

The input is a file, a folder or a glob, or several with commas between them. A finished data set
stays as it is until the new one is complete. The same input always gives the same bytes.
"""
import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanodva.errors import fail, replacing, run_script
from nanodva.settings import check, load_settings
from nanodva.sources import file_type, find_sources, plain, read_texts, sha256
from nanodva.tokenizer import Tokenizer, bpe_size

BUILT_IN = ("shakespeare_char", "shakespeare", "plays_char", "plays", "openwebtext")
OPENWEBTEXT = "hf:Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"
OPENWEBTEXT_TOKENS = 9.1e9
# The validation split of the plays: a comedy, a history and two tragedies, 9.6 % of the text.
VAL_PLAYS = ("twelfth-night", "henry-v", "julius-caesar", "macbeth")
SPLITS = ("train", "val")
# About how many characters a thread encodes at a time, which bounds the memory.
PIECE = 2**20


@dataclass
class PrepareConfig:
    name: str = ""             # a built-in data set, or a name of your own (the first argument)
    input: str = ""            # files, folders, globs (commas between), or hf:REPO[@REVISION]
    tokenizer: str = ""        # char, gpt2 or gpt2:N; by default char where NAME ends in _char
    column: str = "text"       # where .jsonl, .parquet and hub data sets hold the text
    val_fraction: float = 0.0  # share of val; by default 0.1, for openwebtext nanoGPT's 0.0005
    max_tokens: int = 0        # stop behind the document that reaches it; 0 takes everything
    num_proc: int = 0          # threads that encode; by default the number of cores
    check: bool = False        # prepare nothing: verify sizes, sha256 and ids of what is there
    data_dir: str = "data"     # where data sets live

    def __post_init__(self):
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        self.val_fraction = self.val_fraction or (0.0005 if self.name == "openwebtext" else 0.1)
        self.num_proc = self.num_proc or os.cpu_count()
        sets = f"there are {', '.join(BUILT_IN)}, or a name of your own with --input=PATH"
        if not self.name:
            fail(f"which data set? python prepare_data.py NAME: {sets}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            fail(f"name={self.name!r}: use letters, digits, '-', '_' and '.' only, "
                             "and begin with a letter or a digit")
        if self.name == "openwebtext" and not self.input:
            self.input = OPENWEBTEXT
        if self.name not in BUILT_IN and not self.input and not self.check:
            fail(f"name={self.name!r}: {sets}")
        if self.tokenizer != "char" and bpe_size(self.tokenizer) == bpe_size("gpt2"):
            self.tokenizer = "gpt2"
        if not 0 < self.val_fraction < 1:
            fail(f"val_fraction={self.val_fraction}: it must lie between 0 and 1")
        check(self, least={"max_tokens": 0, "num_proc": 1})


# ---- what belongs to train, and what to val ------------------------------------------------------

def read_single_text(sources, config):
    """Yield the pieces of one text with their split: (text, "train"), ..., (text, "val"), ..."""
    [text] = read_texts(sources[0], config.column)
    if config.max_tokens and config.tokenizer == "char":
        text = text[:config.max_tokens]
    elif config.max_tokens:
        tokenizer = Tokenizer({"kind": config.tokenizer})
        ids = tokenizer.encode_array(text)[:config.max_tokens]
        # The last token may end inside a character.
        text = tokenizer.decode(ids).decode(errors="ignore")
    boundary = int(len(text) * (1 - config.val_fraction))
    for part, split in [(text[:boundary], "train"), (text[boundary:], "val")]:
        start = 0
        while start < len(part):
            # GPT-2's pattern never joins a character to a space behind it, so that cutting there
            # changes no token.
            space = re.compile(r"(?<=\S)[ \n]").search(part, start + PIECE)
            end = space.start() if space else len(part)
            yield part[start:end], split
            start = end


def read_documents(sources, config):
    """Yield each document with its split: (text, "train") or (text, "val")."""
    import xxhash
    for source in sources:
        for text in read_texts(source, config.column):
            if config.name in ("plays", "plays_char") and not config.input:
                text = plain(text)
                in_val = Path(source).stem in VAL_PLAYS
            else:
                # A hash rather than a random number: duplicates never stand in both splits.
                in_val = xxhash.xxh3_64_intdigest(text.encode()) < config.val_fraction * 2**64
            yield text, "val" if in_val else "train"


def find_alphabet(documents, max_tokens):
    """The characters of the documents up to the one that reaches max_tokens, sorted."""
    alphabet, size = set(), 0
    for text, _ in documents:
        alphabet.update(text)
        size += len(text)
        if 0 < max_tokens <= size:
            break
    return "".join(sorted(alphabet))


# ---- encoding and writing ------------------------------------------------------------------------

def encode_all(documents, spec, num_proc, end):
    """
    Yield (ids, split, number of bytes) for each (text, split), in order; the array `end` stands
    behind the ids of each. The work is done by threads: tiktoken runs outside Python's global lock.
    """
    thread = threading.local()

    def start_thread():
        # Threads that share a tiktoken Encoding wait for each other: two of them encode 3.5 M
        # tokens/s, and 8 M with one Encoding each.
        thread.tokenizer = Tokenizer(spec)

    def encode(batch):
        return [(np.append(thread.tokenizer.encode_array(text), end), split, len(text.encode()))
                for text, split in batch]

    with ThreadPoolExecutor(num_proc, initializer=start_thread) as threads:
        waiting = deque()
        for batch in batches_of(documents):
            waiting.append(threads.submit(encode, batch))
            # Reading stays a little ahead of encoding and no more, which bounds the memory.
            if len(waiting) > 2 * num_proc:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def batches_of(documents):
    """Lists of documents with about PIECE characters in all."""
    batch, size = [], 0
    for text, split in documents:
        batch.append((text, split))
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch


def prepare(config, folder, partial):
    """Make the data set in the folder `partial`, and move it to `folder` when it is complete."""
    from tqdm import tqdm
    if config.input == OPENWEBTEXT:
        check_space(partial, min(config.max_tokens or OPENWEBTEXT_TOKENS, OPENWEBTEXT_TOKENS))
    sources = find_sources(config.name, config.input, folder)
    is_single = len(sources) == 1 and file_type(sources[0]) == "txt"
    read = read_single_text if is_single else read_documents
    spec = {"kind": config.tokenizer}
    if config.tokenizer == "char":
        # The text is read twice: the alphabet must be complete before the first id is written.
        spec["alphabet"] = find_alphabet(read(sources, config), config.max_tokens)
    tokenizer = Tokenizer(spec)
    spec = tokenizer.spec
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    # Each document ends with end-of-text; a single text, and characters, know no such token.
    has_end = tokenizer.end_of_text is not None and not is_single
    end = np.array([tokenizer.end_of_text] if has_end else [], dtype=np.uint32)

    tokens, sizes = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    progress = tqdm(desc=config.name, total=config.max_tokens or None, unit="tok", unit_scale=True,
                    disable=None)
    with progress, replacing(partial / "train.bin") as train, replacing(partial / "val.bin") as val:
        files = {"train": train, "val": val}
        for ids, split, size in encode_all(read(sources, config), spec, config.num_proc, end):
            files[split].write(ids.astype(dtype))
            tokens[split] += len(ids)
            sizes[split] += size
            progress.update(len(ids))
            if 0 < config.max_tokens <= tokens["train"] + tokens["val"] and not is_single:
                break
    if 0 in tokens.values():
        fail(f"{config.name}: {tokens['train']:,} tokens for train and {tokens['val']:,} for val, "
             "but neither may be empty: give more text, or another --val_fraction than "
             f"{config.val_fraction}")

    names = [source if source.startswith("hf:") else os.path.basename(source) for source in sources]
    if len(names) > 100:
        names = [names[0], "...", names[-1]]
    meta = {"format": 1, "tokenizer": spec, "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name, "tokens": tokens, "bytes": sizes,
            "source": {"name": config.name, "files": names},
            "sha256": {split: sha256(partial / f"{split}.bin") for split in SPLITS}}
    if len(sources) == 1 and not sources[0].startswith("hf:"):
        meta["source"]["sha256"] = sha256(sources[0])
    with replacing(partial / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())

    # There is no data set without its meta.json. It goes first and comes last, so that nobody
    # reads a mixture of the old set and the new one.
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(partial / name, folder / name)


def check_space(folder, tokens):
    """Raise UserError where the disk that folder is on has no room for the tokens."""
    need, free = 2 * tokens / 1e9, shutil.disk_usage(folder).free / 1e9
    if free < need:
        fail(f"{folder} needs {need:.1f} GB and {free:.1f} GB are free: try --max_tokens=100e6, "
             "or --data_dir on another disk")


@contextmanager
def partial_folder(folder):
    """A new folder folder/partial, which is gone afterwards, as are folders that stay empty."""
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


# ---- checking ------------------------------------------------------------------------------------

def read_meta(folder, deep=False):
    """
    The meta.json of a prepared data set as a dict. Raises UserError where a file is missing or has
    another size than meta.json states; with `deep` also for another sha256 or an impossible id.
    """
    folder = Path(folder)
    again = f"run python prepare_data.py {shlex.quote(folder.name)}"
    if folder.name not in BUILT_IN:
        again += " --input=PATH"
    if str(folder.parent) != "data":
        again += f" --data_dir={shlex.quote(str(folder.parent))}"
    for name in ("train.bin", "val.bin", "meta.json"):
        if not (folder / name).is_file():
            fail(f"no {folder / name}: {again}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        check_files(folder, meta, deep)
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{folder} is not what its meta.json describes ({type(error).__name__}: {error}): "
             f"{again}")
    return meta


def check_files(folder, meta, deep):
    """Raise ValueError, TypeError or KeyError where the files are not what meta describes."""
    if meta["format"] != 1:
        raise ValueError(f"its format is {meta['format']!r}, this program's is 1")
    if "kind" not in meta["tokenizer"]:
        raise ValueError("its tokenizer has no kind")
    for split in SPLITS:
        path, tokens, digest = folder / f"{split}.bin", meta["tokens"][split], meta["sha256"][split]
        if not isinstance(meta["bytes"][split], int) or not isinstance(meta["vocab_size"], int):
            raise ValueError("its bytes and its vocab_size must be whole numbers")
        size = path.stat().st_size
        if size != tokens * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{path.name} has {size} bytes, not {tokens} tokens of "
                             f"{meta['dtype']}")
        if deep and sha256(path) != digest:
            raise ValueError(f"{path.name} has another sha256")
        if deep:
            largest = np.memmap(path, meta["dtype"], "r").max()
            if largest >= meta["vocab_size"]:
                raise ValueError(f"{path.name} holds the id {largest}, vocab_size is "
                                 f"{meta['vocab_size']}")


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    # The first argument without dashes in front is the name.
    for position, argument in enumerate(argv):
        if not argument.startswith("-"):
            argv[position] = f"--name={argument}"
            break
    config = load_settings(PrepareConfig, argv)
    folder = Path(config.data_dir) / config.name
    try:
        if not config.check:
            with partial_folder(folder) as partial:
                prepare(config, folder, partial)
        meta = read_meta(folder, deep=config.check)
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}")
    name = f"{folder} is sound" if config.check else folder
    print(f"{name}: {meta['tokens']['train']:,} tokens for train, {meta['tokens']['val']:,} for "
          f"val; {meta['dtype']}, vocabulary {meta['vocab_size']:,}")


if __name__ == "__main__":
    run_script(main)
