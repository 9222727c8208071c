"""Settings: what a command line or a preset may say, and that whatever it says ends in settings or in one line."""
import contextlib
import io
import keyword
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import one_error, run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
import prepare_data
import sample
import train
from prepare_data import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

PRESETS = sorted(str(path) for path in Path(config.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.fixture
def refused(capsys):
    """refused(cls, *argv): the one line with which that command line is refused."""
    return lambda cls, *argv: one_error(run_main(lambda argv: config.load(cls, argv), list(argv), capsys))


@pytest.fixture
def preset(tmp_path):
    """preset(text): the path of a preset file that says so."""
    def preset(text):
        path = tmp_path / "preset.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return preset


@pytest.mark.parametrize("path", PRESETS)
def test_every_preset_loads(path):
    changed = config.read(TrainConfig, [path])
    cfg = config.load(TrainConfig, [path])
    assert len(changed) >= 5 and all(getattr(cfg, name) == value for name, value in changed.items())


def test_later_wins(preset):
    path = preset("n_layer = 3\nbatch_size = 5")
    assert config.load(TrainConfig, [path, "--n_layer=4"]).n_layer == 4
    cfg = config.load(TrainConfig, ["--n_layer=4", path])
    assert (cfg.n_layer, cfg.batch_size, cfg.n_head) == (3, 5, TrainConfig.n_head)


@pytest.mark.parametrize("argument, name, value", [
    ("--max_iters=1e1", "max_iters", 10), ("--weight_decay=0", "weight_decay", 0.0), ("--compile", "compile", True),
    ("--compile=auto", "compile", "auto"), ("--compile=false", "compile", False), ("--eval_only", "eval_only", True),
    ("--eval_only=true", "eval_only", True), ("--eval_only=False", "eval_only", False), ("--dataset=3", "dataset", "3"),
    ("--out_dir=a=b=c", "out_dir", "a=b=c"), ("--out_dir='q'", "out_dir", "'q'"), ("--wandb_run_name=", "wandb_run_name", ""),
    ("--out_dir=true", "out_dir", "true"), ("--gradient_accumulation_steps=5*8", "gradient_accumulation_steps", 40),
    ("--learning_rate=6e-4", "learning_rate", 6e-4), ("--learning_rate=1", "learning_rate", 1.0), ("--n_layer= 3", "n_layer", 3),
    ("--n_layer=2**3-1", "n_layer", 7), ("--batch_size=+4", "batch_size", 4), ("--out_dir=--x", "out_dir", "--x")])
def test_arguments(argument, name, value):
    found = getattr(config.load(TrainConfig, [argument]), name)
    assert found == value and type(found) is type(value)


def test_start_is_text():
    assert config.load(SampleConfig, ["--start=3"]).start == "3"
    assert config.load(SampleConfig, ["--start=a = b\n# no comment"]).start == "a = b\n# no comment"


@pytest.mark.parametrize("argument, message", [
    ("--n_layr=6", "unknown setting 'n_layr' on the command line: did you mean 'n_layer'?"),
    ("--zzz=1", "unknown setting 'zzz' on the command line: --help lists them all"), ("--=3", "unknown setting ''"),
    ("n_layer=3", "neither a preset (config/NAME.py) nor a setting (--key=value)"), ("-x", "neither a preset"),
    ("--n_layer", "n_layer=True on the command line: it must be a whole number"), ("--n_layer=2.5", "a whole number"),
    ("--n_layer=six", "n_layer='six' on the command line: it must be a whole number"), ("--n_layer=nan", "a whole number"),
    ("--n_layer=True", "a whole number"), ("--learning_rate=True", "a number"), ("--learning_rate=fast", "it must be a number"),
    ("--learning_rate=1e999", "a number"), ("--learning_rate=10**400", "a number"), ("--n_layer=1" + "0" * 5000, "a whole number"),
    ("--n_layer=" + "*".join(["10**1000"] * 6), "a huge number"), ("--n_layer=1e300", "a whole number"), ("--n_layer=9**9**9", "a whole"),
    ("--n_layer=(-8)**0.5", "a whole number"), ("--n_layer=1/0", "a whole number"), ("--n_layer=[1]", "a whole number"),
    ("--n_layer=__import__('os')", "a whole number"), ("--eval_only=1", "eval_only=1 on the command line: it must be True or False"),
    ("--eval_only=yes", "True or False"), ("--out_dir=a\0b", "it must be text"), ("--compile=maybe", "there are True, False, auto"),
    ("--block=dvaa", "block='dvaa': there are gpt2, dva"), ("--n_head=5", "n_embd=768 does not divide into n_head=5 heads"),
    ("--dropout=1", "dropout=1.0: it must be below 1"), ("--dropout=-0.1", "dropout=-0.1: it must be at least 0"),
    ("--bank_layers=13", "bank_layers=13: it must be at most n_layer=12"), ("--beta2=1", "both must be below 1"),
    ("--min_lr=1", "min_lr=1.0 is above learning_rate=0.0006"), ("--batch_size=0", "batch_size=0: it must be at least 1"),
    ("--max_iters=-1", "max_iters=-1: it must be at least 0"), ("--dtype=float8", "dtype='float8': there are auto, float32"),
    ("--init_from=nowhere", "init_from='nowhere': there are "), ("--optimizer=sgd", "optimizer='sgd': there are adamw, muon"),
    ("--seed=-1", "seed=-1: it must be at least 0"), ("--n_layer=" + "-" * 20000 + "1", "a whole number"),
    ("--n_layer=" + "(" * 500 + "1" + ")" * 500, "a whole number"), ("nowhere.py", "cannot read the preset nowhere.py")], ids=lambda v: v[:40])
def test_wrong_arguments_are_named(refused, argument, message):
    error = refused(TrainConfig, argument)
    assert message in error and len(error) < 400


@pytest.mark.parametrize("text, message", [
    ("n_layr = 6", "unknown setting 'n_layr' in {path}: did you mean 'n_layer'?"), ("n_layer = 'six'", "it must be a whole number"),
    ("import os", "line 1: a preset holds assignments"), ("import time, os", "line 1: a preset holds"), ("from os import *", "line 1"),
    ("x = __import__('os').mkdir('{harm}')", "line 1: x: "), ("__import__('os').mkdir('{harm}')", "line 1: a preset holds"),
    ("n_layer = 1\nout_dir = open('{harm}', 'w').name", "line 2: out_dir: "), ("n_layer = batch_size", "neither a literal"),
    ("n_layer = [6]", "neither a literal"), ("out_dir = f'{harm}'", "neither a literal"), ("out_dir = 'ab' * 3", "neither a literal"),
    ("n_layer: int = 6", "a preset holds assignments"), ("n_layer = n_head = 6", "a preset holds"), ("n_layer += 6", "a preset holds"),
    ("if True: n_layer = 6", "a preset holds"), ("def f(): pass", "a preset holds"), ("n_layer = 6 if 1 else 7", "neither a literal"),
    ("n_layer = (lambda: 6)()", "neither a literal"), ("n_layer = 1 / 0", "line 1: n_layer: division by zero"),
    ("n_layer = 9**9**9", "neither a literal"), ("n_layer = 6;;", "is not a preset"), ("n_layer = = 6", "is not a preset"), ("\0", "is not a preset"),
    (b"out_dir = '\xff'", "is not a preset"), ("n_layer = " + "-" * 20000 + "1", "preset.py"), ("out_dir = 3", "it must be text"),
    ("out_dir = 'a\\0b'", "it must be text"), ("# coding: nonsense\nn_layer = 6", "is not a preset"), ("1 + 1", "a preset holds")], ids=lambda v: repr(v)[:40])
def test_wrong_presets_are_named_and_never_executed(refused, preset, tmp_path, text, message):
    harm = tmp_path / "harm"
    path = preset(text.replace("{harm}", str(harm)) if isinstance(text, str) else text)
    assert message.replace("{path}", path) in refused(TrainConfig, path)
    assert not harm.exists()


def test_what_a_preset_may_say(preset):
    """Comments, doc strings, arithmetic, text put together, and what nanoGPT's own presets say."""
    cfg = config.load(TrainConfig, [preset('''"""For a test."""
import time
# a comment
out_dir = "a" + 'b'
wandb_run_name = "ft-" + str(time.time())
gradient_accumulation_steps = 5 * 8
max_iters = 10 // 3 + 2 ** 3 - 7 % 4
learning_rate = -(-1e-3)
min_lr = 1e-3 / 10
compile = False
''')])
    assert (cfg.out_dir, cfg.gradient_accumulation_steps, cfg.max_iters, cfg.learning_rate, cfg.min_lr, cfg.compile) \
        == ("ab", 40, 8, 1e-3, 1e-4, False) and re.fullmatch(r"ft-\d+\.\d+", cfg.wandb_run_name)


@pytest.mark.parametrize("cls, main", [(TrainConfig, train.main), (SampleConfig, sample.main), (PrepareConfig, prepare_data.main)])
def test_help_lists_every_setting(cls, main, capsys):
    status, out, err = run_main(main, ["--help"], capsys)
    assert status == 0 and not err
    for f in fields(cls):
        line, = re.findall(rf"^  --{f.name}=.*$", out, re.MULTILINE)
        name, kind, meaning = re.fullmatch(r"  --(\w+)=.*? +(int|float|bool|str|bool \| str|text) +(\S.*)", line).groups()
        assert name == f.name and str(f.default).strip("\n") in line and len(meaning) >= 5


# ---- hundreds of command lines that nobody would write ----------------------------------------------------------------

NAMES = [f.name for f in fields(TrainConfig)]
names = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES).map(lambda name: name[:-1]), st.sampled_from(keyword.kwlist),
                  st.text(max_size=12))
