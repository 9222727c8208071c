"""
Settings: from the defaults of a dataclass, from presets and from the command line.

    python train.py config/demo.py --n_layer=8 --compile

A dataclass declares each setting in one line: its name, type and default, and in the comment at
the end of the line what --help prints. A preset is data: assignments of literals and of arithmetic
on literals, which are read and never executed.
"""
import ast
import difflib
import inspect
import operator
import os
import re
import sys
import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

from nanodva.errors import fail

PRESETS = Path(__file__).parents[1] / "config"
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
              ast.Pow: operator.pow}


class Given(dict):
    """{name: value} of the settings that the user gave. `origin` tells where each came from."""

    def __init__(self):
        super().__init__()
        # {name: "on the command line" or "in config/x.py"}
        self.origin = {}


def load_settings(cls, argv=None):
    """The dataclass cls, filled from its defaults, from presets and from arguments."""
    return build(cls, read_settings(cls, argv))


def read_settings(cls, argv=None, without=()):
    """
    What presets and arguments set, in the order given (a later one wins), as a Given dict.

    `without` names settings of cls that its tool decides itself. Raises UserError for those, for an
    unknown setting and for a value of the wrong type. --help prints and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    known, given = {field.name: field.type for field in fields(cls)}, Given()
    if "--help" in argv or "-h" in argv:
        print_help(cls, without)
        raise SystemExit(0)
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            where = "on the command line"
            name, equals, text = argument.removeprefix("--").partition("=")
            following = argv[position + 1:]
            spaced = following != [] and following[0].startswith("=")
            if name in known and not equals and (spaced or not takes_bool(known[name])):
                value = next((part.lstrip("=") for part in following if part != "="), "VALUE")
                fail(f"--{name} lacks its value: write --{name}={value} without spaces")
            found = {name: read_value(text, known.get(name)) if equals else True}
        elif argument.endswith(".py"):
            where = f"in {argument}"
            found = read_preset(argument)
        else:
            hint = f"did you mean --out_dir={argument}? " if Path(argument).is_dir() else ""
            if Path(f"{argument}.py").exists():
                hint = f"did you mean {argument}.py? "
            fail(f"{argument!r} is neither a preset (config/NAME.py) nor a setting (--key=value): "
                 f"{hint}see --help")
        for name, value in found.items():
            if name in without:
                fail(f"{name} {where}: this tool decides it itself; --help lists what you can set")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
                fail(f"unknown setting {name!r} {where}: {hint}")
            given[name] = coerce(name, value, known[name], where)
            given.origin[name] = where
    return given


def check(settings, least=None, choices=None):
    """
    Raise UserError for a setting below its least value, or one that is not among its choices.
    `least` is {name: number}, `choices` {name: list}.
    """
    for name, lowest in (least or {}).items():
        if getattr(settings, name) < lowest:
            fail(f"{name}={getattr(settings, name)}: it must be at least {lowest}")
    for name, allowed in (choices or {}).items():
        if getattr(settings, name) not in allowed:
            options = ", ".join(map(str, allowed))
            fail(f"{name}={getattr(settings, name)!r}: choose from {options}")


def build(cls, values):
    """
    cls with those of the settings in the dict `values` that it has. Raises UserError for what cls
    refuses.
    """
    known = {field.name for field in fields(cls)}
    try:
        return cls(**{name: value for name, value in values.items() if name in known})
    except ValueError as error:
        # Ours are subclasses. Python's own is a mistake in the code, and keeps its traceback.
        if type(error) is ValueError:
            raise
        fail(error)


def change(cfg, **changes):
    """A copy of cfg with some settings changed."""
    return build(type(cfg), asdict(cfg) | changes)


def print_help(cls, without=()):
    """Print each setting of cls with its default, its type and the comment of its declaration."""
    print(inspect.cleandoc(inspect.getmodule(cls).__doc__), "\n\nSettings, with their defaults:\n")
    meanings = {}
    for base in cls.__mro__:
        if is_dataclass(base):
            # A class overrides what it inherits
            pattern = r"^    (\w+): [\w |]+ = [^#\n]+# (.+)$"
            meanings = dict(re.findall(pattern, inspect.getsource(base), re.MULTILINE)) | meanings
    for field in fields(cls):
        if field.name not in without:
            default = repr(field.default) if field.type is str else field.default
            kind = getattr(field.type, "__name__", "text")
            print(f"  {f'--{field.name}={default}':38} {kind:6} {meanings.get(field.name, '')}")


# ---- reading values ------------------------------------------------------------------------------

def takes_bool(kind):
    return kind in (bool, bool | str)


def read_value(text, kind):
    """The value that `text` stands for; where the setting's type is str it is taken as it is."""
    if kind is str:
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return text


def read_preset(path):
    """The assignments of a preset file as {name: value}. Raises UserError for anything else."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except OSError as error:
        names = sorted(preset.name for preset in PRESETS.glob("*.py"))
        close = difflib.get_close_matches(Path(path).name, names, n=1)
        hint = f"did you mean {os.path.relpath(PRESETS / close[0])}? " if close else ""
        fail(f"cannot read the preset {path}: {error.strerror or error}; {hint}{PRESETS} holds "
             f"{', '.join(names)}")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fail(f"{path} is not a preset, which holds assignments like 'n_layer = 6': {error}")
    settings = {}
    for statement in tree.body:
        match statement:
            case ast.Assign([ast.Name(name)], expression):
                try:
                    settings[name] = literal(expression)
                except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
                    fail(f"{path}, line {statement.lineno}: {name}: {error}")
            case ast.Expr(ast.Constant(str())) | ast.Import([ast.alias("time")]):
                continue
            case _:
                fail(f"{path}, line {statement.lineno}: a preset holds assignments like "
                     f"'n_layer = 6' and nothing else")
    return settings


def literal(node):
    """The value of a syntax tree of literals and arithmetic. ValueError for anything else."""
    match node:
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            value = literal(operand)
            if is_number(value):
                return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            left, right = literal(left), literal(right)
            numbers = is_number(left) and is_number(right)
            texts = isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str)
            # 9**9**9 would never end
            huge = isinstance(op, ast.Pow) and numbers and max(abs(left), abs(right)) > 1000
            if (numbers or texts) and not huge:
                return ARITHMETIC[type(op)](left, right)
        case ast.Call() if ast.unparse(node) == "str(time.time())":
            return str(time.time())               # nanoGPT's finetune preset names its run so
    raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor arithmetic on literals")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def coerce(name, value, kind, where):
    """value as the type `kind`: an int is a fine float, 1e4 a fine int. Raises UserError."""
    if kind is float and is_number(value) and abs(value) < 2**1023:     # finite, and fits a float
        return float(value)
    if kind is int and is_number(value) and value == value // 1 and abs(value) < 2**63:
        return int(value)
    if kind in (bool, str, bool | str) and isinstance(value, kind) and "\0" not in str(value):
        return value                              # no path may hold a NUL
    wanted = {bool: "True or False", int: "a whole number", float: "a number"}.get(kind, "text")
    if kind in (int, float) and is_number(value) and abs(value) >= 2**63:
        wanted += f" below {'2**63' if kind is int else '2**1023'}"
    fail(f"{name}={shown(value)} {where}: it must be {wanted}")


def shown(value):
    """repr(value) for a message, cut where it is long; Python prints no very long numbers."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a huge number"
    text = repr(value)
    return text if len(text) < 100 else text[:99] + "..."
