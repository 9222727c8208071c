"""prepare_data.py on real text, against tiktoken on whole strings."""
import json
import signal
import sys

import numpy as np
import pytest
import xxhash
from conftest import PLAY, SHAKESPEARE, contents, error_of, ids_of, oracle, prepare, python, refused
from hypothesis import given
from hypothesis import strategies as st

from nanodva import dataset, readers
from nanodva.dataset import SPLITS, read_meta
from nanodva.tokenizer import Tokenizer
from prepare_data import main, whole_words

END = "<|endoftext|>"


@pytest.fixture
def make(tmp_path):
    """
    make(source, *arguments, name): what meta.json says of a new data set, and its train and val in
    words. The source is a path, or {file: content} to write first.
    """
    def make(source, *arguments, name="x"):
        if isinstance(source, dict):
            for file, content in source.items():
                (tmp_path / file).write_text(content)
            source = ",".join(str(tmp_path / file) for file in source)
        folder = prepare(tmp_path, name, f"--input={source}", *arguments)
        meta = read_meta(folder, deep=True)
        tokenizer = Tokenizer(meta["tokenizer"])
        return meta, *(tokenizer.decode(ids_of(folder, split)).decode() for split in SPLITS)
    return make


# ---- one text ------------------------------------------------------------------------------------

@pytest.mark.skipif(SHAKESPEARE is None, reason="Tiny Shakespeare is not here: python "
                    "prepare_data.py shakespeare_char fetches it")
def test_tiny_shakespeare(make):
    text = SHAKESPEARE.read_text()
    meta, train, val = make(SHAKESPEARE, name="shakespeare_char")
    assert meta["tokens"] == meta["bytes"] == {"train": 1_003_854, "val": 111_540}
    assert meta["tokenizer"] == {"kind": "char", "alphabet": "".join(sorted(set(text)))}
    assert meta["vocab_size"] == 65 and meta["dtype"] == "uint16" and train + val == text
    assert meta["source"] == {"name": "shakespeare_char", "files": [SHAKESPEARE.name]}
    meta = make(SHAKESPEARE, name="shakespeare")[0]
    assert meta["tokens"] == {"train": 301_966, "val": 36_059}
    assert meta["tokenizer"] == Tokenizer({"kind": "gpt2"}).spec


def test_one_text_is_cut_in_two_and_reading_it_in_pieces_changes_no_token(make, tmp_path, bpe,
                                                                          monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 500)
    monkeypatch.setattr(dataset, "PIECE", 500)
    path = tmp_path / "long.txt"
    path.write_bytes(b"wo  be:\n\n\tq\r\n \n" * 99 +
                     "漢\u00a0 '12\x1c\n🙂 \r\n\r x".encode() * 99 +
                     b"a         " * 99 + b"a\n\n\n\n\n\n\n" * 99 + PLAY.read_bytes()[:9999])
    make(path, "--val_fraction=0.3")
    # Python reads \n for \r\n
    text = path.read_text()
    boundary = int(len(text) * 0.7)
    for split, part in ("train", text[:boundary]), ("val", text[boundary:]):
        assert ids_of(tmp_path / "x", split).tolist() == bpe.encode_ordinary(part)


@given(st.lists(st.text("a. \n\t🙂\x1c\u2003", max_size=6)))
def test_words_stay_whole_however_a_text_is_cut(bpe, pieces):
    whole = list(whole_words(pieces))
    assert "".join(whole) == "".join(pieces)
    ids = [i for piece in whole for i in bpe.encode_ordinary(piece)]
    assert ids == bpe.encode_ordinary("".join(pieces))


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_one_text_is_cut_at_max_tokens_and_then_split(make, bpe, tokenizer):
    tokens = make(PLAY, "--max_tokens=20000", f"--tokenizer={tokenizer}")[0]["tokens"]
    assert abs(tokens["train"] + tokens["val"] - 20_000) <= 1 and 1_700 < tokens["val"] < 2_300
    # And in the middle of no character
    text = "漢字仮名" * 20
    inside = [n for n in range(20, 40) if "\ufffd" in bpe.decode(bpe.encode(text)[:n])]
    meta, *texts = make({"a.txt": text}, f"--max_tokens={inside[0]}", f"--tokenizer={tokenizer}")
    assert text.startswith("".join(texts)) and len("".join(texts)) > 5
    assert sum(meta["tokens"].values()) <= inside[0]


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


