"""
Texts out of files: READERS has a way to read each kind, by its suffix, whatever its case and after
that of a compression. REFUSED has the kinds that another program must turn into text first. A file
of any other suffix is plain text.

The readers take `config`, the settings of prepare_data.py, for its column and encoding, and call
watch(number of bytes), if it is given, after each piece that was read from the disk.
"""
import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import zlib
from contextlib import contextmanager
from typing import NamedTuple

from nanodva.errors import UserError, fail
from nanodva.tokenizer import END_OF_TEXT

# About how many characters are read at a time, which bounds the memory.
PIECE = 2**18
# If documents in a .txt are separated by nothing else, then by such lines, as in TinyStories.
END_LINE = f"\n{END_OF_TEXT}\n"
OPEN_PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
REFUSED = {
    ".zip": "unpack it: unzip {}", ".zst": "unpack it: zstd -d {}", ".7z": "unpack it: 7z x {}",
    ".rar": "unpack it: unrar x {}",
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz"), "unpack it: tar -xf {}"),
    ".pdf": "take the text out: pdftotext {} mine.txt",
    **dict.fromkeys((".docx", ".odt", ".rtf", ".epub"),
                    "take the text out: pandoc {} -t plain -o mine.txt"),
    ".doc": "save it as plain text in the program that wrote it",
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save it as CSV in the program that wrote it"),
    ".arrow": "write it as JSON lines: datasets.load_from_disk(FOLDER).to_json('mine.jsonl')"}
# What a file is by its first bytes, for one whose suffix says nothing or something else.
FIRST_BYTES = {b"\x1f\x8b\x08": ".gz", b"BZh91AY&SY": ".bz2", b"\xfd7zXZ\0": ".xz",
               b"PAR1": ".parquet", b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst",
               b"7z\xbc\xaf": ".7z", b"Rar!\x1a": ".rar", b"%PDF-": ".pdf",
               b"\xd0\xcf\x11\xe0": ".doc"}
# Byte-order marks. UTF-32's begins with UTF-16's.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}


class Source(NamedTuple):
    """A file to read, such as ("a/b.jsonl.GZ", ".jsonl", ".gz"). compression may be empty."""
    path: str
    kind: str
    compression: str

    @property
    def reader(self):
        return READERS.get(self.kind, read_plain)


def by_name(path):
    """The Source at a path or an address, by its name alone."""
    stem, last = os.path.splitext(path.lower())
    if last in OPEN_PACKED:
        return Source(path, os.path.splitext(stem)[1], last)
    return Source(path, last, "")


def by_content(path):
    """The Source at a path, by its name or else its first bytes. UserError for a REFUSED one."""
    source = by_name(path)
    if source.kind not in READERS | REFUSED and not source.compression:
        with reading(source), open(path, "rb") as file:
            source = source._replace(kind=by_first_bytes(file.read(16)) or source.kind)
    if source.kind in OPEN_PACKED:
        source = source._replace(compression=source.kind)
    check_kind(path, source.kind)
    return source


def by_first_bytes(head):
    """The suffix that a file should have that begins with the bytes `head`, or an empty text."""
    return next((FIRST_BYTES[start] for start in FIRST_BYTES if head.startswith(start)), "")


def check_kind(path, kind):
    """Raise UserError, with the way out, for a file of a kind in REFUSED."""
    if kind in REFUSED:
        fail(f"{path} is not read as it is: {REFUSED[kind].format(shlex.quote(path))}")


def read_texts(source, config, watch=None, separator=""):
    """
    Yield each document of a Source as a string: all of a .txt, or what stands between separators
    if one is given, or the text of a row.
    """
    if source.reader is read_plain:
        yield from read_plain(source, config, watch, separator)
        return
    with reading(source, config):
        for text in source.reader(source, config, watch):
            # A byte-order mark is no part of a text. Half of a surrogate pair, which JSON can
            # spell, has no UTF-8 and becomes a question mark.
            text = plain_lines(text.removeprefix("\ufeff"))
            yield text if text.isascii() else text.encode(errors="replace").decode()


# ---- bytes and characters ------------------------------------------------------------------------

class WatchedFile(io.FileIO):
    """A file that tells watch() how many bytes were read, each time."""
    watch = None

    def readinto(self, buffer):
        count = super().readinto(buffer)
        if self.watch:
            self.watch(count)
        return count


