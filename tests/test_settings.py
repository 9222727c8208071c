"""Settings: what a command line or a preset may say; all else ends in one line of error."""
import contextlib
import io
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT, ending_of, refused
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import prepare_data
import sample
import train
from nanodva.errors import UserError
from nanodva.settings import PathName, build, load_settings, read_settings
from prepare_data import PrepareConfig
from sample import SampleConfig
from tools import race
from tools.convert import ConvertConfig
from tools.explain import ExplainConfig
from tools.race import RaceConfig
from tools.report import ReportConfig
from train import TrainConfig

PRESETS = sorted(str(path) for path in ROOT.glob("config/*.py"))
CLASSES = [TrainConfig, SampleConfig, PrepareConfig, RaceConfig, ReportConfig, ExplainConfig,
           ConvertConfig]


@pytest.fixture
def preset(tmp_path):
    """preset(text): the path of a preset file that says so."""
    def preset(text):
        path = tmp_path / "preset.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        return str(path)
    return preset


# ---- what may be said ----------------------------------------------------------------------------

@pytest.mark.parametrize("path", PRESETS)
def test_every_preset_loads(path):
    cls = RaceConfig if Path(path).name.startswith("race_") else TrainConfig
    changed = read_settings(cls, [path])
    cfg = asdict(load_settings(cls, [path]))
    assert changed and {name: cfg[name] for name in changed} == changed


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_that_names_a_file_expands_the_tilde(cls):
    for setting in fields(cls):
        if re.search("dir$|dest|source|input|init_from|against$|picture|results|ladder|path|json",
                     setting.name) and (cls, setting.name) != (RaceConfig, "against"):
            assert setting.type is PathName, setting.name


def test_the_later_one_wins_among_presets_and_arguments(preset):
    path = preset("n_layer = 3\nbatch_size = 5")
    assert load_settings(TrainConfig, [path, "--n_layer=4"]).n_layer == 4
    cfg = load_settings(TrainConfig, ["--n_layer=4", path])
    assert (cfg.n_layer, cfg.batch_size, cfg.n_head) == (3, 5, 12)


@pytest.mark.parametrize("argument, name, value", [
    ("--max_iters=1e1", "max_iters", 10), ("--weight_decay=0", "weight_decay", 0.0),
    ("--compile", "compile", True), ("--compile=auto", "compile", "auto"),
    ("--compile=false", "compile", False), ("--eval_only=true", "eval_only", True),
    ("--dataset=3", "dataset", "3"), ("--out_dir=a=b=c", "out_dir", "a=b=c"),
    ("--wandb_run_name=", "wandb_run_name", ""), ("--out_dir=true", "out_dir", "true"),
    ("--gradient_accumulation_steps=5*8", "gradient_accumulation_steps", 40),
    ("--learning_rate=6e-4", "learning_rate", 6e-4), ("--learning_rate=1", "learning_rate", 1.0),
    ("--n_layer= 3", "n_layer", 3), ("--n_layer=2**3-1", "n_layer", 7),
    ("--batch_size=+4", "batch_size", 4), ("--rotary=True", "rotary", True),
    ("--seed=2**60", "seed", 2**60), ("--out_dir=~/a b", "out_dir", "/home/me/a b"),
    ("--out_dir=a/~b", "out_dir", "a/~b"), ("--data_dir=~", "data_dir", "/home/me"),
    ("--init_from=~/a/*,b,~/c", "init_from", "/home/me/a/*,b,/home/me/c"),
    ("--dataset=~", "dataset", "~")])
def test_an_argument_has_the_type_of_its_setting(monkeypatch, argument, name, value):
    monkeypatch.setenv("HOME", "/home/me")
    found = read_settings(TrainConfig, [argument])[name]
    assert found == value and type(found) is type(value)


