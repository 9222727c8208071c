"""
A prepared data set: a folder with train.bin, val.bin and meta.json, which says what they are.
"""
import io
import json
import pickle
import shlex
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanodva.errors import check_folder, fail, replacing
from nanodva.readers import PIECE
from nanodva.sources import BUILT_IN, sha256
from nanodva.tokenizer import END_OF_TEXT, Tokenizer

SPLITS = ("train", "val")
# At most so many documents may be split again, see balance().
FEW = 10_000


# ---- encoding and writing ------------------------------------------------------------------------

def encode_all(documents, spec, num_proc, end):
    """
    Yield (ids, split, number of <|endoftext|> in the text) for each (text, split), in order; the
    array `end` follows the ids of each. Threads do the work: tiktoken runs outside Python's global
    lock.
    """
    thread = threading.local()

    def start_thread():
        # Threads that share a tiktoken Encoding wait for each other: two of them encode 3.5 M
        # tokens/s, and 8 M with one Encoding each.
        thread.tokenizer = Tokenizer(spec)

    def encode(batch):
        return [(np.append(thread.tokenizer.encode_array(text), end), split,
                 text.count(END_OF_TEXT)) for text, split in batch]

    with ThreadPoolExecutor(num_proc, initializer=start_thread) as threads:
        waiting, batch, size = deque(), [], 0
        for document in documents:
            batch.append(document)
            size += len(document[0])
            if size >= PIECE:
                waiting.append(threads.submit(encode, batch))
                batch, size = [], 0
            # Reading stays a little ahead of encoding and no more, which bounds the memory.
            if len(waiting) > 2 * num_proc:
                yield from waiting.popleft().result()
        waiting.append(threads.submit(encode, batch))
        while waiting:
            yield from waiting.popleft().result()


def write_ids(encoded, folder, dtype):
    """
    Write train.bin and val.bin from what encode_all() yields. Returns the number of documents, of
    <|endoftext|> in them, and (split, number of tokens) for each of the first documents.
    """
    documents, marks, first = 0, 0, []
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        for ids, split, found in encoded:
            (train if split == "train" else val).write(ids.astype(dtype))
            documents += 1
            marks += found
            if len(first) <= FEW:
                first.append((split, len(ids)))
    return documents, marks, first


def balance(folder, first, dtype, val_fraction, end):
    """
    Split a small set again if the documents' hashes have left val empty or far from its share.

    `first` is what write_ids() has returned for the folder. The documents of the lowest hashes go
    to val, and of the next one only its last part; equal documents are treated alike. Returns the
    folder with the better split.
    """
    tokens, ids, parts, weights = Counter(), {}, [], Counter()
    for split, count in first:
        tokens[split] += count
    share = tokens["val"] / max(1, tokens.total())
    if len(first) > FEW or val_fraction / 2 <= share <= 2 * val_fraction and share < 1:
        return folder
    import xxhash
    for split in SPLITS:
        path = folder / f"{split}.bin"
        ids[split] = np.memmap(path, dtype, "r") if tokens[split] else np.array([], dtype)
    for split, count in first:
        parts.append(ids[split][:count])
        ids[split] = ids[split][count:]
    hashes = [xxhash.xxh3_64_intdigest(part.tobytes()) for part in parts]
    for number, part in zip(hashes, parts, strict=True):
        weights[number] += len(part)
    wanted, share = val_fraction * tokens.total(), {}
    for number in sorted(weights):
        share[number] = min(1, wanted / max(1, weights[number]))
        wanted -= share[number] * weights[number]

    def halves():
        for number, part in zip(hashes, parts, strict=True):
            cut = len(part) - round(share[number] * len(part))
            # The first half of a document ends as a whole one does
            yield np.append(part[:cut], end if 0 < cut < len(part) else end[:0]), "train", 0
            yield part[cut:], "val", 0

    balanced = folder / "balanced"
    balanced.mkdir()
    write_ids(halves(), balanced, dtype)
    return balanced


# ---- meta.json -----------------------------------------------------------------------------------