numbers = st.one_of(st.integers(), st.floats(), st.integers(-4, 70)).map(repr)
words = st.sampled_from(["True", "False", "true", "None", "auto", "cpu", "dva", "gpt2", "adamw", "float32", "''", '"a"', "1e4", "1e999",
                         "nan", "inf", "1j", "...", "[]", "()", "{}", "b'x'", "'''", "9" * 5000, "n_layer", "time.time()", "str(time.time())"])
values = st.recursive(st.one_of(numbers, words, st.text(max_size=12), st.text(max_size=8).map(repr)), lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<<", "@", " if ", "=", ","]), inner).map("".join),
    inner.map("-{}".format), inner.map("({})".format), inner.map("-({})".format)), max_leaves=5)
lines = st.tuples(names, st.sampled_from(["=", " = ", ":", "+=", "==", " "]), values).map("".join)
statements = st.one_of(lines, lines, st.sampled_from(["# text", '"""text"""', "import time", "import os", "pass", "\tx", "\\", ""]))
presets = st.one_of(st.lists(statements, max_size=6).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
                    st.binary(max_size=40))
command_lines = st.lists(st.one_of(st.tuples(names, st.sampled_from(["=", "=", "=", ""]), values).map(lambda t: "--" + "".join(t)),
                                   st.tuples(st.sampled_from(NAMES), numbers).map("--{0[0]}={0[1]}".format),
                                   st.text(max_size=10)), max_size=4)


