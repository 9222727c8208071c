"""
GPT-2 in Hugging Face format: a folder with config.json, weights, and the files of a tokenizer.
"""
import base64
import hashlib
import json
import math
from pathlib import Path

from nanodva.errors import UserError, fail
from nanodva.tokenizer import END_OF_TEXT

# GPT-2's vocabulary, and the table of a multiple of 64 rows that nanoGPT makes for it
TOKENS, PADDED = 50257, 50304
# What config.json may say for a model to be this GPT-2. Where it says nothing, transformers takes
# the first.
CONFIG = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True],
    "add_cross_attention": [False]}
# sha256 of GPT-2's tokens as a spec has them
GPT2_TOKENS = "445c95aed02d34f9cebfeeba666b08c9aebb5419c128c1c8e6995ac1a15f28b9"
# The files write each byte as one visible character: its own where it has one, and else one of
# those from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = sorted(set(range(256)) - set(VISIBLE))
LETTERS = dict(zip(VISIBLE + INVISIBLE, map(chr, VISIBLE + [*range(256, 324)]), strict=True))


# ---- the model ----------------------------------------------------------------------------------

def download(repository):
    """The folder in the hub's cache that holds a repository's config.json and weights."""
    from huggingface_hub import constants, hf_hub_download
    try:
        paths = [hf_hub_download(repository, name) for name in ("config.json", "model.safetensors")]
    except Exception as error:
        # whatever the network, a proxy or the disk come up with
        fail(f"cannot fetch {repository} from {constants.ENDPOINT} ({type(error).__name__}): where "
             f"there is a network, run  hf download {repository} --local-dir=FOLDER  and come back "
             f"with --init_from=FOLDER")
    return Path(paths[0]).parent


def read_folder(folder):
    """
    {"model", "model_config", "tokenizer"} of a folder that transformers saved, or tools.convert.
    The last is None where the folder has no tokenizer. Raises UserError.
    """
    try:
        theirs, state = dict(json.loads((folder / "config.json").read_bytes())), read_state(folder)
    except ImportError:
        fail(f"{folder} needs the package safetensors:  pip install safetensors")
    except UserError:
        raise
    except Exception as error:
        # json, safetensors and torch raise a dozen kinds for a damaged file
        fail(f"{folder} is damaged, or no model in Hugging Face format: {str(error)[:200]}")
    if "model_config" in theirs:
        state = {name.removeprefix("gpt."): p for name, p in state.items()}
        return {"model": state, "model_config": theirs["model_config"],
                "tokenizer": theirs.get("tokenizer")}
    for key, allowed in CONFIG.items():
        if theirs.get(key, allowed[0]) not in allowed:
            fail(f"{folder}/config.json: {key}={theirs[key]!r} is not GPT-2: it has "
                 f"{' or '.join(map(repr, allowed))}")
    weights = {}
    for name, p in state.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        # transformers' Conv1D keeps its matrices as (in, out)
        is_conv1d = name.startswith("transformer.h.") and p.dim() == 2
        weights[name] = p.T if is_conv1d else p
    rows = theirs.get("vocab_size")
    spec = theirs.get("nanodva_tokenizer") or read_tokenizer(folder, rows)
    if rows == PADDED and spec in (None, {"kind": "gpt2"}):
        # Padded rows are no tokens, and would take part in the softmax
        rows = TOKENS
        for name in ("transformer.wte.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:TOKENS]
    config = {"n_layer": theirs.get("n_layer"), "n_head": theirs.get("n_head"),
              "n_embd": theirs.get("n_embd"), "block_size": theirs.get("n_positions"),
              "vocab_size": rows, "bias": True,
              "gelu": "exact" if theirs.get("activation_function") == "gelu" else "tanh"}
    return {"model": weights, "model_config": config, "tokenizer": spec}


def read_state(folder):
    """The state dict in a folder, where it may be cut into several files with an index."""
    from safetensors.torch import load_file as load_safetensors

    # prepare_data.py wants the tokenizers of this module, and needs no torch
    from nanodva.checkpoints import load_file
    for name, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_file)):
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if (folder / files[0]).exists():
            return {key: p for file in files for key, p in load(folder / file).items()}
    fail(f"no model.safetensors and no pytorch_model.bin beside {folder / 'config.json'}")


# ---- the tokenizer ------------------------------------------------------------------------------