def test_a_huge_alphabet_gets_uint32(make):
    alphabet = "".join(chr(i) for i in range(0x100, 0x11000) if not 0xD800 <= i < 0xE000)
    meta, train, val = make({"signs.txt": alphabet * 2}, "--tokenizer=char")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(alphabet) > 65_536
    assert meta["tokenizer"]["alphabet"] == alphabet and train + val == alphabet * 2


def test_plays_need_no_network_and_have_known_bytes(tmp_path):
    meta = read_meta(prepare(tmp_path, "plays_char"))
    assert meta["tokens"] == {"train": 4_516_651, "val": 481_631} and meta["vocab_size"] == 70
    assert meta["sha256"]["train"].startswith("025e0dba35ce56017eefaf995bcc43aafec15a630a1879d9")
    assert meta["sha256"]["val"].startswith("e90cd614b3b9694dba33669dbc384d6820bcc4e6d6799f1575d")


# ---- many documents ------------------------------------------------------------------------------

def test_documents_keep_order_tokens_and_duplicates_together(tmp_path, bpe, speeches):
    source, texts = speeches
    folder = prepare(tmp_path, "mine", f"--input={source / 'jsonl'}", "--val_fraction=0.3",
                     "--tokenizer=gpt2:50257")
    # The hash of each text decides: duplicates stay together, and a larger set splits the same way
    for split, bounds in ("val", (0, 0.3)), ("train", (0.3, 1)):
        low, high = (bound * 2**64 for bound in bounds)
        assert ids_of(folder, split).tolist() == [
            i for text in texts if low <= xxhash.xxh3_64_intdigest(text.encode()) < high
            for i in [*bpe.encode_ordinary(text), 50256]]
    meta = read_meta(folder, deep=True)
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in texts)
    assert meta["tokens"] == {"train": 42_388, "val": 12_046}
    assert meta["tokenizer"] == Tokenizer({"kind": "gpt2"}).spec
    # max_tokens takes whole documents from the front
    ends = np.cumsum([len(bpe.encode_ordinary(text)) + 1 for text in texts])
    folder = prepare(tmp_path, "mine", f"--input={source / 'parquet'}", "--max_tokens=40000",
                     "--val_fraction=0.3")
    assert sum(read_meta(folder)["tokens"].values()) == ends[ends >= 40_000][0]


def test_every_format_and_any_number_of_workers_give_the_same_bytes(tmp_path, speeches):
    kinds, sets = sorted(path.name for path in speeches[0].iterdir()), []
    for number, kind in enumerate([*kinds, kinds[-1]]):
        folder = prepare(tmp_path / str(number), "mine", f"--input={speeches[0] / kind}",
                         f"--num_proc={1 + number % 5}", "--tokenizer=gpt2:1000")
        sets.append(contents(folder))
    assert sets[-1] == sets[-2] and sorted(sets[0]) == ["meta.json", "train.bin", "val.bin"]
    for split in SPLITS:
        assert len({found[f"{split}.bin"] for found in sets}) == 1


def test_characters_end_with_the_document_that_reaches_max_tokens(make):
    rows = "ab" * 15 + "\nXYZ\n"
    meta, *texts = make({"a.csv": "text\n" + rows}, "--max_tokens=25", "--tokenizer=char")
    assert "".join(texts) == rows[:31] and meta["tokenizer"]["alphabet"] == "\nab"


def test_separated_documents_get_end_of_text_between_them(make):
    stories = [f"Once upon {i} times there was a ship.\n\nIt sank." for i in range(30)]
    separator, found = "\n\n* * *\n\n", []
    for mark, *arguments in (f"\n{END}\n",), (separator, r"--separator=\n\n* * *\n\n"):
        meta, *texts = make({"a.txt": mark.join([*stories, ""])}, "--tokenizer=gpt2:300",
                            *arguments)
        assert meta["source"]["documents"] == 30 and texts[1]
        found.append(texts)
    assert found[0] == found[1]
    assert sorted("".join(found[0]).split(END)[:-1]) == sorted(stories)


