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
import os
import re
import zlib
from contextlib import contextmanager
from typing import NamedTuple

from nanodva.errors import UserError, fail
from nanodva.tokenizer import END_OF_TEXT

# About how many characters are read at a time, which bounds the memory, and the most in one object
PIECE, LONGEST = 2**18, 2**28
# Such a line separates documents in a .txt, as in TinyStories.
END_LINE = f"\n{END_OF_TEXT}\n"
# Compressed files are known by their first bytes, whatever they are called.
OPEN_PACKED = {b"\x1f\x8b\x08": gzip.open, b"\xfd7zXZ\0": lzma.open}
# UTF-32's byte-order mark begins with UTF-16's.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}
# PDF, RTF and ZIP, which is also what .docx, .odt, .epub and .xlsx are
NO_TEXT = (b"%PDF-", b"{\\rtf", b"PK\x03\x04")
WAY_OUT = ("if it is text, name its encoding, such as --encoding=latin-1, cp1252 or utf-16-le; "
           "else make text of it first: pdftotext reads a PDF, pandoc other documents, and unzip, "
           "tar -xf, bunzip2 or zstd -d unpack archives")


class Source(NamedTuple):
    """A file to read and its kind, such as ("a/b.jsonl.GZ", ".jsonl")."""
    path: str
    kind: str

    @property
    def reader(self):
        return READERS.get(self.kind, read_plain)


def by_name(path):
    """The Source at a path or an address, by its name alone."""
    stem, suffix = os.path.splitext(path.lower())
    return Source(path, os.path.splitext(stem)[1] if suffix in (".gz", ".xz") else suffix)


def by_content(path):
    """The Source at a path, by its name or, if that says nothing, as Parquet by its first bytes."""
    source = by_name(path)
    with reading(path), open(path, "rb") as file:
        is_parquet = source.kind not in READERS and file.read(4) == b"PAR1"
    return Source(path, ".parquet") if is_parquet else source


def read_texts(source, config, separator=""):
    """
    Yield each document of a Source as a string: all of a plain file, or the text of a row, or, if
    a separator is given, each part of these that is not empty.
    """
    if source.reader is read_plain:
        yield from read_plain(source, config, separator)
        return
    with reading(source.path):
        for text in source.reader(source, config):
            # Without a byte-order mark; half of a surrogate pair, which JSON can spell and UTF-8
            # cannot, becomes a question mark
            text = plain_lines(text.removeprefix("\ufeff")).encode(errors="replace").decode()
            yield from without_empty(text.split(separator)) if separator else [text]


# ---- bytes and characters ------------------------------------------------------------------------

@contextmanager
def reading(path, way_out=WAY_OUT):
    """Any error of the disk or of a damaged file becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 30):error.start + 10]
        fail(f"{path} is not {error.encoding}: byte {error.object[error.start]:#x} in "
             f"{bytes(near)}; {way_out}")
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        fail(f"cannot read {path}: {type(error).__name__}: {str(error)[:200]}")


@contextmanager
def open_bytes(source):
    """A source as a binary file, decompressed if it is compressed."""
    with open(source.path, "rb") as file:
        head = file.peek(8)
        found = [OPEN_PACKED[mark] for mark in OPEN_PACKED if head.startswith(mark)]
        yield found[0](file) if found else file


@contextmanager
def open_text(source, config, newline=None):
    """A source as text. Its line ends become \\n; with newline="" they stay as they are."""
    with reading(source.path), open_bytes(source) as file:
        head = file.peek(4096)[:4096]
        encoding = encoding_of(head, config.encoding)
        is_zeros = encoding == "utf-8" and head.count(0) > len(head) // 8
        if is_zeros or head.startswith(NO_TEXT) or head[257:262] == b"ustar":
            fail(f"{source.path} is not plain {encoding} text: it begins {head[:20]}; {WAY_OUT}")
        yield io.TextIOWrapper(file, encoding, newline=newline)


def encoding_of(head, given=""):
    """The encoding of a text that begins with the bytes `head`: its mark's, or what was given."""
    marked = [encoding for mark, encoding in MARKS.items() if head.startswith(mark)]
    return marked[0] if marked else given or "utf-8"


