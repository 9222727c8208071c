"""readers.py: files of each kind, as programs write them, broken ones too."""
import bz2
import codecs
import gzip
import json
import lzma
import zipfile

import pytest
from conftest import error_of, refused
from hypothesis import given
from hypothesis import strategies as st

from nanodva import readers
from nanodva.readers import END_LINE, REFUSED, by_content, decode_text, read_texts, split
from prepare_data import PrepareConfig


@pytest.fixture
def read(tmp_path):
    """read(name, data, separator, **settings): the documents in a file with this name and data."""
    def read(name, data, separator="", **settings):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return list(read_texts(by_content(str(path)), PrepareConfig("x_char", "-", **settings),
                               separator=separator))
    return read


# ---- tables --------------------------------------------------------------------------------------

def test_csv_has_one_document_a_row(read):
    table = 'title,text\r\nt0,"First Citizen:\r\n""Speak, speak."""\r\n\r\nt1,\r\nt2,plain\r\n'
    texts = ['First Citizen:\n"Speak, speak."', "", "plain"]
    assert read("a.csv", table) == read("A.CSV", "\ufeff" + table) == texts
    assert read("a.csv", table, column="title") == ["t0", "t1", "t2"]
    assert read("a.tsv", table.replace(",", "\t").replace("Speak\t", "Speak,")) == texts
    # Spreadsheets write semicolons where the comma is for decimals
    assert read("a.csv", "n;text\n1,5;a, b\n") == ["a, b"]
    long = "word, " * 100_000
    assert read("a.csv", f'text\n"{long}"\n') == [long]
    assert read("a.csv", "") == read("a.csv", "text\n") == []


@pytest.mark.parametrize("table, words", [
    ("n,text\n1,a\n2,b, c\n", "line 3 of"), ("n,text\n1,a\n2\n", "line 3 of"),
    ('n,text\n1,"a" b\n', "line 2 of"), ('n,text\n1,a\n2,"b\n', "line 3 of"),
    ("n,body\n1,a\n", "no column 'text': choose with --column= from n body")])
def test_a_broken_csv_is_refused_with_the_place(read, table, words):
    with refused(words):
        read("a.csv", table)


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


@pytest.mark.parametrize("name, data, words", [
    ("a.json", '[{"text": "a"}, {"text": "b"', "object 2 of"),
    ("a.json", '[{"text": "a"}, {"text": "b"}', "is the file whole?"),
    ("a.json", '{"rows": [\n{"text": "a"}]}', "no column 'text': choose with --column= from rows"),
    ("a.json", '["a"]', "object 1 of"), ("a.json", '["a"]', "is no JSON object"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "line 3 of"),
    ("a.jsonl", '{"text": "a"}\n["text"]\n', "line 2 of"),
    ("a.jsonl", '{"text": "a"}\n{"text": [5], "n": 1, "body": ""}\n',
     "is no text but [5]: choose with --column= from n body"),
    ("a.jsonl", '{"text": 5}\n', "is no text but 5: it has no other; a text stands in quotes"),
    ("a.jsonl", '{}\n', "no column 'text': it has no other"),
    ("a.jsonl", "[" * 100_000, "object 1 of")])
def test_broken_json_is_refused_with_the_place(read, name, data, words):
    with refused(words):
        read(name, data)


def test_half_a_surrogate_pair_becomes_a_question_mark(read):
    assert read("a.jsonl", '{"text": "half \\ud83d, whole \\ud83d\\ude42"}') == ["half ?, whole 🙂"]


# ---- what is unpacked, and what is not -----------------------------------------------------------

@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (bz2.compress, ".bz2"),
                                          (lzma.compress, ".xz")])
def test_packed_files_are_known_by_suffix_or_first_bytes(read, pack, suffix):
    data = pack("ein Wörtchen\r\n".encode())
    for name in ("a.txt" + suffix, "A.TXT" + suffix.upper(), "a.txt", "a", "a.text.1"):
        assert read(name, data) == ["ein Wörtchen\n"]
    assert read("a.jsonl" + suffix, pack(b'{"text": "a"}')) == ["a"]
    with refused("cannot read", suffix):
        read("cut.txt" + suffix, data[:-9])


def test_what_has_to_be_turned_into_text_first_is_refused_with_the_command(tmp_path):
    def refusal(name, data=b"data"):
        (tmp_path / name).write_bytes(data)
        return error_of("x_char", f"--input={tmp_path / name}", f"--data_dir={tmp_path}")

    for kind in REFUSED:
        assert f"{tmp_path}/my book{kind.upper()}" in refusal(f"my book{kind.upper()}")
    assert f"unzip '{tmp_path}/my book.zip'" in refusal("my book.zip")
    assert "zstd -d" in refusal("a.jsonl.zst") and "tar -xf" in refusal("a.tar.gz")
    assert "pdftotext" in refusal("book.txt", b"%PDF-1.7\n%\xe2\xe3\n")
    with zipfile.ZipFile(tmp_path / "download", "w") as archive:
        archive.writestr("a.txt", "a")
    archive = (tmp_path / "download").read_bytes()
    assert "unzip" in refusal("download", archive) and "unzip" in refusal("a.txt", archive)
    # A document of a word processor is an archive, too, and a .tgz is a .gz
    assert "pandoc" in refusal("a.docx", archive)
    assert "tar -xf" in refusal("a.tgz", gzip.compress(b"a.txt" + bytes(500)))


# ---- encodings -----------------------------------------------------------------------------------

TUNE = "T:Café d’été\nK:Fá\n"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-8"])
def test_another_encoding_is_read_when_it_is_named(read, name, encoding):
    data = {"a.txt": TUNE, "a.csv": f'n,text\n1,"{TUNE}"\n',
            "a.jsonl": json.dumps({"text": TUNE}, ensure_ascii=False),
            "a.json": json.dumps([{"text": TUNE}], ensure_ascii=False, indent=1)}[name]
    assert read(name, data.encode(encoding), encoding=encoding) == [TUNE]
    if encoding == "cp1252":
        with refused(name, "is not UTF-8: byte 0xe9", "--encoding=latin-1"):
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


def test_utf_16_without_a_mark_is_not_taken_for_ascii(read):
    with refused("a.txt", "--encoding=utf-16-le"):
        read("a.txt", "plain text".encode("utf-16-le"))


def test_a_wrong_byte_is_named_wherever_it_stands(read, monkeypatch):
    data = "zwölf\n".encode() * 20 + b"ab\xff\n"
    for piece in (1, 2, 50, 2**20):
        # The decoder keeps half a character from one piece to the next
        monkeypatch.setattr(readers, "PIECE", piece)
        with refused("line 21 of", "byte 0xff at position 142"):
            read("a.txt", data)
        with refused("line 1 of", "byte 0xc3 at position 2"):
            read("a.txt", b"zw\xc3")


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

