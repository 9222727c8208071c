"""dataset.py: what meta.json promises, and what nanoGPT has prepared."""
import json
import pickle

import numpy as np
import pytest
from conftest import PLAY, contents, error_of, ids_of, prepare, refused

from nanodva.dataset import read_meta
from prepare_data import main


def test_check_and_read_meta_refuse_what_meta_does_not_describe(tmp_path, capsys):
    check = ["shakespeare_char", "--check", f"--data_dir={tmp_path}"]
    assert f"no {tmp_path}/shakespeare_char/meta.json: run python prepare_data.py" in \
        error_of(*check)
    folder = prepare(tmp_path, "shakespeare_char", f"--input={PLAY}")
    main(check)
    assert "shakespeare_char is sound: 170,532 tokens" in capsys.readouterr().out
    good = contents(folder)
    train, meta = good["train.bin"], json.loads(good["meta.json"])
    for words, files in [
            ("does not hold 170532 tokens", {"train.bin": train[:-1]}),
            ("sha256", {"train.bin": b"\0" + train[1:]}), ("JSON", {"meta.json": b"{"}),
            ("format", {"meta.json": meta | {"format": 2}}), ("TypeError", {"meta.json": []}),
            *((key, {"meta.json": {name: meta[name] for name in meta if name != key}}) for key in
              ("dtype", "tokens", "sha256"))]:
        for name, data in (good | files).items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            (folder / name).write_bytes(data)
        assert words in error_of(*check)


def test_a_missing_file_is_shown_with_its_whole_path_and_a_command_for_a_shell(tmp_path,
                                                                               monkeypatch):
    """Somebody may have gone to another folder, or have given a path as the name."""
    monkeypatch.chdir(tmp_path)
    for folder, words in [
            ("data/mine", f"no {tmp_path}/data/mine/meta.json: run python prepare_data.py mine "),
            ("data/data/mine", f"no {tmp_path}/data/data/mine/meta.json: "),
            ("my data/mine", "run python prepare_data.py mine '--data_dir=my data'")]:
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
    text, adopt = PLAY.read_text(), ["x", "--adopt", f"--data_dir={tmp_path}"]
    # Not in the order of their code points
    itos = dict(enumerate(sorted(set(text[:5000]), reverse=True)))
    stoi = {character: i for i, character in itos.items()}
    assert "x does not hold nanoGPT's train.bin and val.bin of uint16" in error_of(*adopt)
    save_as_nanogpt(tmp_path / "x", text, itos, lambda part: [stoi[c] for c in part])
    with refused("--adopt"):
        read_meta(tmp_path / "x")
    main(adopt)
    meta = read_meta(tmp_path / "x", deep=True)
    assert meta["tokenizer"] == {"kind": "char", "alphabet": "".join(itos.values())}
    assert meta["tokens"] == {"train": 4500, "val": 500}
    assert meta["bytes"]["train"] == len(text[:4500].encode())
    assert ids_of(tmp_path / "x", "train").tolist() == [stoi[c] for c in text[:4500]]
    assert "nothing to adopt" in error_of(*adopt)


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


@pytest.mark.parametrize("content, words", [
    (pickle.dumps({"itos": Call()}), "it calls for builtins.eval"), (b"no pickle", "meta.pkl"),
    (pickle.dumps({"itos": {0: "ab", 1: "c"}}), "not single characters"),
    (pickle.dumps({"vocab_size": 5}), "KeyError"), (pickle.dumps([1]), "TypeError"),
    (pickle.dumps({"itos": {0: "a", 2: "c"}}), "KeyError"), (b"", "EOFError"),
    (pickle.dumps({"itos": {0: "a", 1: "b"}}), "IndexError: index 7 is out"),
    # Characters, which are not taken for GPT-2's tokens
    (None, "no meta.pkl names them")])
def test_another_meta_pkl_is_refused_and_runs_nothing(tmp_path, content, words):
    save_as_nanogpt(tmp_path / "x", PLAY.read_text(), None, lambda part: [7] * len(part))
    if content is not None:
        (tmp_path / "x" / "meta.pkl").write_bytes(content)
    assert words in error_of("x", "--adopt", f"--data_dir={tmp_path}")
    assert not (tmp_path / "x" / "meta.json").exists()
