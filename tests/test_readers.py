"""readers.py: files of each kind, as programs write them, broken ones too."""
import codecs
import gzip
import io
import json
import lzma

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from nanodva import readers
from nanodva.readers import END_LINE, decode_text, json_values, read_texts, split
from prepare_data import PrepareConfig


@pytest.fixture
def read(tmp_path):
    """read(name, data, separator, **settings): the documents in a file with this name and data."""
    def read(name, data, separator="", **settings):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return list(read_texts(str(path), PrepareConfig("x_char", "-", **settings), separator))
    return read


# How archives begin
ZIP, TAR = b"PK\x03\x04\x14\0", b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + b"text " * 99


# ---- tables and objects --------------------------------------------------------------------------

TABLE = 'title,text\r\nt0,"First Citizen:\r\n""Speak, speak."""\r\n\r\nt1,\r\nt2,plain\r\n'
TEXTS = ['First Citizen:\n"Speak, speak."', "", "plain"]


@pytest.mark.parametrize("name, table, column, texts", [
    ("a.csv", TABLE, "text", TEXTS), ("A.CSV", "\ufeff" + TABLE, "text", TEXTS),
    ("a.csv", TABLE, "title", ["t0", "t1", "t2"]),
    # With tabs between its columns, as spreadsheets write it
    ("a.csv", TABLE.replace(",", "\t").replace("Speak\t", "Speak,"), "text", TEXTS),
    # Semicolons if the comma is for decimals
    ("a.csv", "n;text\n1,5;a, b\n", "text", ["a, b"]),
    ("a.csv", f'text\n"{"word, " * 100_000}"\n', "text", ["word, " * 100_000]),
    ("a.csv", "", "text", []), ("a.csv", "text\n", "text", []),
    # In a .tsv a quote is a quote, at either end of a text and between
    ("a.tsv", 'n\ttext\n1\t"Ay, me!\n2\tsaid Juliet"\n3\t""\n', "text",
     ['"Ay, me!', 'said Juliet"', '""']),
    ("a.TSV", "text\r\na \\t b\r\n\r\nit's 5\"\r\n", "text", ["a \\t b", "it's 5\""]),
    ("a.tsv.gz", gzip.compress(b'text\tlabel\n"\t1\n"\t0\n', mtime=0), "text", ['"', '"'])])
def test_a_table_has_one_document_a_row(read, name, table, column, texts):
    assert read(name, table, column=column) == texts


def test_json_comes_in_lines_in_an_array_or_one_after_another(read, monkeypatch):
    texts = ["a [b], {c}", "Fi\r\nrst \"line\"", "", "[漢]", "\u2028x"]
    rows = [{"n": {"text": 1}, "text": text, "more": [1, [2]]} for text in texts]
    # A byte-order mark in front of a text is no part of it
    rows[0]["text"] = "\ufeff" + rows[0]["text"]
    expected = [text.replace("\r\n", "\n") for text in texts]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = {"a.jsonl": lines, "a.NDJSON": "\ufeff\n" + lines, "lines.json": lines,
             "one.json": json.dumps(rows), "pretty.json": "\n" + json.dumps(rows, indent=4) + "\n",
             "jq.json": "\n".join(json.dumps(row, indent=2) for row in rows)}
    for piece in (1, 7, readers.PIECE):
        # Each value is cut at every place when so little is read at a time
        monkeypatch.setattr(readers, "PIECE", piece)
        for name, data in files.items():
            assert read(name, data) == expected
    assert read("null.json", '[{"text": null}]') == [""]
    assert read("empty.json", "[]") == read("empty.jsonl", "\n") == []
    # Half of a surrogate pair has no UTF-8
    half = '{"text": "half \\ud83d, whole \\ud83d\\ude42"}'
    assert read("a.jsonl", half) == ["half ?, whole 🙂"]


@pytest.mark.parametrize("name, data, words", [
    ("a.csv", "n,text\n1,a\n2,b, c\n", "line 3 of"), ("a.csv", "n,text\n1,a\n2\n", "line 3 of"),
    ("a.csv", 'n,text\n1,"a" b\n', "line 2 of"), ("a.csv", 'n,text\n1,a\n2,"b\n', "line 3 of"),
    ("a.csv", "n,body\n1,a\n", "which is absent: choose with --column= from n body"),
    ("a.tsv", 'n\ttext\n1\t"a\nb"\n', "line 3 of ... in a .tsv a row is one line and a quote"),
    ("a.json", '[{"text": "a"}, {"text": "b"', "object 2 of"),
    ("a.json", '[{"text": "a"}, {"text": "b"}', "object 3 of ... cut off"),
    ("a.json", '{"rows": [\n{"text": "a"}]}', "which is absent: choose with --column= from rows"),
    ("a.json", '["a"]', "object 1 of ... is no JSON object"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "bc"\n{"text": "d"}\n', "object 2 of"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "bc"\n', """it begins '{"text": "bc"\\n'"""),
    ("a.jsonl", '{"text": "a"}\n["text"]\n', "object 2 of"),
    ("a.jsonl", '{"text": "a"}\n{"text": [5], "n": 1, "body": ""}\n',
     "no text in column 'text', which is [5]: choose with --column= from text n body"),
    ("a.jsonl", '{"text": 5}\n', "which is 5: ... from text; JSON puts a text in quotes"),
    ("a.jsonl", '{}\n', "no text in column 'text', which is absent"),
    ("a.jsonl", "[" * 100_000, "object 1 of")])
def test_broken_tables_and_objects_are_refused_with_the_place(read, name, data, words):
    with refused(*words.split(" ... ")):
        read(name, data)


