"""prepare_data.py on real text, against tiktoken on whole strings."""
import json
import shutil
import signal
import sys

import numpy as np
import pytest
from conftest import (
    FORMATS,
    PLAY,
    SHAKESPEARE,
    contents,
    error_of,
    ids_of,
    needs_shakespeare,
    prepare,
    python,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st

from nanodva import dataset, readers
from nanodva.dataset import SPLITS, read_meta
from nanodva.sources import SHAKESPEARE_SHA256
from nanodva.tokenizer import Tokenizer
from prepare_data import main, whole_words

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
    assert read_meta(folder)["tokenizer"] == Tokenizer({"kind": "gpt2"}).spec
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
    assert read_meta(folder)["tokenizer"]["kind"] == "gpt2"


@pytest.mark.parametrize("unit", [
    "To be, or not  to be:\n\n\tthat's the  question\r\n \n", "wörd 漢字 \u00a0 x ' 12\x1c\n",
    "a" + 9 * " ", "a" + 9 * "\n", "Käse🙂 \r\n\r x  "])
def test_pieces_change_no_token(tmp_path, bpe, monkeypatch, unit):
    monkeypatch.setattr(readers, "PIECE", 5000)
    monkeypatch.setattr(dataset, "PIECE", 5000)
    path = tmp_path / "long.txt"
    path.write_bytes((unit * (50_000 // len(unit))).encode())
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


@given(st.lists(st.text("a. \n\t🙂\x1c\u2003", max_size=6)))
def test_words_stay_whole_however_a_text_is_cut(bpe, pieces):
    whole = list(whole_words(pieces))
    assert "".join(whole) == "".join(pieces)
    ids = [i for piece in whole for i in bpe.encode_ordinary(piece)]
    assert ids == bpe.encode_ordinary("".join(pieces))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory in /proc")
def test_a_text_is_never_held_as_a_whole(tmp_path):
    """25 MB with emoji, of which Python makes 100 MB when it holds them in one string."""
    text = ("It was the best of times, it was the worst of times. " * 400 + "🙂\n").encode()
    (tmp_path / "long.txt").write_bytes(text * (25_000_000 // len(text)))
    result = python(f"""if True:
        import pathlib, re, prepare_data
        argv = ["long_char", "--input={tmp_path}/long.txt", "--data_dir={tmp_path}"]
        prepare_data.main([*argv, "--num_proc=2"])
        status = pathlib.Path("/proc/self/status")
        print(re.search(r"VmHWM: +(\\d+)", status.read_text().replace("\\t", " "))[1])""")
    assert int(result.stdout.splitlines()[-1]) < 110_000
    assert read_meta(tmp_path / "long_char")["bytes"]["train"] > 22_000_000


def test_a_huge_alphabet_gets_uint32(tmp_path):
    alphabet = [chr(i) for i in range(0x100, 0x11000) if not 0xD800 <= i < 0xE000]
    path = tmp_path / "signs.txt"
    path.write_text("".join(alphabet) * 2)
    folder = prepare(tmp_path, "signs_char", f"--input={path}")
    meta = read_meta(folder, deep=True)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(alphabet) > 65_536
    ids = [*ids_of(folder, "train"), *ids_of(folder, "val")]
    assert ids == [*range(len(alphabet))] * 2


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
    folder = prepare(tmp_path, "mine", f"--input={source / 'jsonl'}", "--val_fraction=0.3")
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
    assert meta["tokens"] == {"train": 42_388, "val": 12_046}


def test_every_format_and_any_number_of_workers_give_the_same_bytes(tmp_path, speeches):
    bins = []
    for number, kind in enumerate(FORMATS):
        folder = prepare(tmp_path / kind, "mine", f"--input={speeches[0] / kind}",
                         f"--num_proc={1 + number % 5}", "--tokenizer=gpt2:1000")
        bins.append([(folder / "train.bin").read_bytes(), (folder / "val.bin").read_bytes()])
    assert all(other == bins[0] for other in bins)
    again = prepare(tmp_path / "again", "mine", f"--input={speeches[0] / kind}", "--num_proc=3",
                    "--tokenizer=gpt2:1000")
    assert contents(again) == contents(folder)
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_max_tokens_takes_whole_documents_from_the_front(tmp_path, bpe, speeches):
    source, texts = speeches
    ends = np.cumsum([len(bpe.encode_ordinary(text)) + 1 for text in texts])
    folder = prepare(tmp_path, "mine", f"--input={source / 'parquet'}", "--max_tokens=40000",
                     "--val_fraction=0.3")
    assert sum(read_meta(folder)["tokens"].values()) == ends[ends >= 40_000][0]


def test_characters_of_documents(tmp_path, speeches):
    source, texts = speeches
    folder = prepare(tmp_path, "mine_char", f"--input={source / 'parquet'}", "--val_fraction=0.2")
    tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
    assert tokenizer.spec["alphabet"] == "".join(sorted(set("".join(texts))))
    assert sum(read_meta(folder)["tokens"].values()) == sum(map(len, texts))
    train = tokenizer.decode(ids_of(folder, "train")).decode()
    val = tokenizer.decode(ids_of(folder, "val")).decode()
    assert all(text in train or text in val for text in texts)


def test_separated_documents_get_end_of_text_between_them(tmp_path, bpe):
    stories = [f"Once upon {i} times there was a ship.\n\nIt sank." for i in range(30)]

    def streams(text, *arguments):
        (tmp_path / "a.txt").write_text(text)
        folder = prepare(tmp_path, "mine", f"--input={tmp_path / 'a.txt'}", *arguments)
        assert read_meta(folder)["source"]["documents"] == 30
        return [ids_of(folder, split).tolist() for split in ("train", "val")]

    tiny_stories = streams("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    assert streams("\n\n* * *\n\n".join(stories), r"--separator=\n\n* * *\n\n") == tiny_stories
    ids = [*bpe.encode_ordinary(stories[0]), END]
    assert tiny_stories[0][:len(ids)] == ids or tiny_stories[1][:len(ids)] == ids
    found = [bpe.decode(stream).split("<|endoftext|>")[:-1] for stream in tiny_stories]
    assert sorted(found[0] + found[1]) == sorted(stories) and len(found[1]) > 0


def test_characters_keep_what_separates_documents(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"poem {i}\n\n" for i in range(40)))
    (tmp_path / "b.csv").write_text("text\n" + "".join(f"row {i}\n" for i in range(40)))
    for name, ending in [("a.txt", "\n\n"), ("b.csv", "\n")]:
        separator = [r"--separator=\n\n"] if name == "a.txt" else []
        folder = prepare(tmp_path, "x_char", f"--input={tmp_path / name}", *separator)
        tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
        train, val = (tokenizer.decode(ids_of(folder, split)).decode() for split in SPLITS)
        assert val.endswith(ending) and len(val.split(ending)) + len(train.split(ending)) == 42
    # Nothing is separated where nobody asks for it, as before
    (tmp_path / "c.txt").write_text("a\n<|endoftext|>\n" * 20)
    folder = prepare(tmp_path, "x_char", f"--input={tmp_path / 'c.txt'}")
    assert sum(read_meta(folder)["tokens"].values()) == 20 * len("a\n<|endoftext|>\n")


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("tokenizer", ["gpt2:300", "char"])
def test_few_documents_get_the_share_that_was_asked_for(tmp_path, count, tokenizer):
    words = PLAY.read_text().split()
    rows = [{"text": " ".join(words[i * 99:i * 99 + 60 + i])} for i in range(count)]
    for seed in range(3):
        (tmp_path / "a.json").write_text(json.dumps([{"text": f"{seed} {row['text']}"}
                                                     for row in rows] + [{"text": None}]))
        folder = prepare(tmp_path, "x", f"--input={tmp_path / 'a.json'}",
                         f"--tokenizer={tokenizer}")
        meta = read_meta(folder, deep=True)
        train, val = meta["tokens"]["train"], meta["tokens"]["val"]
        assert 0.05 <= val / (train + val) <= 0.2
        texts = [f"{seed} {row['text']}".encode() for row in rows]
        spelled = Tokenizer(meta["tokenizer"])
        parts = [spelled.decode(ids_of(folder, split)) for split in SPLITS]
        parts = [part.replace(b"<|endoftext|>", b"") for part in parts]
        assert [meta["bytes"][split] for split in SPLITS] == [len(part) for part in parts]
        assert sum(map(len, parts)) == sum(map(len, texts))
        # At most one text is cut: the others are whole in one of the splits
        assert sum(text not in parts[0] and text not in parts[1] for text in texts) <= 1


def test_of_few_documents_equal_ones_are_treated_alike(tmp_path, bpe):
    text = "To be, or not to be, that is the question: " * 3
    (tmp_path / "a.csv").write_text("text\n" + f'"{text}"\n' * 4)
    folder = prepare(tmp_path, "x", f"--input={tmp_path / 'a.csv'}")
    ids = [*bpe.encode_ordinary(text), END]
    cut = round(0.9 * len(ids))
    assert ids_of(folder, "train").tolist() == [*ids[:cut], END] * 4
    assert ids_of(folder, "val").tolist() == ids[cut:] * 4


# ---- a val of one's own, the tokens of a model, marks inside texts -------------------------------

@pytest.mark.parametrize("name", ["x", "x_char"])
def test_val_input_is_val_and_input_is_train(tmp_path, bpe, name):
    texts = {"train.txt": "To be, or not to be.\n" * 9, "valid.txt": "That is the question.\n" * 9,
             "more.jsonl": '{"text": "Ay, there\'s the rub."}\n'}
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    folder = prepare(tmp_path, name, f"--input={tmp_path / 'train.txt'}", "--max_tokens=10",
                     f"--val_input={tmp_path / 'valid.txt'},{tmp_path / 'more.jsonl'}")
    tokenizer = Tokenizer(read_meta(folder, deep=True)["tokenizer"])
    end = "<|endoftext|>" if name == "x" else ""
    train, val = (tokenizer.decode(ids_of(folder, split)).decode() for split in SPLITS)
    assert train == texts["train.txt"] + end
    assert val == texts["valid.txt"] + end + "Ay, there's the rub." + end
    assert read_meta(folder)["source"]["files"] == ["train.txt", "valid.txt", "more.jsonl"]


def test_stories_and_their_validation_file(tmp_path, bpe):
    """As TinyStories comes: two files, with lines between the texts."""
    for file, count in [("train.txt", 30), ("valid.txt", 3)]:
        (tmp_path / file).write_text("".join(f"Story {i}.\n<|endoftext|>\n" for i in range(count)))
    folder = prepare(tmp_path, "x", f"--input={tmp_path / 'train.txt'}",
                     f"--val_input={tmp_path / 'valid.txt'}", "--max_tokens=50")
    assert bpe.decode(ids_of(folder, "val")) == \
        "".join(f"Story {i}.<|endoftext|>" for i in range(3))
    # max_tokens counts train alone
    assert 50 <= len(ids_of(folder, "train")) < 55


def test_a_text_for_a_model_that_is_there_gets_its_characters(tmp_path, trained, data_dir, capsys):
    alphabet = read_meta(data_dir / "tiny_char")["tokenizer"]["alphabet"]
    (tmp_path / "more.txt").write_text("a list of old letters " * 30)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text(
        json.dumps({"model_config": {}, "tokenizer": {"kind": "char", "alphabet": alphabet}}))
    for source in trained, data_dir / "tiny_char", tmp_path / "exported", trained / "last.pt":
        folder = prepare(tmp_path, "more", f"--input={tmp_path / 'more.txt'}",
                         f"--tokenizer={source}")
        meta = read_meta(folder, deep=True)
        assert meta["tokenizer"] == {"kind": "char", "alphabet": alphabet}
        tokenizer = Tokenizer(meta["tokenizer"])
        assert tokenizer.decode(ids_of(folder, "train")).decode().startswith("a list of old let")
    (tmp_path / "more.txt").write_text("Zwölf Boxen? " * 9)
    message = error_of("more", f"--input={tmp_path / 'more.txt'}", f"--tokenizer={trained}",
                       f"--data_dir={tmp_path}")
    assert "lacks 5 of the characters: '?BZxö'; take them out of the text" in message


def test_a_data_sets_tokens_may_be_words(tmp_path):
    first = prepare(tmp_path, "first", f"--input={PLAY}", "--tokenizer=gpt2:500")
    second = prepare(tmp_path, "second", f"--input={PLAY}", f"--tokenizer={first}")
    assert contents(second)["train.bin"] == contents(first)["train.bin"]
    (tmp_path / "empty").mkdir()
    assert "empty" in error_of("x", f"--input={PLAY}", f"--tokenizer={tmp_path / 'empty'}")


@pytest.mark.parametrize("name, text, count, in_characters", [
    ("a.txt", "A <|endoftext|> B.\n" * 7 + "C. " * 99, 7, 7),
    ("a.txt", "A\n<|endoftext|>\nB<|endoftext|>\n" + "C. " * 99, 1, 2),
    ("a.jsonl", '{"text": "A<|endoftext|>B<|endoftext|>C"}\n' * 400, 800, 800),
    ("a.csv", "text\n<|endoftext|> at the start and more\nand at the end <|endoftext|>\n", 2, 2),
    ("a.txt", "A. B. endoftext " * 9, 0, 0)])
def test_end_of_text_inside_a_text_is_counted_and_said(tmp_path, capsys, name, text, count,
                                                       in_characters):
    (tmp_path / name).write_text(text)
    for tokenizer, expected in ("gpt2:300", count), ("char", in_characters):
        argv = ["x", f"--input={tmp_path / name}", f"--tokenizer={tokenizer}"]
        prepare(tmp_path, *argv)
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("<|endoftext|> is ")]
        assert len(found) == (expected > 0)
        if found:
            assert f"is {expected} times inside the texts" in found[0]
            prepare(tmp_path, *argv, *found[0].split()[-1].replace("'", "").split())
            assert "inside the texts" not in capsys.readouterr().out


# ---- kills, failures, mistakes -------------------------------------------------------------------

# Kills itself before it writes a document or moves a file: the nth, counted from 0
KILLED = """if True:
    import itertools, os, signal, sys, prepare_data
    place, left, argv = sys.argv[1], itertools.count(int(sys.argv[2]), -1), sys.argv[3:]
    def kill_if_due():
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace, encode_all = os.replace, prepare_data.dataset.encode_all
    def killed_replace(*arguments):
        kill_if_due()
        replace(*arguments)
    def killed_encode_all(*arguments):
        for each in encode_all(*arguments):
            kill_if_due()
            yield each
    if place == "write":
        prepare_data.dataset.encode_all = killed_encode_all
    else:
        os.replace = killed_replace
    prepare_data.main(argv)"""


@pytest.mark.parametrize("place, number", [("write", 12), ("replace", 3), ("replace", 5)])
def test_killed_it_leaves_the_old_set_or_none_and_then_ends_the_same(tmp_path, speeches, place,
                                                                     number):
    """While the files are written; before the new ones are moved; before the last of them is."""
    argv = ["mine_char", f"--input={speeches[0] / 'parquet'}"]
    whole = contents(prepare(tmp_path / "whole", *argv))
    folder = prepare(tmp_path / "killed", "mine_char", f"--input={PLAY}")
    old = contents(folder)
    killed = python(KILLED, place, number, *argv, f"--data_dir={tmp_path / 'killed'}")
    assert killed.returncode == -signal.SIGKILL and list(folder.glob(".partial-*"))
    if place == "write":
        assert read_meta(folder, deep=True)
        assert {name: (folder / name).read_bytes() for name in old} == old
    else:
        # train.bin may be new and val.bin old: nobody reads that mixture
        with refused("no ", "meta.json"):
            read_meta(folder)
    prepare(tmp_path / "killed", *argv)
    assert contents(folder) == whole


def test_a_failed_command_leaves_nothing_behind(tmp_path, speeches):
    data_dir = tmp_path / "new" / "data"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for arguments in ["--input=missing.txt"], [f"--input={empty}"], \
            [f"--input={speeches[0] / 'jsonl'}", "--column=n"]:
        error_of("mine", *arguments, f"--data_dir={data_dir}")
        assert not (tmp_path / "new").exists()
    folder = prepare(data_dir, "mine", f"--input={PLAY}", "--tokenizer=char")
    before = contents(folder)
    error_of("mine", f"--input={empty}", f"--data_dir={data_dir}")
    assert contents(folder) == before


def test_a_second_process_of_one_name_is_refused_and_the_first_ends_well(tmp_path, monkeypatch):
    """The second starts and ends while the first encodes."""
    argv = ["x_char", f"--input={PLAY}", f"--data_dir={tmp_path}"]
    encode_all, second = dataset.encode_all, []

    def at_once(*arguments):
        second.append(python("import sys, prepare_data\nprepare_data.main(sys.argv[1:])", *argv))
        return encode_all(*arguments)

    monkeypatch.setattr(dataset, "encode_all", at_once)
    main(argv)
    assert second[0].returncode == 1
    assert f"writes in {tmp_path / 'x_char'} and holds" in second[0].stderr.splitlines()[-1]
    assert read_meta(tmp_path / "x_char", deep=True)["tokens"]["train"] == 170_532


@pytest.mark.parametrize("inside", ["partial", "texts", ".", "deep/er"])
def test_texts_in_the_data_sets_own_folder_stay(tmp_path, inside):
    folder = tmp_path / "mine" / inside
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text("the only copy " * 30)
    error_of("mine", f"--input={folder}", "--max_tokens=1", f"--data_dir={tmp_path}")
    prepare(tmp_path, "mine", f"--input={folder}")
    assert (folder / "a.txt").read_text() == "the only copy " * 30
    assert not list((tmp_path / "mine").glob(".partial-*"))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """bash does not expand it after ="""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.md", "b.md", "c.md"):
        shutil.copy(PLAY, tmp_path / name)
    for name, tokenizer in [("a", "char"), ("b", "~/sets/a")]:
        main([name, "--input=~/a.md,~/b.*", "--val_input=~/c.md", f"--tokenizer={tokenizer}",
              "--data_dir=~/sets"])
        meta = read_meta(tmp_path / "sets" / name, deep=True)
        assert meta["vocab_size"] == 68 and meta["tokens"]["train"] == 2 * meta["tokens"]["val"]
    assert not (tmp_path / "~").exists()


def test_stopped_while_files_are_moved_it_leaves_no_mixture_that_looks_whole(tmp_path):
    folder = prepare(tmp_path, "shakespeare_char", f"--input={PLAY}")
    # A folder in the place of val.bin, which the new val.bin cannot replace.
    (folder / "val.bin").unlink()
    (folder / "val.bin" / "x").mkdir(parents=True)
    error_of("shakespeare_char", f"--input={PLAY}", f"--data_dir={tmp_path}")
    assert sorted(contents(folder)) == ["train.bin", "val.bin", "val.bin/x"]


@pytest.mark.parametrize("arguments, words", [
    ([], "shakespeare_char, shakespeare, plays_char, plays, openwebtext"),
    (["nope"], "name='nope': choose from shakespeare_char"),
    (["my set", "--input=a"], "name='my set': use letters, digits, '-', '_' and '.' only"),
    (["../x", "--input=a"], "name='../x': use letters"),
    (["x", "--input=a", "--tokenizer=gpt2:100"], "N from 257 to 50257"),
    (["x", "--input=a", "--tokenizer=words"], "choose from char, gpt2, gpt2:N"),
    (["x", "--input=a", "--tokenizer=out-gone"], "or the folder of a run, of a data set"),
    (["x", "--input=a", "--val_fraction=1.5"], "val_fraction=1.5: it must lie between"),
    (["x", "--input=a", "--val_fraction=0"], "val_fraction=0.0: it must lie between 0 and 1"),
    (["x", "--input=a", "--val_fraction=0"], "--val_input=PATH names texts of your own for val"),
    (["x", "--input=a", "--val_fraction=-0.1"], "val_fraction=-0.1: it must lie between"),
    (["plays", "--val_input=a"], "val_input='a': it goes with --input=PATH"),
    (["x", "--input=a", "--val_input=b", "--val_fraction=0.2"], "without --val_fraction"),
    (["x", "--input=a", "--num_proc=-1"], "num_proc=-1"),
    (["x", "--input=a", "--max_tokens=-1"], "max_tokens=-1"),
    (["x", "--input=a", "--encoding=klingon"], "encoding='klingon'"),
    (["x", "--input=no such.txt"], "--input='no such.txt': no such file")])
def test_wrong_settings_are_one_line(tmp_path, arguments, words):
    assert words in error_of(*arguments, f"--data_dir={tmp_path}")


def test_too_little_text_and_a_data_dir_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("ab")
    assert f"data_dir={file}: {file} is a file" in \
        error_of("x", f"--input={PLAY}", f"--data_dir={file}")
    assert "1 tokens for train and 1 for val, and each needs at least 2" in error_of(
        "x_char", f"--input={file}", f"--data_dir={tmp_path}")


def test_a_setting_that_nothing_reads_is_an_error(tmp_path, speeches):
    for name, value, kind in [("column", "title", "txt"), ("encoding", "latin-1", "parquet")]:
        message = error_of("x", f"--input={speeches[0] / kind}", f"--{name}={value}",
                           f"--data_dir={tmp_path}")
        assert f"--{name}='{value}' means nothing for" in message
    assert "--separator='ZZ' does not occur" in error_of(
        "x_char", f"--input={PLAY}", "--separator=ZZ", f"--data_dir={tmp_path}")