@pytest.mark.parametrize("files, separator, ending, count", [
    ({"a.txt": "".join(f"poem {i}\n\n" for i in range(40))}, r"\n\n", "\n\n", 40),
    ({"b.csv": "text\n" + "".join(f"row {i}\n" for i in range(40))}, "", "\n", 40),
    ({"c.jsonl": '{"text": "one--two--three"}\n' * 20}, "--", "--", 60),
    # Nothing is separated if nobody asks for it
    ({"d.txt": f"a\n{END}\n" * 20}, "", f"\n{END}\n", 20)])
def test_characters_keep_what_separates_documents(make, files, separator, ending, count):
    _, train, val = make(files, f"--separator={separator}", "--tokenizer=char")
    assert val.endswith(ending) and (train + val).count(ending) == count


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("tokenizer", ["gpt2:300", "char"])
def test_few_documents_get_the_share_that_was_asked_for(make, count, tokenizer):
    words = PLAY.read_text().split()
    for seed in range(3):
        texts = [f"{seed} " + " ".join(words[i * 99:i * 99 + 60 + i]) for i in range(count)]
        rows = [{"text": text} for text in [*texts, None]]
        meta, *parts = make({"a.json": json.dumps(rows)}, f"--tokenizer={tokenizer}")
        assert 0.05 <= meta["tokens"]["val"] / sum(meta["tokens"].values()) <= 0.2
        parts = [part.replace(END, "") for part in parts]
        assert [meta["bytes"][split] for split in SPLITS] == [len(part.encode()) for part in parts]
        assert sum(map(len, parts)) == sum(map(len, texts))
        # At most one text is cut: the others are whole in one of the splits
        assert sum(text not in parts[0] and text not in parts[1] for text in texts) <= 1


def test_of_few_documents_equal_ones_are_treated_alike(make, tmp_path, bpe):
    text = "To be, or not to be, that is the question: " * 3
    make({"a.csv": "text\n" + f'"{text}"\n' * 4})
    ids = [*bpe.encode_ordinary(text), 50256]
    cut = round(0.9 * len(ids))
    assert ids_of(tmp_path / "x", "train").tolist() == [*ids[:cut], 50256] * 4
    assert ids_of(tmp_path / "x", "val").tolist() == ids[cut:] * 4


def test_a_separator_is_missing_only_if_no_file_has_it(make):
    one, two = {"a.txt": "the first--the second"}, {"a.txt": "the first--", "b.txt": "the second--"}
    for files, separator, tokens, documents in [
            (two, "--", 0, 2), (two, "ZZ", 1, 1), (one, "--", 1, 1),
            ({"a.csv": "text\na b c d\n"}, "--", 0, 1)]:
        meta = make(files, f"--separator={separator}", f"--max_tokens={tokens}",
                    "--val_fraction=0.5", "--tokenizer=char")[0]
        assert meta["source"]["documents"] == documents
    with refused("--separator='ZZ' does not occur in", "a.txt and the other texts"):
        make(two, "--separator=ZZ")


# ---- a val of one's own, the tokens of a model, marks inside texts -------------------------------

def test_val_input_is_val_and_input_is_train(make, tmp_path):
    valid, more = tmp_path / "valid.txt", tmp_path / "more.jsonl"
    valid.write_text("Val.\n" * 9)
    more.write_text('{"text": "Ay, there"}\n')
    meta, train, val = make({"train.txt": "To be.\n" * 9}, "--tokenizer=gpt2:300",
                            f"--val_input={valid},{more}")
    assert train == "To be.\n" * 9 + END and val == "Val.\n" * 9 + END + "Ay, there" + END
    assert meta["source"]["files"] == ["train.txt", "valid.txt", "more.jsonl"]
    # As TinyStories comes. max_tokens counts train alone
    valid.write_text(f"V.\n{END}\n" * 30)
    _, train, val = make({"train.txt": f"T.\n{END}\n" * 30}, "--max_tokens=5",
                         f"--val_input={valid}", "--tokenizer=gpt2:300")
    assert val == f"V.{END}" * 30 and train == f"T.{END}" * 2