@contextmanager
def open_bytes(source, watch=None):
    """A source, unpacked if it is compressed."""
    raw = WatchedFile(source.path)
    raw.watch = watch
    with io.BufferedReader(raw, 2**17) as file:
        compression = source.compression or by_first_bytes(file.peek(16))
        check_kind(source.path, compression)
        yield OPEN_PACKED[compression](file) if compression in OPEN_PACKED else file


@contextmanager
def open_text(source, config, watch=None, newline=None):
    """A source as text. Its line ends become \\n, or with newline="" stay as they are."""
    with reading(source, config), open_bytes(source, watch) as file:
        head = file.peek(4096)[:4096]
        encoding = encoding_of(head, config.encoding)
        if encoding == "utf-8" and head.count(0) > len(head) // 8:
            fail(f"{source.path} is full of zero bytes: either it is text in UTF-16, which "
                 "--encoding=utf-16-le reads, or no text at all")
        yield io.TextIOWrapper(file, encoding, newline=newline)


def encoding_of(head, given=""):
    """The encoding of a text that begins with the bytes `head`: its mark's, or what was given."""
    marked = [encoding for mark, encoding in MARKS.items() if head.startswith(mark)]
    return marked[0] if marked else given or "utf-8"


def characters(file, count=float("inf")):
    """Yield the next `count` characters of an open text, in pieces."""
    while count > 0:
        wanted = min(count, PIECE)
        piece = file.read(wanted)
        if piece:
            yield piece
        # A shorter piece is the last one
        count = count - len(piece) if len(piece) == wanted else 0


def decode_text(data, name):
    """The text in bytes, by the rules for a .txt file; errors call them `name`."""
    encoding = encoding_of(data)
    try:
        return plain_lines(data.decode(encoding))
    except UnicodeDecodeError:
        fail(f"{wrong_byte(io.BytesIO(data), name, encoding)}; save it in UTF-8")


def plain_lines(text):
    """The text with \\n for the line ends of Windows and of old Macs."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


@contextmanager
def reading(source, config=None):
    """Whatever the disk or a damaged file causes inside becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError:
        with open_bytes(source) as file:
            found = wrong_byte(file, source.path, encoding_of(file.peek(4), config.encoding))
        fail(f"{found}; if this is text, give its encoding, such as --encoding=latin-1, cp1252 or "
             "utf-16")
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        fail(f"cannot read {source.path}: {type(error).__name__}: {str(error)[:200]}")


def wrong_byte(file, name, encoding):
    """Where an open file has its first byte that the encoding does not allow, in words."""
    decoder = codecs.getincrementaldecoder(encoding)()
    position, line = 0, 1
    while True:
        data = file.read(PIECE)
        try:
            decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # error.object begins with what the decoder kept of the data before.
            start = error.start - (len(error.object) - len(data))
            line += data.count(b"\n", 0, max(start, 0))
            wanted = "UTF-8" if encoding.startswith("utf-8") else encoding
            return (f"line {line:,} of {name} is not {wanted}: byte {error.object[error.start]:#x} "
                    f"at position {position + start:,}")
        position, line = position + len(data), line + data.count(b"\n")


# ---- one reader for each kind --------------------------------------------------------------------

def read_plain(source, config, watch, separator):
    with open_text(source, config, watch) as file:
        if not separator:
            yield "".join(characters(file))
            return
        for number, text in enumerate(split(characters(file), separator)):
            if separator == END_LINE:
                # The file may begin or end with such a line, and one may follow another.
                while text.startswith(END_LINE[1:]):
                    text = text.removeprefix(END_LINE[1:])
                text = "" if text == END_OF_TEXT else text.removesuffix(END_LINE[:-1])
            if text or number == 0:
                yield text


def split(pieces, separator):
    """Yield the texts between the separators in a text that comes in pieces."""
    held, reach = [""], len(separator)
    for piece in pieces:
        # A separator may begin in the piece before.
        *texts, rest = (held.pop() + piece).split(separator)
        for text in texts:
            yield "".join([*held, text])
            held = []
        held += [rest[:-reach], rest[-reach:]]
    yield "".join(held)