def test_a_preset_may_hold_comments_arithmetic_and_what_nanogpts_hold(preset, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load_settings(TrainConfig, [preset('''"""For a test."""
import time
# a comment
out_dir = "~/a" + 'b'
wandb_run_name = "ft-" + str(time.time())
gradient_accumulation_steps = 5 * 8
max_iters = 10 // 3 + 2 ** 3 - 3
learning_rate = -(-1e-3)
min_lr = 1e-3 / 10
compile = False
''')])
    assert (cfg.out_dir, cfg.gradient_accumulation_steps, cfg.max_iters, cfg.learning_rate,
            cfg.min_lr, cfg.compile) == ("/home/me/ab", 40, 8, 1e-3, 1e-4, False)
    assert re.fullmatch(r"ft-\d+\.\d+", cfg.wandb_run_name)


# ---- what is refused -----------------------------------------------------------------------------

WHOLE = "it must be a whole number below 2**63"


@pytest.mark.parametrize("argument, words", [
    ("--n_layr=6", "unknown setting 'n_layr' on the command line: did you mean 'n_layer'?"),
    ("--zzz=1", "unknown setting 'zzz' on the command line: see --help"),
    ("--=3", "unknown setting ''"), ("--", "unknown setting ''"),
    *((word, f"{word!r} is neither a preset (config/NAME.py) nor a setting (--key=value): see --he")
      for word in ("-x", "n_layer=3", "config")),
    *((f"--{name}", f"--{name} lacks its value: write --{name}=VALUE without spaces")
      for name in ("n_layer", "out_dir")),
    ("--n_layer=six", "n_layer='six' on the command line: " + WHOLE),
    *((f"--n_layer={value}", WHOLE) for value in (
        "2.5", "nan", "True", "1" + "0" * 5000, "9**9**9", "1/0", "[1]", "(-8)**0.5",
        "__import__('os')", "-" * 20000 + "1", "1e30")),
    ("--n_layer=" + "*".join(["9" * 4000] * 3), "n_layer=inf"),
    *((f"--learning_rate={value}", "it must be a number")
      for value in ("True", "fast", "1e999", "10**400")),
    ("--eval_only=1", "eval_only=1 on the command line: it must be True or False"),
    ("--eval_only=yes", "True or False"), ("--out_dir=a\0b", "it must be text"),
    ("--out_dir=~nobody-here/x", "no user has this name; write ./~ if it is part of the name"),
    ("--init_from=" + "x" * 300, "File name too long; give another folder"),
    ("--compile=maybe", "choose from True, False, auto"), ("--rotary=maybe", "rotary='maybe'"),
    ("--block=dvaa", "block='dvaa': choose from gpt2"),
    ("--dataset=", "dataset is empty: give a name, as in --dataset=openwebtext"),
    ("--seed=-1", "seed=-1: it must be at"), ("--batch_size=0", "batch_size=0: it must"),
    ("--dropout=1", "dropout=1.0: it must be below 1"), ("--beta2=1", "beta2=1.0: it must"),
    ("--bank_layers=13", "bank_layers=13: it must be at most n_layer=12"),
    ("--min_lr=1", "min_lr=1.0 is above learning_rate=0.0006"),
    ("--dtype=float8", "dtype='float8': choose from auto, float32"),
    ("--init_from=nowhere", "init_from='nowhere': choose from "),
    ("--optimizer=sgd", "optimizer='sgd': choose from adamw, muon"),
    ("nowhere.py", "cannot read nowhere.py: No such file or directory; config holds demo.py"),
    ("config/.py", "No such file")], ids=lambda value: value[:40])
def test_a_wrong_argument_is_named(argument, words):
    with refused(words):
        load_settings(TrainConfig, [argument])


NO_LITERAL = "is neither a literal nor arithmetic on literals"


@pytest.mark.parametrize("text, words", [
    ("n_layr = 6", "unknown setting 'n_layr' in {path}: did you mean 'n_layer'?"),
    ("n_layer = 'six'", WHOLE), ("out_dir = 3", "it must be text"),
    ("import os", "line 1: this is code; a preset holds assignments like 'n_layer = 6'"),
    *((code, "line 1: this is code") for code in (
        "1 + 1", "import time, os", "if True: n_layer = 6", "__import__('os').mkdir('{harm}')")),
    ("x = __import__('os').mkdir('{harm}')", "line 1: \"__import__('os').mkdir('"),
    ("n_layer = 1\nout_dir = open('{harm}', 'w').name", "line 2: \"open('"),
    ("n_layer = batch_size", "line 1: 'batch_size' " + NO_LITERAL),
    *((code, NO_LITERAL) for code in (
        "n_layer = [6]", "out_dir = f'{harm}'", "out_dir = 'ab' * 3", "n_layer = 6 if 1 else 7",
        "n_layer = (lambda: 6)()")),
    ("n_layer = 9**9**9", "math range error"), ("n_layer = 1 / 0", "line 1: division by zero"),
    ("n_layer = 6\nn_head = 6;;", "line 2: invalid syntax"), ("out_dir = -'a'", "bad operand"),
    ("\0", "null bytes"), (b"out_dir = '\xff'", "utf-8"), ("out_dir = 'a\\0b'", "must be text"),
    ("n_layer = " + "-" * 20000 + "1", "preset.py"),
    ("# coding: nonsense\nn_layer = 6", "nonsense")], ids=lambda value: repr(value)[:40])
def test_a_wrong_preset_is_named_and_never_executed(preset, tmp_path, text, words):
    harm = tmp_path / "harm"
    path = preset(text.replace("{harm}", str(harm)) if isinstance(text, str) else text)
    with refused(words.replace("{path}", path)):
        load_settings(TrainConfig, [path])
    assert not harm.exists()


# ---- help ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls, main, without", [
    (TrainConfig, train.main, ()), (SampleConfig, sample.main, ()),
    (PrepareConfig, prepare_data.main, ()), (RaceConfig, race.main, race.DECIDED)])
