"""prepare_data.py on real text, against tiktoken on whole strings."""
import hashlib
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    PLAY,
    ROOT,
    SHAKESPEARE,
    error_of,
    everything_in,
    ids_of,
    needs_shakespeare,
    prepare,
)

from nanodva.errors import UserError
from nanodva.sources import SHAKESPEARE_SHA256
from nanodva.tokenizer import Tokenizer
from prepare_data import PIECE, main, read_meta

END = 50256


# ---- one text ------------------------------------------------------------------------------------

@needs_shakespeare
def test_tiny_shakespeare_in_characters(tmp_path):
    folder = prepare(tmp_path, "shakespeare_char", f"--input={SHAKESPEARE}")
    text = SHAKESPEARE.read_text()
    meta, alphabet = read_meta(folder), sorted(set(text))
    assert meta["tokens"] == meta["bytes"] == {"train": 1_003_854, "val": 111_540}
    assert meta["tokenizer"] == {"kind": "char", "alphabet": "".join(alphabet)}
    assert meta["vocab_size"] == 65 and meta["dtype"] == "uint16"
    ids = [*ids_of(folder, "train"), *ids_of(folder, "val")]
    assert "".join(alphabet[i] for i in ids) == text
    assert meta["source"] == {"name": "shakespeare_char", "files": [SHAKESPEARE.name],
                              "sha256": SHAKESPEARE_SHA256}


@needs_shakespeare
def test_tiny_shakespeare_in_gpt2s_tokens(tmp_path, bpe):
    folder = prepare(tmp_path, "shakespeare", f"--input={SHAKESPEARE}")
    text = SHAKESPEARE.read_text()
    assert read_meta(folder)["tokens"] == {"train": 301_966, "val": 36_059}
    assert read_meta(folder)["tokenizer"] == {"kind": "gpt2"}
    assert ids_of(folder, "train").tolist() == bpe.encode_ordinary(text[:1_003_854])
    assert ids_of(folder, "val").tolist() == bpe.encode_ordinary(text[1_003_854:])


def test_the_first_of_gpt2s_tokens(tmp_path, speeches):
    folder = prepare(tmp_path, "mine", f"--input={PLAY}", "--tokenizer=gpt2:4096")
    meta = read_meta(folder, deep=True)
    assert meta["tokenizer"] == Tokenizer({"kind": "gpt2:4096"}).spec
    assert meta["vocab_size"] == 4096
    assert meta["tokens"] == {"train": 70_527, "val": 7_942}
    folder = prepare(tmp_path, "speeches", f"--input={speeches[0] / 'jsonl'}",
                     "--tokenizer=gpt2:1024")
    documents = [(ids_of(folder, split) == 1023).sum() for split in ("train", "val")]
    assert sum(documents) == len(speeches[1])
    folder = prepare(tmp_path, "all", f"--input={PLAY}", "--tokenizer=gpt2:50257")
    assert read_meta(folder)["tokenizer"] == {"kind": "gpt2"}


@pytest.mark.parametrize("unit", [
    "To be, or not  to be:\n\n\tthat's the  question\r\n \n", "wörd 漢字 \u00a0 x ' 12\x1c\n",
    "a" + 9 * " ", "a" + 9 * "\n"])