def characters(file, count=float("inf")):
    """Yield the next `count` characters of an open text, in pieces."""
    while count > 0:
        piece = file.read(min(count, PIECE))
        if not piece:
            return
        yield piece
        count -= len(piece)


def decode_text(data, name):
    """The text in bytes, by the rules for a .txt file; errors call them `name`."""
    with reading(name, "save it in UTF-8"):
        return plain_lines(data.decode(encoding_of(data)))


def plain_lines(text):
    """The text with \\n for the line ends of Windows and of old Macs."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


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
    text = None
    for text in filter(None, texts):
        yield text
    if text is None:
        yield ""


# ---- one reader for each kind --------------------------------------------------------------------

def read_plain(source, config, separator):
    with open_text(source, config) as file:
        texts = split(characters(file), separator) if separator else [file.read()]
        yield from without_empty(map(without_marks, texts) if separator == END_LINE else texts)


def read_json(source, config):
    """The text of each object: one on every line, or all in one array, or one after the other."""
    with open_text(source, config) as file:
        for number, row in json_values(file, source.path):
            place = f"object {number:,} of {source.path}"
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
            if more:
                text += more
                continue
            if text or depth != 0:
                fail(f"object {number + 1:,} of {path} is broken or cut off ({error}): it begins "
                     f"{text[:40]!r}")
            return
        number += 1
        yield number, row


def read_csv(source, config):
    """The text of each row but the first, which names the columns."""
    # A field may be as long as a book.
    csv.field_size_limit(2**31 - 1)
    with open_text(source, config, newline="") as file:
        head, is_tsv = file.readline(), source.kind == ".tsv"
        # Spreadsheets write semicolons if the comma is for decimals.
        delimiter = "\t" if is_tsv else max(",;\t", key=head.count)
        table = csv.reader(itertools.chain([head], file), delimiter=delimiter, strict=True,
                           quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL)
        try:
            columns = [name.strip() for name in next(filter(None, table), [config.column])]
            text_in(dict.fromkeys(columns), config.column, source.path)
            index = columns.index(config.column)
            for row in table:
                if 0 < len(row) <= index or any(row[len(columns):]):
                    raise csv.Error(f"{len(row)} columns, and the first line has {len(columns)}")
                if row:
                    yield row[index]
        except csv.Error as error:
            fail(f"line {table.line_num:,} of {source.path}: {error}; in a .csv put a text that "
                 f"holds {delimiter!r}, quotes or line ends into quotes and double its own; in a "
                 ".tsv a row is one line and a quote is a quote")


def read_parquet(source, config):
    """The text of each row."""
    import pyarrow.parquet
    with open_bytes(source) as file:
        try:
            # Without these settings pyarrow reads whole row groups, and many files have only one.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            row = dict.fromkeys(table.schema_arrow.names)
            text_in(row, config.column, source.path)
            for batch in table.iter_batches(batch_size=64, columns=[config.column]):
                for value in batch.column(0).to_pylist():
                    yield text_in(row | {config.column: value}, config.column, source.path)
        except pyarrow.ArrowException as error:
            fail(f"cannot read {source.path}: {type(error).__name__}: {str(error)[:200]}")


def text_in(row, column, place):
    """The text in a row, a dict; null is "". Raises UserError for another value or none."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    others = " ".join(name for name in row if name != column)
    choose = f"choose with --column= from {others}" if others else "it has no other"
    if column not in row:
        fail(f"{place} has no column {column!r}: {choose}")
    if value is not None:
        fail(f"column {column!r} of {place} is no text but {repr(value)[:40]}: {choose}; JSON puts "
             "a text in quotes")
    return ""


READERS = {**dict.fromkeys((".txt", ".text", ".md", ".markdown"), read_plain),
           **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json),
           ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