def test_help_lists_every_setting_with_its_meaning(cls, main, without, capsys):
    status, out = ending_of(main, ["--help"], capsys)
    assert status == 0
    found = {name: (shown, kind) for name, shown, kind in re.findall(
        r"^  --(\w+)=(.*?) +(int|float|bool|str|path|text) +\S.{3,}$", out, re.M)}
    assert found.keys() == {setting.name for setting in fields(cls)} - set(without)
    for setting in fields(cls):
        if setting.name not in without:
            is_text = setting.type in (str, PathName)
            default = repr(setting.default) if is_text else str(setting.default)
            assert found[setting.name] == (default, getattr(setting.type, "__name__", "text"))
    # A tool may declare a setting again
    assert ("chooses the settings" in out) == (cls is RaceConfig)


# ---- hundreds of command lines that nobody would write -------------------------------------------

NAMES = [setting.name for setting in fields(TrainConfig)]
ODD = ["True", "None", "auto", "1e999", "1j", "[]", "b'x'", "'\''", "9" * 5000, "n_layer", "~x/y",
       "str(time.time())", " if ", *"+-*/%@,()=~", "**", "//", "<<"]
parts = st.integers().map(repr) | st.floats().map(repr) | st.text(max_size=8) | st.sampled_from(ODD)
values = st.lists(parts, min_size=1, max_size=6).map("".join)
assignments = st.builds("{}{}{}".format, st.sampled_from(NAMES) | st.text(max_size=8),
                        st.sampled_from(["=", " = ", ":", "+=", " "]), values)
lines = assignments | st.sampled_from(["# text", '"""text"""', "import time", "pass", "if", "\tx"])


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@hypothesis_settings(max_examples=100, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(HealthCheck))
@given(st.lists(assignments.map("--{}".format) | st.text(max_size=10), max_size=4),
       st.lists(lines, max_size=6).map("\n".join) | st.binary(max_size=40))
def test_any_command_line_and_any_preset_gives_settings_or_one_line(preset, argv, text):
    """The settings, valid in themselves; or else an error, or --help."""
    path = preset(text)
    for cls, words in ((TrainConfig, argv), (SampleConfig, argv), (PrepareConfig, argv),
                       (TrainConfig, [path])):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cfg = load_settings(cls, words)
            assert build(cls, asdict(cfg)) == cfg
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        except SystemExit as end:
            assert end.code == 0 and {"--help", "-h"} & set(words)