def read_tokenizer(folder, rows=None):
    """
    The spec, for Tokenizer, of the tokenizer in a folder, or None where the folder has none. Its
    tokens may be others than GPT-2's. Raises UserError for one that does not work as GPT-2's does,
    and for one of more tokens than the weights have rows, if that is given.
    """
    try:
        if (folder / "tokenizer.json").exists():
            parts = json.loads((folder / "tokenizer.json").read_bytes())
            words, ids = parts["pre_tokenizer"], parts["model"]["vocab"]
            # Older versions wrote a pair as one text
            merges = [pair.split(" ") if isinstance(pair, str) else pair
                      for pair in parts["model"]["merges"]]
            as_gpt2 = words["type"] == "ByteLevel" and words.get("use_regex", True) \
                and not words["add_prefix_space"] and parts["normalizer"] is None
        elif (folder / "vocab.json").exists():
            ids = json.loads((folder / "vocab.json").read_bytes())
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line.split(" ") for line in lines if not line.startswith("#version")]
            settings = folder / "tokenizer_config.json"
            settings = json.loads(settings.read_bytes()) if settings.exists() else {}
            as_gpt2 = not settings.get("add_prefix_space")
        else:
            return None
        if len(ids) > (rows or math.inf):
            raise ValueError(f"{len(ids)} tokens, and the weights have {rows}")
        end = ids.get(END_OF_TEXT)
        if end is None and (folder / "config.json").exists():
            # Some call it </s>
            end = json.loads((folder / "config.json").read_bytes()).get("eos_token_id")
        byte_of = {letter: byte for byte, letter in LETTERS.items()}
        tokens = [bytes(byte_of[letter] for letter in word)
                  for word in sorted(ids, key=ids.get) if ids[word] != end]
        text = " ".join(base64.b64encode(token).decode() for token in tokens)
        if as_gpt2 and hashlib.sha256(text.encode()).hexdigest() == GPT2_TOKENS:
            return {"kind": "gpt2"}
        # tiktoken joins the two tokens whose union has the lowest id, and these files name the
        # pairs to join: it is the same if each of them is what tiktoken would have joined last.
        joined, letters = [left + right for left, right in merges], set(LETTERS.values())
        special = ids.keys() - letters - set(joined)
        as_gpt2 = as_gpt2 and end in ids.values() and letters <= ids.keys() \
            and sorted(ids.values()) == list(range(len(ids))) \
            and joined == sorted(joined, key=lambda word: ids[word]) \
            and all(last_merge(left + right, ids) == [left, right] for left, right in merges) \
            and not any(word.isalpha() for word in special)
    except (OSError, ValueError, TypeError, LookupError) as error:
        fail(f"cannot read the tokenizer in {folder}: {type(error).__name__}: {error}")
    if not as_gpt2:
        fail(f"the tokenizer in {folder} does not work as GPT-2's does, and with other tokens its "
             f"weights would write nonsense: use transformers for this model")
    return {"kind": "bpe", "tokens": text, "end_of_text": end}


def last_merge(token, ranks):
    """
    The two tokens that byte-pair encoding joins last when it makes `token`, a text or bytes. It
    starts from single letters or bytes, and joins the pair of the lowest rank first.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
        parts[first:first + 2] = [pairs[first]]
    return parts


def write_tokenizer(folder, tokenizer):
    """Write the files from which transformers' AutoTokenizer makes this tokenizer."""
    if tokenizer.bpe is None:
        alphabet = tokenizer.spec["alphabet"]
        # Each character is a word of its own. One that is not in the alphabet raises an error.
        words = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                 "invert": False}
        model = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(alphabet)},
                 "unk_token": "<unk>"}
        files = {"tokenizer.json": {"version": "1.0", "added_tokens": [], "pre_tokenizer": words,
                                    "model": model, "decoder": {"type": "Fuse"}},
                 "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    else:
        ids = {"".join(LETTERS[byte] for byte in tokenizer.decode([i])): i
               for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text}
        pairs = [last_merge(word, ids) for word in sorted(ids, key=ids.get) if len(word) > 1]
        # A token that no two others make is a special one, such as <pad>
        merges = [f"{left} {right}" for left, right in pairs if left in ids and right in ids]
        text = "\n".join(["#version: 0.2", *merges, ""])
        (folder / "merges.txt").write_text(text, encoding="utf-8")
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        files = {"vocab.json": ids | {END_OF_TEXT: tokenizer.end_of_text},
                 "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"} | special}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