def test_pieces_change_no_token(tmp_path, bpe, unit):
    path = tmp_path / "long.txt"
    path.write_bytes((unit * (2 * PIECE // len(unit))).encode())
    # Python reads \n for \r\n.
    text = path.read_text()
    folder = prepare(tmp_path, "long", f"--input={path}", "--val_fraction=0.3")
    boundary = int(len(text) * 0.7)
    assert ids_of(folder, "train").tolist() == bpe.encode_ordinary(text[:boundary])
    assert ids_of(folder, "val").tolist() == bpe.encode_ordinary(text[boundary:])


@pytest.mark.parametrize("name", ["mine", "mine_char"])
def test_one_text_is_cut_at_max_tokens_and_then_split(tmp_path, name):
    folder = prepare(tmp_path, name, f"--input={PLAY}", "--max_tokens=20000")
    tokens = read_meta(folder)["tokens"]
    assert abs(tokens["train"] + tokens["val"] - 20_000) <= 1 and 1_700 < tokens["val"] < 2_300


def test_max_tokens_cuts_no_character_in_two(tmp_path, bpe):
    text = "漢字仮名" * 20
    (tmp_path / "a.txt").write_text(text)
    inside = [n for n in range(20, 40) if "\ufffd" in bpe.decode(bpe.encode(text)[:n])]
    folder = prepare(tmp_path, "mine", f"--input={tmp_path / 'a.txt'}", f"--max_tokens={inside[0]}")
    found = bpe.decode([*ids_of(folder, "train"), *ids_of(folder, "val")])
    assert text.startswith(found) and len(found) > 5


def test_a_huge_alphabet_gets_uint32(tmp_path):
    alphabet = [chr(i) for i in range(0x100, 0x11000) if not 0xD800 <= i < 0xE000]
    path = tmp_path / "signs.txt"
    path.write_text("".join(alphabet) * 2)
    folder = prepare(tmp_path, "signs_char", f"--input={path}")
    meta = read_meta(folder, deep=True)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(alphabet) > 65_536
    ids = [*ids_of(folder, "train"), *ids_of(folder, "val")]
    assert ids == [*range(len(alphabet))] * 2


def test_a_byte_order_mark_is_no_character(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + b"hello " * 20)
    lines = [json.dumps({"text": "\ufeff" + "hello " * i}, ensure_ascii=i < 5) for i in range(10)]
    (tmp_path / "a.jsonl").write_bytes(mark + "\n".join(lines).encode())
    for name in ("a.txt", "a.jsonl"):
        folder = prepare(tmp_path, "mine_char", f"--input={tmp_path / name}", "--val_fraction=0.5")
        assert read_meta(folder)["tokenizer"]["alphabet"] == " ehlo"


def test_plays_need_no_network_and_have_known_bytes(tmp_path):
    folder = prepare(tmp_path, "plays_char")
    meta = read_meta(folder)
    assert meta["tokens"] == {"train": 4_516_651, "val": 481_631} and meta["vocab_size"] == 70
    assert meta["sha256"]["train"].startswith("025e0dba35ce56017eefaf995bcc43aafec15a630a1879d9")
    assert meta["sha256"]["val"].startswith("e90cd614b3b9694dba33669dbc384d6820bcc4e6d6799f1575d")
    tokenizer = Tokenizer(meta["tokenizer"])
    train, val = (tokenizer.decode(ids_of(folder, split)).decode() for split in ("train", "val"))
    assert "\nHAMLET:\n" in train and "\nMACBETH:\n" in val and "\nMACBETH:\n" not in train
    assert "To be, or not to be: that is the question" in train and "[Exeunt]" in train
    assert not set("*_#\\") & set(train + val) and " \n" not in train + val


# ---- many documents ------------------------------------------------------------------------------

def test_documents_keep_order_tokens_and_duplicates_together(tmp_path, bpe, speeches):
    source, texts = speeches
    folder = prepare(tmp_path, "mine", f"--input={source / 'jsonl'}", "--val_fraction=0.2")
    streams = {split: ids_of(folder, split).tolist() for split in ("train", "val")}
    expected, split_of = {"train": [], "val": []}, {}
    for text in texts:
        ids = bpe.encode_ordinary(text) + [END]
        # Which split a text goes to is free, but a duplicate must go to the same.
        fitting = [split for split in streams
                   if streams[split][len(expected[split]):][:len(ids)] == ids]
        split_of.setdefault(text, fitting[0])
        expected[split_of[text]] += ids
    assert streams == expected and set(split_of.values()) == {"train", "val"}
    meta = read_meta(folder, deep=True)
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in texts)
    # Of each text the hash decides, so that the next version splits as this one does.
    assert meta["tokens"] == {"train": 347_488, "val": 93_647}


def test_every_format_and_any_number_of_workers_give_the_same_bytes(tmp_path, speeches):
    bins = []
    for kind, workers in [("txt", 1), ("txt.gz", 5), ("jsonl", 2), ("jsonl.gz", 3), ("parquet", 4),
                          ("parquet.gz", 2)]:
        folder = prepare(tmp_path / kind, "mine", f"--input={speeches[0] / kind}",
                         f"--num_proc={workers}")
        bins.append([(folder / "train.bin").read_bytes(), (folder / "val.bin").read_bytes()])
    assert all(other == bins[0] for other in bins)
    again = prepare(tmp_path / "again", "mine", f"--input={speeches[0] / kind}", "--num_proc=1")
    assert everything_in(again) == everything_in(folder)
    assert sorted(everything_in(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_max_tokens_takes_whole_documents_from_the_front(tmp_path, bpe, speeches):
    source, texts = speeches
    ends = np.cumsum([len(bpe.encode_ordinary(text)) + 1 for text in texts])
    folder = prepare(tmp_path, "mine", f"--input={source / 'parquet'}", "--max_tokens=100000",
                     "--val_fraction=0.3")
    assert sum(read_meta(folder)["tokens"].values()) == ends[ends >= 100_000][0]


def test_characters_of_documents(tmp_path, speeches):
    source, texts = speeches
    folder = prepare(tmp_path, "mine_char", f"--input={source / 'parquet'}", "--val_fraction=0.2")
    tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
    assert tokenizer.spec["alphabet"] == "".join(sorted(set("".join(texts))))
    assert sum(read_meta(folder)["tokens"].values()) == sum(map(len, texts))
    train = tokenizer.decode(ids_of(folder, "train")).decode()
    val = tokenizer.decode(ids_of(folder, "val")).decode()
    assert all(text in train or text in val for text in texts)


# ---- kills, failures, checks ---------------------------------------------------------------------

def test_killed_at_any_moment_it_ends_the_same_and_the_old_set_stays(tmp_path, speeches):
    command = [sys.executable, ROOT / "prepare_data.py", "mine", "--num_proc=2"]
    new = [*command, f"--input={speeches[0] / 'parquet'}"]
    start = time.time()
    subprocess.run([*new, f"--data_dir={tmp_path / 'whole'}"], check=True)
    duration = time.time() - start
    whole = everything_in(tmp_path / "whole" / "mine")
    old = everything_in(prepare(tmp_path / "killed", "mine", f"--input={PLAY}"))
    folder = tmp_path / "killed" / "mine"

    def run_and_kill(is_time):
        process = subprocess.Popen([*new, f"--data_dir={tmp_path / 'killed'}"])
        while not is_time() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        read_meta(folder, deep=True)
        found = {name: (folder / name).read_bytes() for name in old}
        assert found in (old, whole)
        return found == old and (folder / "partial").exists()

    # Once while the files are being written, and once at a random moment.
    assert run_and_kill(lambda: any((folder / "partial").glob("train.bin*")))
    subprocess.run([*new, f"--data_dir={tmp_path / 'killed'}"], check=True)
    assert everything_in(folder) == whole
    end = time.time() + random.uniform(0.3, 1) * duration
    run_and_kill(lambda: time.time() > end)
    subprocess.run([*new, f"--data_dir={tmp_path / 'killed'}"], check=True)
    assert everything_in(folder) == whole


def test_a_failed_command_leaves_nothing_behind(tmp_path, speeches):
    data_dir = tmp_path / "new" / "data"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for arguments in ["--input=missing.txt"], [f"--input={empty}"], \
            [f"--input={speeches[0] / 'jsonl'}", "--column=n"]:
        error_of("mine", *arguments, f"--data_dir={data_dir}")
        assert not (tmp_path / "new").exists()
    folder = prepare(data_dir, "mine", f"--input={PLAY}", "--tokenizer=char")
    before = everything_in(folder)
    error_of("mine", f"--input={empty}", f"--data_dir={data_dir}")
    assert everything_in(folder) == before


def test_stopped_while_files_are_moved_it_leaves_no_mixture_that_looks_whole(tmp_path):
    folder = prepare(tmp_path, "shakespeare_char", f"--input={PLAY}")
    # A folder in the place of val.bin, which the new val.bin cannot replace.
    (folder / "val.bin").unlink()
    (folder / "val.bin" / "x").mkdir(parents=True)
    error_of("shakespeare_char", f"--input={PLAY}", f"--data_dir={tmp_path}")
    assert not (folder / "meta.json").exists() and not (folder / "partial").exists()


def test_check_and_read_meta_refuse_what_meta_does_not_describe(tmp_path, capsys):
    check = ["shakespeare_char", "--check", f"--data_dir={tmp_path}"]
    assert f"no {tmp_path}/shakespeare_char/train.bin: run python prepare_data.py" in \
        error_of(*check)
    folder = prepare(tmp_path, "shakespeare_char", f"--input={PLAY}")
    main(check)
    assert "shakespeare_char is sound: 170,532 tokens" in capsys.readouterr().out
    good = everything_in(folder)
    meta = json.loads(good["meta.json"])

    def refused(name, data):
        (folder / name).write_bytes(data)
        message = error_of(*check)
        (folder / name).write_bytes(good[name])
        return message

    assert "bytes, not 170532 tokens" in refused("train.bin", good["train.bin"][:-1])
    assert "sha256" in refused("train.bin", b"\0" + good["train.bin"][1:])
    assert "format" in refused("meta.json", json.dumps(meta | {"format": 2}).encode())
    assert "JSON" in refused("meta.json", b"{")
    assert "TypeError" in refused("meta.json", b"[]")
    for key in ("tokenizer", "vocab_size", "dtype", "tokens", "sha256", "bytes"):
        rest = {name: value for name, value in meta.items() if name != key}
        assert key in refused("meta.json", json.dumps(rest).encode())
    impossible = b"\x44\0" + good["val.bin"][2:]
    digests = meta["sha256"] | {"val": hashlib.sha256(impossible).hexdigest()}
    (folder / "val.bin").write_bytes(impossible)
    message = refused("meta.json", json.dumps(meta | {"sha256": digests}).encode())
    assert "val.bin holds the id 68, vocab_size is 68" in message


def test_a_hint_can_be_pasted_into_a_shell(tmp_path):
    with pytest.raises(UserError) as error:
        read_meta(tmp_path / "my data" / "mine")
    command = f"run python prepare_data.py mine --input=PATH --data_dir='{tmp_path}/my data'"
    assert str(error.value).endswith(command)


def test_wrong_settings_are_one_line(tmp_path):
    text = f"--input={PLAY}"
    assert "shakespeare_char, shakespeare, plays_char, plays, openwebtext" in error_of()
    assert "name='nope': there are shakespeare_char" in error_of("nope")
    assert "name='my set': use letters, digits, '-', '_' and '.' only" in error_of("my set", text)
    assert "name='../x': use letters" in error_of("../x", text)
    assert "N from 257 to 50257" in error_of("x", text, "--tokenizer=gpt2:100")
    assert "choose from char, gpt2, and gpt2:N" in error_of("x", text, "--tokenizer=words")
    assert "val_fraction=1.5: it must lie between" in error_of("x", text, "--val_fraction=1.5")
    assert "num_proc=-1" in error_of("x", text, "--num_proc=-1")
    assert "max_tokens=-1" in error_of("x", text, "--max_tokens=-1")
    assert f"--input='{tmp_path}/a b.txt': no such" in error_of("x", f"--input={tmp_path}/a b.txt")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in error_of("x", text, f"--data_dir={tmp_path / 'file'}")


def test_the_scripts_print_one_line_and_help(tmp_path):
    def run(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)

    result = run(ROOT / "prepare_data.py")
    assert result.returncode == 2 and result.stderr.startswith("error: which data set?")
    assert result.stderr.count("\n") == 1
    result = run(ROOT / "prepare_data.py", "--help")
    assert result.returncode == 0 and "--val_fraction" in result.stdout
    result = run(ROOT / "data" / "shakespeare_char" / "prepare.py", f"--input={PLAY}",
                 f"--data_dir={tmp_path}")
    assert result.returncode == 0 and "170,532 tokens for train" in result.stdout
