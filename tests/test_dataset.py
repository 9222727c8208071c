"""dataset.py: what meta.json promises, and what nanoGPT has prepared."""
import hashlib
import json
import pickle

import numpy as np
import pytest
from conftest import PLAY, contents, error_of, ids_of, prepare, refused

from nanodva.dataset import read_meta
from prepare_data import main


def test_check_and_read_meta_refuse_what_meta_does_not_describe(tmp_path, capsys):
    check = ["shakespeare_char", "--check", f"--data_dir={tmp_path}"]
    assert f"no {tmp_path}/shakespeare_char/train.bin: run python prepare_data.py" in \
        error_of(*check)
    folder = prepare(tmp_path, "shakespeare_char", f"--input={PLAY}")
    main(check)
    assert "shakespeare_char is sound: 170,532 tokens" in capsys.readouterr().out
    good = contents(folder)
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
    assert "val.bin holds ids above 67, vocab_size is 68" in message


def test_a_missing_file_is_shown_with_its_whole_path_and_a_command_for_a_shell(tmp_path,
                                                                               monkeypatch):
    """Somebody may have gone to another folder, or have given a path as the name."""
    monkeypatch.chdir(tmp_path)
    for folder, words in [
            ("data/mine", f"no {tmp_path}/data/mine/train.bin: run python prepare_data.py mine "),
            ("data/data/mine", f"no {tmp_path}/data/data/mine/train.bin: "),
            ("my data/mine", "run python prepare_data.py mine --input=PATH '--data_dir=my data'")]:
        with refused(words):
            read_meta(folder)


# ---- nanoGPT's -----------------------------------------------------------------------------------

def save_as_nanogpt(folder, text, itos, encode):
    folder.mkdir()
    for split, part in [("train", text[:4500]), ("val", text[4500:5000])]:
        np.array(encode(part), dtype=np.uint16).tofile(folder / f"{split}.bin")
    if itos:
        stoi = {character: i for i, character in itos.items()}
        (folder / "meta.pkl").write_bytes(
            pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}))


def test_nanogpts_characters_are_adopted(tmp_path):
    text = PLAY.read_text()
    # Not in the order of their code points
    itos = dict(enumerate(sorted(set(text[:5000]), reverse=True)))
    stoi = {character: i for i, character in itos.items()}
    with refused("train.bin is missing or not nanoGPT's: it holds ids in uint16"):
        main(["x", "--adopt", f"--data_dir={tmp_path}"])
    save_as_nanogpt(tmp_path / "x", text, itos, lambda part: [stoi[c] for c in part])
    with refused("--adopt"):
        read_meta(tmp_path / "x")
    main(["x", "--adopt", f"--data_dir={tmp_path}"])
    meta = read_meta(tmp_path / "x", deep=True)
    assert meta["tokenizer"] == {"kind": "char", "alphabet": "".join(itos.values())}
    assert meta["tokens"] == {"train": 4500, "val": 500}
    assert meta["bytes"]["train"] == len(text[:4500].encode())
    assert ids_of(tmp_path / "x", "train").tolist() == [stoi[c] for c in text[:4500]]
    assert "nothing to adopt" in error_of("x", "--adopt", f"--data_dir={tmp_path}")


def test_nanogpts_bpe_is_adopted(tmp_path, bpe):
    save_as_nanogpt(tmp_path / "x", PLAY.read_text(), None,
                    lambda part: [*bpe.encode_ordinary(part), 50256])
    main(["x", "--adopt", f"--data_dir={tmp_path}"])
    meta = read_meta(tmp_path / "x", deep=True)
    assert meta["tokenizer"]["kind"] == "gpt2"
    assert meta["bytes"]["train"] == len(PLAY.read_text()[:4500].encode())


class Call:
    def __reduce__(self):
        return eval, ("1/0",)


def test_characters_without_a_meta_pkl_are_not_taken_for_gpt2s_tokens(tmp_path):
    save_as_nanogpt(tmp_path / "x", PLAY.read_text(), None, lambda part: [7, 99] * len(part))
    assert "no meta.pkl that names them" in error_of("x", "--adopt", f"--data_dir={tmp_path}")
    assert not (tmp_path / "x" / "meta.json").exists()


@pytest.mark.parametrize("content, words", [
    (pickle.dumps({"itos": Call()}), "it calls for builtins.eval"), (b"no pickle", "meta.pkl"),
    (pickle.dumps({"itos": {0: "ab", 1: "c"}}), "not single characters"),
    (pickle.dumps({"vocab_size": 5}), "KeyError"), (pickle.dumps([1]), "TypeError"),
    (pickle.dumps({"itos": {0: "a", 2: "c"}}), "KeyError"), (b"", "EOFError"),
    (pickle.dumps({"itos": {0: "a", 1: "b"}}), "ids that meta.pkl lacks (index 7 is out")])
def test_another_meta_pkl_is_refused_and_runs_nothing(tmp_path, content, words):
    save_as_nanogpt(tmp_path / "x", PLAY.read_text(), None, lambda part: [7] * len(part))
    (tmp_path / "x" / "meta.pkl").write_bytes(content)
    assert words in error_of("x", "--adopt", f"--data_dir={tmp_path}")
    assert not (tmp_path / "x" / "meta.json").exists()
