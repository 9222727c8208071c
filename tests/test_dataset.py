"""dataset.py: what meta.json promises, and what nanoGPT has prepared."""
import json
import pickle

import numpy as np
import pytest
from conftest import PLAY, contents, error_of, prepare, refused

from nanodva.dataset import SPLITS, read_meta
from nanodva.tokenizer import Tokenizer
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

def save_as_nanogpt(folder, ids, itos=None):
    """nanoGPT's files with these ids (train, val); itos is {id: character}."""
    folder.mkdir()
    for split, numbers in zip(SPLITS, ids, strict=True):
        np.array(numbers, dtype=np.uint16).tofile(folder / f"{split}.bin")
    if itos:
        stoi = {character: i for i, character in itos.items()}
        (folder / "meta.pkl").write_bytes(
            pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}))


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_nanogpts_data_sets_are_adopted(tmp_path, bpe, kind):
    texts = PLAY.read_text()[:4500], PLAY.read_text()[4500:5000]
    adopt = ["x", "--adopt", f"--data_dir={tmp_path}"]
    assert "x does not hold nanoGPT's train.bin and val.bin of uint16" in error_of(*adopt)
    if kind == "char":
        # Not in the order of their code points
        alphabet = "".join(sorted(set("".join(texts)), reverse=True))
        ids = [[alphabet.index(character) for character in text] for text in texts]
        save_as_nanogpt(tmp_path / "x", ids, dict(enumerate(alphabet)))
        spec = {"kind": "char", "alphabet": alphabet}
    else:
        ids = [[*bpe.encode_ordinary(text), 50256] for text in texts]
        save_as_nanogpt(tmp_path / "x", ids)
        spec = Tokenizer({"kind": "gpt2"}).spec
    with refused("--adopt"):
        read_meta(tmp_path / "x")
    main(adopt)
    meta = read_meta(tmp_path / "x", deep=True)
    assert meta["tokenizer"] == spec
    for split, text, numbers in zip(SPLITS, texts, ids, strict=True):
        assert meta["tokens"][split] == len(numbers)
        assert meta["bytes"][split] == len(text.encode())
    assert "nothing to adopt" in error_of(*adopt)


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
    save_as_nanogpt(tmp_path / "x", ([7] * 99, [7] * 9))
    if content is not None:
        (tmp_path / "x" / "meta.pkl").write_bytes(content)
    assert words in error_of("x", "--adopt", f"--data_dir={tmp_path}")
    assert not (tmp_path / "x" / "meta.json").exists()
