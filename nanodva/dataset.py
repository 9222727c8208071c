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

from nanodva.errors import fail, replacing
from nanodva.readers import PIECE
from nanodva.sources import sha256
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
    to val, and of the next one only its last part; equal documents are treated alike.
    """
    tokens, weights, share = Counter(), Counter(), {}
    for split, count in first:
        tokens[split] += count
    found = tokens["val"] / max(1, tokens.total())
    if len(first) > FEW or val_fraction / 2 <= found <= 2 * val_fraction and found < 1:
        return
    import xxhash
    ids, documents = {split: np.fromfile(folder / f"{split}.bin", dtype) for split in SPLITS}, []
    for split, count in first:
        document, ids[split] = ids[split][:count], ids[split][count:]
        number = xxhash.xxh3_64_intdigest(document.tobytes())
        documents.append((number, document))
        weights[number] += count
    wanted = val_fraction * tokens.total()
    for number in sorted(weights):
        share[number] = min(1, wanted / max(1, weights[number]))
        wanted -= share[number] * weights[number]

    def halves():
        for number, document in documents:
            cut = len(document) - round(share[number] * len(document))
            # The first half of a document ends as a whole one does
            ending = end if 0 < cut < len(document) else end[:0]
            yield np.append(document[:cut], ending), "train", 0
            yield document[cut:], "val", 0

    write_ids(halves(), folder, dtype)


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
    another size than meta.json states, and with `deep` also for another sha256.
    """
    folder = Path(folder)
    command = ["python", "prepare_data.py", folder.name, f"--data_dir={folder.parent}"]
    again = (f"run {shlex.join(command)}, with --input=PATH for a text of your own, or with "
             "--adopt for nanoGPT's .bin files")
    path = folder / "meta.json"
    if not path.exists():
        # The whole path, since the user may be in another folder
        fail(f"no {path.absolute()}: {again}")
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != 1:
            raise ValueError(f"its format is {meta['format']!r}, this program's is 1")
        for split, count in meta["tokens"].items():
            path = folder / f"{split}.bin"
            if path.stat().st_size != count * np.dtype(meta["dtype"]).itemsize:
                raise ValueError(f"{path.name} does not hold {count} tokens of {meta['dtype']}")
            if deep and sha256(path) != meta["sha256"][split]:
                raise ValueError(f"{path.name} has another sha256")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        fail(f"{folder} is not what its meta.json describes ({type(error).__name__}: {error}): "
             f"{again}")
    return meta


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
    path, spec = folder / "meta.pkl", {"kind": "gpt2"}
    if (folder / "meta.json").exists():
        fail(f"{folder} has a meta.json already: nothing to adopt")
    try:
        # nanoGPT's data sets in GPT-2's tokens have none
        if path.exists():
            itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
            spec = {"kind": "char", "alphabet": "".join(itos[i] for i in range(len(itos)))}
            if len(spec["alphabet"]) != len(itos):
                raise ValueError("its tokens are not single characters")
        elif max(np.memmap(folder / f"{split}.bin", "uint16").max() for split in SPLITS) < 256:
            raise ValueError("ids below 256 only, as of characters, and no meta.pkl names them")
        write_meta(folder, Tokenizer(spec), np.dtype("uint16"), {"name": folder.name})
    # A damaged pickle may raise anything
    except Exception as error:
        fail(f"{folder} does not hold nanoGPT's train.bin and val.bin of uint16, and a meta.pkl of "
             f"dicts, numbers and text if these are characters ({type(error).__name__}: {error}): "
             "prepare the text again, with --input=PATH")
