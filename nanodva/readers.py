"""
Texts from files. READERS has a reader for each kind of file, by its suffix; any other file is plain
text. The readers take `config`, the settings of prepare_data.py, for its column and encoding.
"""
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import os
import re
import zlib
from contextlib import contextmanager

from nanodva.errors import fail
from nanodva.tokenizer import END_OF_TEXT

# About how many characters are read at a time, which bounds the memory, and the most in one object
PIECE, LONGEST = 2**18, 2**28
# Such a line separates documents in a .txt, as in TinyStories.
END_LINE = f"\n{END_OF_TEXT}\n"
# Compressed files are known by their first bytes, whatever they are called.
OPEN_PACKED = {b"\x1f\x8b\x08": gzip.open, b"\xfd7zXZ\0": lzma.open}
# A byte-order mark tells the encoding. UTF-32's begins with UTF-16's.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}
WAY_OUT = ("if it is text, name its encoding, such as --encoding=latin-1, cp1252 or utf-16-le; "
           "else make text of it first: pdftotext reads a PDF, pandoc other documents, and unzip, "
           "tar -xf, bunzip2 or zstd -d unpack archives")


def suffix_of(path):
    """The suffix of a file's name: .jsonl of a/b.JSONL.gz, too."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in (".gz", ".xz") else suffix


def reader_of(path):
    """The reader for a file, by its suffix or, for Parquet that lacks one, by its first bytes."""
    reader = READERS.get(suffix_of(path), read_plain)
    if reader is read_plain and not path.startswith("hf:"):
        with reading(path), open(path, "rb") as file:
            reader = read_parquet if file.read(4) == b"PAR1" else read_plain
    return reader


def read_texts(path, config, separator=""):
    """
    Yield each document of a file as a string: all of a plain file, or the text of a row, or, if
    a separator is given, each part of these that is not empty.
    """
    reader = reader_of(path)
    if reader is read_plain:
        yield from read_plain(path, config, separator)
        return
    for text in reader(path, config):
        # Without a byte-order mark; half of a surrogate pair, which JSON can spell and UTF-8
        # cannot, becomes a question mark
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        text = text.encode(errors="replace").decode()
        yield from without_empty(text.split(separator)) if separator else [text]


# ---- bytes and characters ------------------------------------------------------------------------

@contextmanager
def reading(path, way_out=WAY_OUT):
    """Any error of the disk or of a damaged file becomes a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 30):error.start + 10]
        fail(f"{path} is not {error.encoding}: byte {error.object[error.start]:#x} in "
             f"{bytes(near)}; {way_out}")
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        fail(f"cannot read {path}: {type(error).__name__}: {str(error)[:200]}")


@contextmanager
def fetching(source):
    """Whatever the hub, or the way to it, reports inside becomes a UserError."""
    try:
        yield
    except Exception as error:
        fail(f"{source}: huggingface.co does not give it ({type(error).__name__}: "
             f"{str(error)[:300]}): check hf:REPO:CONFIGURATION@REVISION, or start again later, "
             "since what has arrived is kept; or give files of it with --input=PATH")


@contextmanager
def open_bytes(path):
    """A file, which is downloaded if it lies on the hub, as bytes: decompressed if it is packed."""
    local = path
    if path.startswith("hf:"):
        with fetching(path):
            import datasets
            # The file goes to the hub's own cache; a download that was cut off continues.
            local = datasets.DownloadManager().download(path)
    with reading(path), open(local, "rb") as file:
        head = file.peek(8)
        found = [OPEN_PACKED[mark] for mark in OPEN_PACKED if head.startswith(mark)]
        yield found[0](file) if found else file


@contextmanager
def open_text(path, config, newline=None):
    """A file as text. Its line ends become \\n; with newline="" they stay as they are."""
    with open_bytes(path) as file:
        head = file.peek(4096)[:4096]
        encoding = encoding_of(head, config.encoding)
        # As in UTF-16, tar and ZIP, which is also what .docx and .epub are
        has_zeros = encoding == "utf-8" and not config.encoding and b"\0" in head
        if has_zeros or head.startswith((b"%PDF-", b"{\\rtf")):
            fail(f"{path} is not plain {encoding} text: it begins {head[:20]}; {WAY_OUT}")
        yield io.TextIOWrapper(file, encoding, newline=newline)


def encoding_of(head, given=""):
    """The encoding of a text that begins with the bytes `head`: its mark's, or what was given."""
    marked = [encoding for mark, encoding in MARKS.items() if head.startswith(mark)]
    return marked[0] if marked else given or "utf-8"


def decode_text(data, name):
    """The text in bytes, by the rules for a .txt file; errors call them `name`."""
    with reading(name, "save it in UTF-8"):
        return io.TextIOWrapper(io.BytesIO(data), encoding_of(data)).read()