def read_json(source, config, watch):
    """The text of each object: one on every line, or all in one array, or one after the other."""
    with open_text(source, config, watch, newline="\n") as file:
        for place, row in json_rows(file, source.path):
            value = row.get(config.column) if isinstance(row, dict) else None
            if not isinstance(value, str):
                if not isinstance(row, dict):
                    fail(f"{place} of {source.path} is no JSON object")
                check_column(f"{place} of {source.path}", config.column, row, value)
            yield value or ""


def json_rows(file, path):
    """Yield ("line 3" or "object 3", value) of an open text, which is never held as a whole."""
    head, line = file.read(1), 1
    while head.isspace():
        line += head == "\n"
        head = file.read(1)
    # An array may be one line.
    text = head if head == "[" else head + file.readline()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        yield from json_values(text, file, path)
        return
    for number, row in enumerate(itertools.chain([text], file), start=line):
        if row.strip():
            try:
                yield f"line {number:,}", json.loads(row)
            except (ValueError, RecursionError) as error:
                fail(f"line {number:,} of {path}: {error}")


def json_values(text, file, path):
    """json_rows() of values that need several lines; `text` is what was read of the file so far."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    position, number, depth = 0, 0, 0
    while True:
        gap = between.match(text, position)
        try:
            row, end = decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            text, position = text[position:], 0
            more = file.read(max(PIECE, len(text)))
            if more:
                text += more
                continue
            depth += gap[0].count("[") - gap[0].count("]")
            if gap[0] != text or depth != 0:
                fail(f"cannot read object {number + 1:,} of {path}: {error}; is the file whole?")
            return
        depth += gap[0].count("[") - gap[0].count("]")
        position, number = end, number + 1
        yield f"object {number:,}", row


def read_csv(source, config, watch, delimiter=""):
    """The text of each row but the first, which names the columns."""
    # A field may be as long as a book.
    csv.field_size_limit(2**31 - 1)
    with open_text(source, config, watch, newline="") as file:
        head = file.readline()
        # Where the comma is for decimals, spreadsheets write semicolons.
        delimiter = delimiter or max(",;\t", key=head.count)
        rows = csv.reader(itertools.chain([head], file), delimiter=delimiter, strict=True)
        try:
            columns = [name.strip() for name in next(filter(None, rows), [config.column])]
            check_column(source.path, config.column, columns)
            index = columns.index(config.column)
            for row in rows:
                if 0 < len(row) <= index or any(row[len(columns):]):
                    fail(f"line {rows.line_num:,} of {source.path} has {len(row)} columns, and the "
                         f"first {len(columns)}: a text that holds {delimiter!r} stands in quotes")
                if row:
                    yield row[index]
        except csv.Error as error:
            fail(f"line {rows.line_num:,} of {source.path}: {error}; a text that holds quotes "
                 'stands in quotes, and each of its own is doubled: ""')


def read_tsv(source, config, watch):
    return read_csv(source, config, watch, delimiter="\t")


def read_parquet(source, config, watch):
    """The text of each row."""
    import pyarrow.parquet
    with open_bytes(source, watch) as file:
        try:
            # Without these settings pyarrow reads whole row groups, and many files have only one.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            columns = table.schema_arrow.names
            check_column(source.path, config.column, columns)
            for rows in table.iter_batches(batch_size=64, columns=[config.column]):
                for value in rows.column(0).to_pylist():
                    if not isinstance(value, str):
                        check_column(source.path, config.column, columns, value)
                    yield value or ""
        except pyarrow.ArrowException as error:
            fail(f"cannot read {source.path}: {type(error).__name__}: {str(error)[:200]}")


def check_column(where, column, columns, value=None):
    """Raise UserError if there is no such column, or if its value is neither text nor null."""
    others = " ".join(name for name in columns if name != column)
    choose = f"choose with --column= from {others}" if others else "it has no other"
    if column not in columns:
        fail(f"{where} has no column {column!r}: {choose}")
    if value is not None and not isinstance(value, str):
        fail(f"column {column!r} of {where} is no text but {repr(value)[:40]}: {choose}; a text "
             f"stands in quotes")


READERS = {".txt": read_plain, ".text": read_plain, ".jsonl": read_json, ".ndjson": read_json,
           ".json": read_json, ".csv": read_csv, ".tsv": read_tsv, ".parquet": read_parquet}