def test_a_text_gets_the_tokens_of_a_run_a_data_set_or_an_exported_model(make, tmp_path, trained,
                                                                         data_dir):
    spec, text = read_meta(data_dir / "tiny_char")["tokenizer"], "a list of old letters " * 30
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text(json.dumps({"model_config": {}, "tokenizer": spec}))
    for source in trained, trained / "last.pt", data_dir / "tiny_char", exported:
        meta, *texts = make({"more.txt": text}, f"--tokenizer={source}")
        assert meta["tokenizer"] == spec and "".join(texts) == text
    words = make({"more.txt": text}, "--tokenizer=gpt2:500", name="words")[0]
    again = make({"more.txt": text}, f"--tokenizer={tmp_path / 'words'}")[0]
    assert again["sha256"] == words["sha256"]

    # What can only be assumed of weights is not taken
    oracle(n_layer=1, n_head=1, n_embd=8, vocab_size=50257).save_pretrained(tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    for source, words in [
            (trained, "lacks '?BZxö': take them out of the text"), (tmp_path / "empty", "empty"),
            (tmp_path / "theirs", "not say what its tokens are: name its data set, as data/NAME")]:
        with refused(words):
            make({"more.txt": "Zwölf Boxen? " * 9}, f"--tokenizer={source}")


@pytest.mark.parametrize("count, longest, said", [
    (150, 9, False), (150, 5000, True),
    # Of a few texts each is a large part
    (50, 5000, False)])
def test_one_text_that_is_much_of_val_is_said(make, tmp_path, capsys, count, longest, said):
    rows = [json.dumps({"text": f"Text {i} of many."}) for i in range(count)]
    val = [json.dumps({"text": "Some words. " * (longest if i == 7 else 9)}) for i in range(40)]
    (tmp_path / "val.jsonl").write_text("\n".join(val))
    make({"a.jsonl": "\n".join(rows)}, "--tokenizer=gpt2:300",
         f"--val_input={tmp_path}/val.jsonl")
    assert ("of every loss on val" in capsys.readouterr().out) == said


@pytest.mark.parametrize("name, text, counts", [
    ("a.txt", f"A {END} B.\n" * 7 + "C. " * 99, (7, 7)),
    # Such a line ends a document, unless these are characters
    ("a.txt", f"A\n{END}\nB{END}\n" + "C. " * 99, (1, 2)),
    ("a.csv", f"text\n{END} at the start and more\nand at the end {END}\n", (2, 2)),
    ("a.txt", "A. B. endoftext " * 9, (0, 0))])
def test_end_of_text_inside_a_text_is_counted_and_said(make, capsys, name, text, counts):
    advice = f"--separator='{END}'"
    for tokenizer, count in zip(("gpt2:300", "char"), counts, strict=True):
        make({name: text}, f"--tokenizer={tokenizer}")
        out = capsys.readouterr().out
        assert (f"{END} is {count} times inside the texts" in out) == (advice in out) == (count > 0)
        if count:
            make({name: text}, f"--tokenizer={tokenizer}", f"--separator={END}")
            assert advice not in capsys.readouterr().out


# ---- kills, failures, mistakes -------------------------------------------------------------------

# Kills itself before it moves a file: the nth, counted from 0
KILLED = """if True:
    import itertools, os, signal, sys, prepare_data
    left, replace = itertools.count(int(sys.argv[1]), -1), os.replace
    def killed_replace(*arguments):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
    os.replace = killed_replace
    prepare_data.main(sys.argv[2:])"""


@pytest.mark.parametrize("number", [0, 3, 5])
def test_killed_it_leaves_the_old_set_or_none_and_then_ends_the_same(tmp_path, speeches, number):
    """While the files are written; before the new ones are moved; before the last of them is."""
    argv = ["mine_char", f"--input={speeches[0] / 'parquet'}"]
    whole = contents(prepare(tmp_path / "whole", *argv))
    folder = prepare(tmp_path / "killed", "mine_char", f"--input={PLAY}")
    old = contents(folder)
    killed = python(KILLED, number, *argv, f"--data_dir={tmp_path / 'killed'}")
    assert killed.returncode == -signal.SIGKILL and list(folder.glob(".partial-*"))
    if number == 0:
        assert {name: (folder / name).read_bytes() for name in old} == old
    else:
        # train.bin may be new and val.bin old: nobody reads that mixture
        with refused("no ", "meta.json"):
            read_meta(folder)
    prepare(tmp_path / "killed", *argv)
    assert contents(folder) == whole


def test_a_failed_command_leaves_everything_as_it_was(tmp_path, speeches):
    new, old, file, taken = (tmp_path / name for name in ("new", "old", "file", "taken"))
    file.write_text("ab")
    before = contents(prepare(old, "x_char", f"--input={PLAY}"))
    for words, *arguments in [
            ("1 tokens for train and 1 for val, and each needs at least 2", f"--input={file}"),
            ("no text in column 'n', which is 0", f"--input={speeches[0] / 'jsonl'}", "--column=n"),
            ("means nothing", f"--input={speeches[0] / 'parquet'}", "--encoding=latin-1")]:
        for data_dir in (new, old):
            assert words in error_of("x_char", *arguments, f"--data_dir={data_dir}")
    assert contents(new / "x_char") == {} and contents(old / "x_char") == before
    (taken / "x_char" / "val.bin").mkdir(parents=True)
    for data_dir, words in [(file, f"cannot write {file}/x_char/lock: Not a directory"),
                            (taken, "choose another place with --data_dir")]:
        assert words in error_of("x_char", f"--input={PLAY}", f"--data_dir={data_dir}")


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


@pytest.mark.parametrize("inside", ["partial", ".", "deep/er"])
def test_texts_in_the_data_sets_own_folder_stay(tmp_path, inside):
    folder = tmp_path / "mine_char" / inside
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text("the only copy " * 30)
    error_of("mine_char", f"--input={folder}", "--max_tokens=1", f"--data_dir={tmp_path}")
    prepare(tmp_path, "mine_char", f"--input={folder}")
    assert (folder / "a.txt").read_text() == "the only copy " * 30
    assert not list((tmp_path / "mine_char").glob(".partial-*"))


@pytest.mark.parametrize("arguments, words", [
    ([], "shakespeare_char, shakespeare, plays_char, plays, openwebtext"),
    (["nope"], "name='nope': choose from shakespeare_char"),
    (["my set", "--input=a"], "a name of your own of letters, digits, '-', '_' and '.'"),
    (["x", "--input=a", "--tokenizer=gpt2:100"], "N from 257 to 50257"),
    (["x", "--input=a", "--tokenizer=out-gone"], "or the folder of a run, of a data set"),
    (["x", "--input=a", "--val_fraction=1"], "val_fraction=1.0: it must lie between 0 and 1"),
    (["x", "--input=a", "--val_fraction=0"], "--val_input=PATH names texts of your own for val"),
    (["plays", "--val_input=a"], "val_input='a': it goes with --input=PATH"),
    (["plays_char", "--val_fraction=0.3"], "val_fraction=0.3: the plays come with four of them"),
    (["x", "--input=a", "--val_input=b", "--val_fraction=0.2"], "without --val_fraction"),
    (["x", "--input=a", "--num_proc=-1"], "num_proc=-1"),
    (["x", "--input=a", "--max_tokens=-1"], "max_tokens=-1"),
    (["x", f"--input={PLAY}", "--encoding=klingon"], "unknown encoding: klingon"),
    (["x", "--input=no such.txt"], "--input='no such.txt': no such file"),
    (["x", f"--input={PLAY}", "--val_input=gone.txt"], "--val_input='gone.txt': no such file"),
    (["x", f"--input={PLAY}", "--column=title"], "--column='title' means nothing for"),
    (["x", f"--input={PLAY}", "--separator=ZZ"], "--separator='ZZ' does not occur")])
def test_wrong_settings_are_one_line(tmp_path, arguments, words):
    assert words in error_of(*arguments, f"--data_dir={tmp_path}")