def settings_or_one_line(cls, argv):
    """The parser's promise: a valid dataclass, or exit status 2 after one line (0 after --help). True for the former."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            cfg = config.load(cls, argv)
    except SystemExit as end:
        assert end.code == 0 or end.code == 2 and re.fullmatch(r"error: [^\n]+\n", err.getvalue()), (argv, err.getvalue())
        return False
    assert all(isinstance(getattr(cfg, f.name), f.type) for f in fields(cls))
    cls(**vars(cfg))                                                   # valid once, valid again
    return True


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(command_lines, st.sampled_from([TrainConfig, SampleConfig, PrepareConfig]))
def test_any_command_line(argv, cls):
    settings_or_one_line(cls, argv)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(presets)
def test_any_preset(text):
    with tempfile.NamedTemporaryFile(suffix=".py") as file:
        file.write(text)
        file.flush()
        settings_or_one_line(TrainConfig, [file.name])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(TrainConfig) if f.type in (int, float)]),
                       st.integers(0, 20), max_size=5))
def test_what_is_written_is_what_is_read(given_settings):
    """The same settings from a preset, from the command line and given to the dataclass itself."""
    argv = [f"--{name}={value}" for name, value in given_settings.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write("\n".join(f"{name} = {value}" for name, value in given_settings.items()))
        file.flush()
        try:
            expected = TrainConfig(**given_settings)
        except ValueError:
            assert not settings_or_one_line(TrainConfig, argv) and not settings_or_one_line(TrainConfig, [file.name])
        else:
            assert config.load(TrainConfig, argv) == config.load(TrainConfig, [file.name]) == expected