def write_meta(folder, tokenizer, dtype, source):
    """
    Write the meta.json of the .bin files in a folder and return it as a dict; `source` is a dict
    that describes the text. Raises IndexError for an id that the tokenizer lacks.
    """
    lengths = np.array([len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    meta = {"format": 1, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name, "tokens": {}, "bytes": {}, "source": source, "sha256": {}}
    for split in SPLITS:
        path, size = folder / f"{split}.bin", 0
        with open(path, "rb") as file:
            while len(ids := np.fromfile(file, dtype, PIECE)) > 0:
                size += int(lengths[ids].sum())
        meta["tokens"][split] = path.stat().st_size // dtype.itemsize
        meta["bytes"][split], meta["sha256"][split] = size, sha256(path)
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    return meta


def read_meta(folder, deep=False):
    """
    The meta.json of a prepared data set as a dict. Raises UserError if a file is missing or has
    another size than meta.json states; with `deep` also for another sha256 or an impossible id.
    """
    folder = Path(folder)
    check_folder("data_dir", folder.parent)
    command = ["python", "prepare_data.py", folder.name]
    command += [] if folder.name in BUILT_IN else ["--input=PATH"]
    command += [] if str(folder.parent) == "data" else [f"--data_dir={folder.parent}"]
    again = f"run {shlex.join(command)}"
    for name in ("train.bin", "val.bin", "meta.json"):
        if not (folder / name).is_file():
            if name == "meta.json":
                again += ", or with --adopt if nanoGPT has prepared it"
            # The whole path, since the user may be in another folder
            fail(f"no {(folder / name).absolute()}: {again}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        check_files(folder, meta, deep)
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{folder} is not what its meta.json describes ({type(error).__name__}: {error}): "
             f"{again}")
    return meta


def check_files(folder, meta, deep):
    """Raise ValueError, TypeError or KeyError if the files are not what meta describes."""
    if meta["format"] != 1:
        raise ValueError(f"its format is {meta['format']!r}, this program's is 1")
    if "kind" not in meta["tokenizer"]:
        raise ValueError("its tokenizer has no kind")
    dtype, rows = np.dtype(meta["dtype"]), meta["vocab_size"]
    for split in SPLITS:
        path, tokens, digest = folder / f"{split}.bin", meta["tokens"][split], meta["sha256"][split]
        if not isinstance(meta["bytes"][split], int) or not isinstance(rows, int):
            raise ValueError("its bytes and its vocab_size must be whole numbers")
        size = path.stat().st_size
        if size != tokens * dtype.itemsize:
            raise ValueError(f"{path.name} has {size} bytes, not {tokens} tokens of {dtype}")
        if deep and sha256(path) != digest:
            raise ValueError(f"{path.name} has another sha256")
        if deep and np.memmap(path, dtype, "r").max() >= rows:
            raise ValueError(f"{path.name} holds ids above {rows - 1}, vocab_size is {rows}")


def open_data(cfg):
    """
    {"meta", "train", "val"} of the data set: the contents of meta.json, and the token ids of each
    split, mapped into memory. Raises UserError if they do not fit the model.
    """
    folder = Path(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
    if meta["vocab_size"] > cfg.vocab_size:
        fail(f"vocab_size={cfg.vocab_size}: {folder} has {meta['vocab_size']} tokens; leave "
             f"vocab_size out, or make it at least that")
    data = {"meta": meta}
    for split, count in meta["tokens"].items():
        if count <= cfg.block_size:
            fail(f"{folder / split}.bin holds {count} tokens: block_size={cfg.block_size} needs at "
                 f"least {cfg.block_size + 1}; use a smaller --block_size or more text")
        data[split] = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
    return data


def table_rows(meta):
    """The rows of a token table: one per token, but 50304 for GPT-2's 50257, as in nanoGPT, since
    products are faster at a multiple of 64."""
    return 50304 if meta["vocab_size"] == 50257 else meta["vocab_size"]


# ---- nanoGPT's data sets -------------------------------------------------------------------------

class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and text. A pickle can call any function; here it calls none."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it calls for {module}.{name}")


def adopt(folder):
    """Write the meta.json of a data set that nanoGPT has prepared: its .bin files and meta.pkl."""
    dtype, spec = np.dtype("uint16"), {"kind": "gpt2"}
    for path in (folder / f"{split}.bin" for split in SPLITS):
        if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % dtype.itemsize:
            fail(f"{path.absolute()} is missing or not nanoGPT's: it holds ids in {dtype}")
    if (folder / "meta.json").exists():
        fail(f"{folder} has a meta.json already: nothing to adopt")
    path = folder / "meta.pkl"
    # nanoGPT's data sets in GPT-2's tokens have none.
    if path.exists():
        try:
            itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
            spec = {"kind": "char", "alphabet": "".join(itos[i] for i in range(len(itos)))}
            if len(spec["alphabet"]) != len(itos):
                raise ValueError("its tokens are not single characters")
        # A damaged pickle may raise anything.
        except Exception as error:
            fail(f"{path} is not nanoGPT's ({type(error).__name__}: {error}), and only dicts of "
                 "numbers and text are read: prepare the text again, with --input=PATH")
    elif max(np.memmap(folder / f"{split}.bin", dtype).max() for split in SPLITS) < 256:
        fail(f"{folder} has ids below 256 only, as of characters, and no meta.pkl that names them: "
             "put nanoGPT's there, or prepare the text again, with --input=PATH")
    try:
        write_meta(folder, Tokenizer(spec), dtype,
                   {"name": folder.name, "files": ["train.bin", "val.bin"]})
    except IndexError as error:
        owner = "meta.pkl" if spec["kind"] == "char" else "GPT-2 (without a meta.pkl)"
        fail(f"{folder} holds ids that {owner} lacks ({error}): prepare the text again, with "
             "--input=PATH")
