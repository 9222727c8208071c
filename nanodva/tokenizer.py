"""
Text <-> token ids: single characters, GPT-2's byte-pair tokens, or the first N of those.

A tokenizer is described by a small dict, its spec, which meta.json and every checkpoint carry:
{"kind": "char", "alphabet": "..."}, {"kind": "gpt2:4096", "tokens": "IQ== Ig== ..."} or
{"kind": "gpt2"}. Only the last needs GPT-2's files, which tiktoken fetches once; so does a
gpt2:N without tokens, as version 2 wrote it. Tokens that somebody else has trained in GPT-2's
manner are {"kind": "bpe", "tokens": "...", "end_of_text": 0}.
"""
import base64
import re
import sys

import numpy as np

from nanodva.errors import fail

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts a text into words, between which no token reaches. Written as tiktoken does: it
# gives the pieces of the published pattern and is faster.
WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")


class Tokenizer:
    """
    .spec is the dict that describes it in full, .vocab_size the number of ids, and .end_of_text
    the id that follows each document (None for characters).

    Raises UserError for an unknown kind, or where tiktoken cannot fetch GPT-2's files.
    """

    def __init__(self, spec):
        self.spec = spec
        kind = spec.get("kind")
        if kind == "char":
            self.bpe, self.end_of_text = None, None
            alphabet = code_points(spec["alphabet"])
            self.vocab_size = len(alphabet)
            # The id of every code point, where vocab_size marks one that has no id.
            self.id_of = np.full(sys.maxunicode + 1, self.vocab_size, dtype=np.uint32)
            self.id_of[alphabet] = np.arange(self.vocab_size)
        else:
            if "tokens" in spec:
                tokens = [base64.b64decode(token) for token in spec["tokens"].split()]
            else:
                tokens = gpt2_tokens()[:bpe_size(kind) - 1]
            if kind != "gpt2":
                text = " ".join(base64.b64encode(token).decode() for token in tokens)
                self.spec = spec | {"tokens": text}
            self.vocab_size = len(tokens) + 1
            self.end_of_text = spec.get("end_of_text", len(tokens))
            import tiktoken
            # GPT-2 merges two tokens only to one of a higher rank, so any number of its first
            # tokens is a tokenizer without training.
            ids = [i for i in range(self.vocab_size) if i != self.end_of_text]
            ranks = dict(zip(tokens, ids, strict=True))
            self.bpe = tiktoken.Encoding(kind, pat_str=WORDS, mergeable_ranks=ranks,
                                         special_tokens={END_OF_TEXT: self.end_of_text})

    def encode(self, text):
        """The ids of text as a list. Raises ValueError for a character not in the alphabet."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """
        The ids of text as a uint32 array. A text that spells <|endoftext|> is ordinary text.
        Raises ValueError for a character that is not in the alphabet.
        """
        if self.bpe is not None:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        ids = self.id_of[code_points(text)]
        unseen = np.flatnonzero(ids == self.vocab_size)
        if len(unseen) > 0:
            alphabet = self.spec["alphabet"]
            shown = repr(alphabet) if len(alphabet) <= 200 else \
                f"{alphabet[:40]!r}... of {len(alphabet):,} characters"
            raise ValueError(f"character {text[unseen[0]]!r} is not in the alphabet {shown}")
        return ids

    def decode(self, ids):
        """The text of ids in UTF-8, as bytes: a byte-pair token may end inside a character."""
        if self.bpe is not None:
            return self.bpe.decode_bytes(ids)
        return "".join(self.spec["alphabet"][i] for i in ids).encode()


def bpe_size(kind):
    """The vocabulary size of "gpt2" (50257) or "gpt2:N" (N). Raises UserError for other kinds."""
    number = re.fullmatch(r"gpt2:([1-9][0-9]{2,4})", str(kind))
    size = 50257 if kind == "gpt2" else int(number[1]) if number else 0
    if not 257 <= size <= 50257:
        fail(f"tokenizer={kind!r}: choose from char, gpt2, gpt2:N with N from 257 to 50257, or "
             f"a folder that holds the tokenizer of a GPT-2")
    return size


def same_tokenizer(a, b):
    """Whether two specs give a text the same ids. Version 2 wrote gpt2:N without its tokens."""
    if "tokens" in a and "tokens" in b:
        return a == b
    return a | {"tokens": ""} == b | {"tokens": ""}


def gpt2_tokens():
    """GPT-2's tokens as bytes, the one of the lowest rank first. UserError without a network."""
    import tiktoken
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    # The network, a proxy or the disk may raise anything here.
    except Exception as error:
        fail("cannot fetch GPT-2's encoder.json and vocab.bpe through tiktoken "
             f"({type(error).__name__}: {str(error)[:100]}): set TIKTOKEN_CACHE_DIR to a folder "
             "that tiktoken filled where there is a network, or use characters: "
             "--tokenizer=char; or python prepare_data.py plays_char")
    return sorted(ranks, key=ranks.get)


def code_points(text):
    """The code points of text as a uint32 array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
