"""Sampling: prompts of every kind, good and bad, and texts that follow from their seed."""
import io
import itertools
import re
import sys

import pytest
import torch
from conftest import BETWEEN, BLOCKS, command_line, refused, save_run, tiny

import sample
from model import GPT, generate, stream
from nanodva.checkpoints import load_checkpoint
from nanodva.tokenizer import Tokenizer


@pytest.fixture
def alphabet(trained):
    return load_checkpoint(trained / "best.pt")["tokenizer"]["alphabet"]


# ---- texts ---------------------------------------------------------------------------------------

def test_texts_follow_from_the_seed(texts):
    first = texts(num_samples=3, seed=1)
    assert len(set(first)) == 3
    assert all(len(text) == 22 and text.startswith("ab") for text in first)
    assert texts(num_samples=3, seed=1) == first != texts(num_samples=3, seed=2)


def test_texts_made_together_end_each_with_the_stop_token(texts, alphabet):
    settings = dict(temperature=1, max_new_tokens=40, num_samples=8)
    ended = ["".join(text.partition(" ")[:2]) for text in texts(**settings)]
    assert texts(**settings, stop_token=alphabet.index(" ")) == ended
    assert len(set(map(len, ended))) > 2


def random_model(folder, vocab_size, padding=0):
    """A random model over so many of GPT-2's tokens and padding, saved as a run in the folder."""
    model = tiny(vocab_size=vocab_size + padding, n_layer=1, n_head=1, n_embd=8)
    save_run(folder, model, {"kind": f"gpt2:{vocab_size}"})
    return model


def test_a_text_ends_with_the_stop_text_wherever_tokens_end(tmp_path, texts):
    # Rows that are no tokens are never sampled
    random_model(tmp_path, 1000, padding=100)
    settings = dict(out_dir=tmp_path, num_samples=4, temperature=2, max_new_tokens=60, top_k=0,
                    start="one stop, and")
    # Letters of two tokens, of which the second goes on
    stop = re.search(r"[a-z]([a-z]{3})", texts(**settings)[2][13:])[1]
    whole = texts(**settings)
    for text in (stop, "s", "\n", "no such text"):
        # The prompt may hold the stop text; up to the first end after it, and with it
        parts = [one[13:].partition(text) for one in whole]
        assert texts(**settings, stop=text.replace("\n", "\\n")) \
            == [settings["start"] + before + end for before, end, _ in parts]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_writes_text_in_every_precision(run, texts, tmp_path, block):
    run(block=block, max_iters=2)
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        [text] = texts(out_dir=tmp_path / "out", dtype=dtype, max_new_tokens=30)
        assert text.startswith("ab") and len(text) == 32


# ---- prompts -------------------------------------------------------------------------------------