def test_a_broken_line_is_not_read_as_all_that_follows(monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 100)
    monkeypatch.setattr(readers, "LONGEST", 1000)
    file = io.StringIO('{"text": "a"}\n{"text": "b\n' + '{"text": "c"}\n' * 10_000)
    with refused("object 2 of a.jsonl"):
        list(json_values(file, "a.jsonl"))
    assert file.tell() < 3000


def test_broken_parquet_is_refused(read, speeches):
    shard = (speeches[0] / "parquet" / "00.parquet").read_bytes()
    absent = "is absent: choose with --column= from n text"
    for name, data, column, words in [
            # Known by its first bytes, too
            ("a.parquet", shard, "body", absent), ("download", shard, "body", absent),
            ("a.parquet", shard, "n", "column 'n', which is 0"),
            ("a.parquet", shard[:1000], "text", "cannot read"),
            ("a.parquet", shard[:4000] + bytes(400) + shard[4400:], "text", "snappy")]:
        with refused(name, words):
            read(name, data, column=column)


# ---- packed files, and files that are no text ----------------------------------------------------

@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_packed_files_are_known_by_their_first_bytes(read, pack, suffix):
    data = pack("ein Wörtchen\r\n".encode())
    for name in ("a.txt" + suffix, "A.TXT" + suffix.upper(), "a.txt", "a", "a.text.1"):
        assert read(name, data) == ["ein Wörtchen\n"]
    assert read("a.jsonl" + suffix, pack(b'{"text": "a"}')) == ["a"]
    # Browsers unpack what they download and leave it its name
    assert read("a.txt" + suffix, "plain") == ["plain"]
    with refused("cannot read", suffix):
        read("cut.txt" + suffix, data[:-9])


@pytest.mark.parametrize("name, data, way", [
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\n", "pdftotext"), ("a.txt", b"%PDF-1.1 ascii", "pdftotext"),
    ("a.rtf", rb"{\rtf1\ansi a letter}", "pandoc"),
    ("a.docx", ZIP, "pandoc"), ("download", ZIP, "unzip"),
    ("a.tar", TAR, "tar -xf"), ("a.tar.gz", gzip.compress(TAR, mtime=0), "tar -xf"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00", "zstd -d"),
    ("a.bz2", b"BZh91AY&SY\x8b\x5e", "bunzip2"), ("photo", b"\xff\xd8\xff\xe0", "is not utf-8"),
    ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "pandoc"),
    # Not taken for ASCII
    ("a.txt", "plain text".encode("utf-16-le"), "utf-16-le")])
def test_what_is_no_text_is_refused_with_the_way_out(read, name, data, way):
    with refused(name, way, "--encoding="):
        read(name, data)


# ---- encodings -----------------------------------------------------------------------------------

TUNE = "T:Café d’été\nK:Fá\n"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "a.tsv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-8"])
def test_another_encoding_is_read_when_it_is_named(read, name, encoding):
    text = TUNE.replace("\n", " ") if name == "a.tsv" else TUNE
    data = {"a.txt": text, "a.csv": f'n,text\n1,"{text}"\n', "a.tsv": f"n\ttext\n1\t{text}\n",
            "a.jsonl": json.dumps({"text": text}, ensure_ascii=False),
            "a.json": json.dumps([{"text": text}], ensure_ascii=False, indent=1)}[name]
    assert read(name, data.encode(encoding), encoding=encoding) == [text]
    if encoding == "cp1252":
        with refused(name, "is not utf-8: byte 0xe9 in b'", "T:Caf\\xe9 d", "--encoding=latin-1"):
            read(name, data.encode(encoding))


@pytest.mark.parametrize("mark, encoding", [
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")])
def test_a_byte_order_mark_tells_the_encoding(read, mark, encoding):
    text = "Grüße 🙂\r\nan alle\rda"
    data = mark + text.encode(encoding)
    assert read("a.txt", data) == [decode_text(data, "prompt")] == ["Grüße 🙂\nan alle\nda"]
    table = mark + 'n,text\r\n1,"a\rb"\r\n'.encode(encoding)
    assert read("a.csv", table) == ["a\nb"]


# ---- documents in one text -----------------------------------------------------------------------

@given(st.text("ab|\n"), st.text("ab|\n", min_size=1, max_size=4), st.integers(1, 5))
def test_a_separator_is_found_however_the_text_is_cut(text, separator, size):
    pieces = [text[i:i + size] for i in range(0, len(text), size)]
    assert list(split(pieces, separator)) == text.split(separator)


@pytest.mark.parametrize("text, documents", [
    ("A\nM\nB\n", ["A", "B\n"]), ("M\nA\nM\nB\nM\n", ["A", "B"]), ("A\nM\nM\nM\nB\nM", ["A", "B"]),
    ("A M\nB", ["A M\nB"]), ("M A\nM\nM B", ["M A", "M B"]), ("A\r\nM\r\nB", ["A", "B"]),
    ("", [""]), ("M", [""]), ("A\n\nM\n\nB", ["A\n", "\nB"])])
def test_a_line_of_end_of_text_separates_documents(read, text, documents):
    """As in TinyStories' files; M stands for the mark."""
    mark = "<|endoftext|>"
    assert read("a.txt", text.replace("M", mark), separator=END_LINE) \
        == [document.replace("M", mark) for document in documents]


@pytest.mark.parametrize("name, data", [
    ("a.txt", "A--B--"), ("a.jsonl", '{"text": "A--B"}\n{"text": "--"}'), ("a.csv", "text\nA--B\n"),
    ("a.tsv", "text\n--A\nB\n")])
def test_a_separator_splits_the_texts_of_every_kind(read, name, data):
    assert [text for text in read(name, data, separator="--") if text] == ["A", "B"]