def characters(file, count=math.inf):
    """Yield the next `count` characters of an open text, in pieces."""
    while piece := file.read(min(count, PIECE)):
        yield piece
        count -= len(piece)


# ---- documents in a text -------------------------------------------------------------------------

def split(pieces, separator):
    """Yield the texts between the separators in a text that is given in pieces."""
    held, reach = [""], len(separator)
    for piece in pieces:
        # A separator may begin in the piece before.
        *texts, rest = (held.pop() + piece).split(separator)
        for text in texts:
            yield "".join([*held, text])
            held = []
        held += [rest[:-reach], rest[-reach:]]
    yield "".join(held)


def without_marks(text):
    """A text between two END_LINEs, without others that share a line end with one of these."""
    while text.startswith(END_LINE[1:]):
        text = text.removeprefix(END_LINE[1:])
    return "" if text == END_OF_TEXT else text.removesuffix(END_LINE[:-1])


def without_empty(texts):
    """The texts that are not empty; one empty text if all are."""
    texts = filter(None, texts)
    yield next(texts, "")
    yield from texts


# ---- one reader for each kind --------------------------------------------------------------------

def read_plain(path, config, separator):
    with open_text(path, config) as file:
        texts = split(characters(file), separator) if separator else [file.read()]
        yield from without_empty(map(without_marks, texts) if separator == END_LINE else texts)


def has_separator(path, config):
    """Whether config.separator occurs in a plain file."""
    with open_text(path, config) as file:
        return len(list(itertools.islice(split(characters(file), config.separator), 2))) == 2


def read_json(path, config):
    """The text of each object: one on every line, or all in one array, or one after the other."""
    with open_text(path, config) as file:
        for number, row in json_values(file, path):
            place = f"object {number:,} of {path}"
            if not isinstance(row, dict):
                fail(f"{place} is no JSON object")
            yield text_in(row, config.column, place)


def json_values(file, path):
    """Yield (number, value) of an open text, which is never held as a whole."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    text, position, number, depth = "", 0, 0, 0
    while True:
        gap = between.match(text, position)
        depth, position = depth + gap[0].count("[") - gap[0].count("]"), gap.end()
        try:
            row, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            text, position = text[position:], 0
            # The object may go on. Without an end a broken line would be all that follows it.
            more = file.read(max(PIECE, len(text))) if len(text) < LONGEST else ""
            if not more and (text or depth != 0):
                fail(f"object {number + 1:,} of {path} is broken or cut off ({error}): it begins "
                     f"{text[:40]!r}")
            if not more:
                return
            text += more
        else:
            number += 1
            yield number, row


def read_csv(path, config):
    """The text of each row but the first, which names the columns."""
    # A field may be as long as a book.
    csv.field_size_limit(2**31 - 1)
    with open_text(path, config, newline="") as file:
        head, is_tsv = file.readline(), suffix_of(path) == ".tsv"
        # Spreadsheets write semicolons if the comma is for decimals.
        delimiter = "\t" if is_tsv else max(",;\t", key=head.count)
        table = csv.DictReader(itertools.chain([head], file), delimiter=delimiter, strict=True,
                               quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL)
        try:
            table.fieldnames = [name.strip() for name in table.fieldnames or []]
            for row in table:
                # DictReader has extra fields under the key None, and None for missing ones
                if any(row.pop(None, [])) or row.get(config.column, "") is None:
                    raise csv.Error("it has more or fewer columns than the first line")
                yield text_in(row, config.column, path)
        except csv.Error as error:
            fail(f"line {table.reader.line_num:,} of {path}: {error}; in a .csv put a text that "
                 f"holds {delimiter!r}, quotes or line ends into quotes and double its own; in a "
                 ".tsv a row is one line and a quote is a quote")


def read_parquet(path, config):
    """The text of each row."""
    import pyarrow.parquet
    with open_bytes(path) as file:
        try:
            # Without these settings pyarrow reads whole row groups, and many files have only one.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            row = dict.fromkeys(table.schema_arrow.names)
            text_in(row, config.column, path)
            for batch in table.iter_batches(batch_size=64, columns=[config.column]):
                for value in batch.column(0).to_pylist():
                    yield text_in(row | {config.column: value}, config.column, path)
        except pyarrow.ArrowException as error:
            fail(f"cannot read {path}: {type(error).__name__}: {str(error)[:200]}")


def text_in(row, column, place):
    """The text in a row, a dict; null is "". Raises UserError for another value or none."""
    if not isinstance(row.get(column, 0), str | None):
        found = repr(row[column])[:40] if column in row else "absent"
        fail(f"{place} has no text in column {column!r}, which is {found}: choose with --column= "
             f"from {' '.join(row)}; JSON puts a text in quotes")
    return row[column] or ""


READERS = {**dict.fromkeys((".txt", ".text", ".md", ".markdown"), read_plain),
           **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json),
           ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