@pytest.fixture
def written(trained, monkeypatch, capsys):
    """written(data, **settings): (texts, errors) of sample.py; data is its standard input."""
    def written(data=b"", **settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        settings = dict(out_dir=trained, max_new_tokens=20, device="cpu") | settings
        try:
            sample.main(command_line(settings))
        finally:
            out, err = capsys.readouterr()
            written.texts = out.split(BETWEEN)[:-1]
        return written.texts, err
    return written


@pytest.mark.parametrize("start, alphabet, prompt", [
    # nanoGPT's default prompt is a new line, and a shell cannot easily write one
    (r"a\n\n", "\nab", "a\n\n"), ("a\nb", "\nab", "a\nb"),
    # A word of LaTeX keeps its backslash
    (r"a \nabla", "\nab", r"a \nabla"),
    # text8 has no new line; DNA has no space either
    ("\n", "\n ab", "\n"), ("\n", " abc", " "), ("\n", "ACGT", "A")])
def test_a_prompt_is_what_was_meant(start, alphabet, prompt):
    assert sample.read_prompt(start, Tokenizer({"kind": "char", "alphabet": alphabet})) == prompt


@pytest.mark.parametrize("start", ["FILE:{}/prompt.txt", "FILE:~/prompt.txt", "-"])
def test_a_prompt_is_read_by_the_rules_for_a_text(written, tmp_path, monkeypatch, start):
    """test_readers.py has the other byte-order marks and line ends."""
    monkeypatch.setenv("HOME", str(tmp_path))
    prompt, start = tmp_path / "prompt.txt", start.format(tmp_path)
    for data in (b"\xef\xbb\xbfab c", "ab c".encode("utf-16")):
        prompt.write_bytes(data)
        [text], _ = written(data, start=start, num_samples=1)
        assert text.startswith("ab c") and len(text) == 24
    prompt.write_bytes(b"ab\xff")
    with refused("the prompt ", "is not utf-8: byte 0xff in b'ab\\xff'; save it in UTF-8"):
        written(b"ab\xff", start=start)


@pytest.mark.parametrize("length", [16, 17, 1000])
def test_of_a_long_prompt_all_is_printed_and_the_newest_window_read(written, alphabet, monkeypatch,
                                                                    length):
    seen, forward = [], GPT.forward

    def watched(self, idx, *args, **options):
        seen.append(idx[0].tolist())
        return forward(self, idx, *args, **options)
    monkeypatch.setattr(GPT, "forward", watched)
    prompt = ("a" * 1000 + "bcdefghijklmnopr")[-length:]
    [text], err = written(num_samples=1, start=prompt)
    assert text.startswith(prompt) and len(text) == length + 20
    assert seen[0] == [alphabet.index(character) for character in prompt[-16:]]
    said = f"the prompt has {length:,} tokens: the model reads the newest 16, its window\n"
    assert err == (said if length > 16 else "")


def test_prompt_after_prompt_is_read_until_the_end_of_input(written, texts):
    found, err = written(b"ab\n\nab", interactive=True)
    assert [len(text) for text in found] == [22, 21, 22] and err == ""
    # An empty line is the default prompt, and a prompt again gives another text
    assert found[0] == texts()[0] != found[2] and found[1][0] == " "
    found, err = written(b"abZ\na\xff\nab\r\nab", interactive=True, num_samples=2)
    assert re.fullmatch(r"error: .* lacks 'Z': .*\nerror: .* lacks '\\udcff': .*\n", err)
    assert len(found) == 4 and found[:2] == texts(num_samples=2)


def test_end_of_text_alone_is_its_token_and_in_a_text_it_is_text():
    gpt2 = Tokenizer({"kind": "gpt2"})
    assert sample.encode_prompt("<|endoftext|>", gpt2) == [50256]
    assert len(sample.encode_prompt("a<|endoftext|>", gpt2)) > 2


def test_characters_that_span_tokens_are_put_together(tmp_path, texts):
    model, tokenizer = random_model(tmp_path, 257), Tokenizer({"kind": "gpt2:257"})
    found = texts(out_dir=tmp_path, num_samples=2, start="é", max_new_tokens=100, temperature=2,
                  top_k=0)
    torch.manual_seed(1337)
    rows = generate(model, torch.tensor([tokenizer.encode("é")] * 2), 100, temperature=2).tolist()
    for text, row in zip(found, rows, strict=True):
        # A last character that is cut off is not written
        assert text.rstrip("\ufffd") == tokenizer.decode(row).decode(errors="replace").rstrip(
            "\ufffd")


# ---- what is refused -----------------------------------------------------------------------------

def test_last_is_sampled_if_there_is_no_best_and_without_both_the_whole_path_is_named(
        texts, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "nothing"):
        with refused(f"no {tmp_path / folder}/best.pt: train first"):
            texts(out_dir=folder)
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    assert len(texts(out_dir=".")[0]) == 22


@pytest.mark.parametrize("settings, words", [
    (dict(temperature=-1), "temperature=-1.0: it must be at least 0"), (dict(top_k=-5), "top_k=-5"),
    (dict(num_samples=0), "num_samples=0"), (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(seed=-1), "seed=-1"), (dict(top_p=0), "top_p=0.0: it must be"),
    (dict(top_p=1.5), "top_p=1.5: it must be"), (dict(stop_token=-2), "stop_token=-2"),
    (dict(device="cuda:77"), "is not on this machine"), (dict(dtype="int8"), "dtype='int8'"),
    (dict(strat="a"), "did you mean 'start'?"), (dict(start=""), "start is empty"),
    (dict(start="FILE:/dev/null"), "start is empty"),
    (dict(start="abZ"), "alphabet ' abcdefghijklmnoprstuvwé' lacks 'Z'"),
    # A byte that is not UTF-8, as the shell hands it over
    (dict(start="a\udcff"), "lacks '\\udcff'"), (dict(stop_token=99), "the last id is 23"),
    (dict(start="FILE:no  where"), "cannot read the prompt no  where: No such file or directory"),
    (dict(start="FILE:/"), "cannot read the prompt /: Is a directory; name a text, as in --start="),
    (dict(interactive=True), "with --interactive prompts come from standard input")], ids=str)
def test_a_wrong_setting_is_named(texts, settings, words):
    with refused(words):
        texts(**settings)


def test_an_interrupted_text_is_shown_as_far_as_it_came(written, monkeypatch):
    def interrupted(*args):
        yield from itertools.islice(stream(*args), 5)
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(num_samples=2, start="ab")
    assert [len(text) for text in written.texts] == [7, 7]
    found, err = written(b"ab\nab", interactive=True, num_samples=2)
    assert [len(text) for text in found] == [7] * 4 and err == "stopped\nstopped\n"
