"""
Settings: from the defaults of a dataclass, from presets and from the command line.

    python train.py config/demo.py --n_layer=8 --compile

A dataclass declares each setting in one line, with its help text as the comment. A preset is data:
assignments of literals and of arithmetic on literals, which are read and never executed.
"""
import ast
import difflib
import inspect
import math
import operator
import os
import re
import sys
import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import NewType

from nanodva.errors import fail, naming_file

# The type of a setting that names a file or folder, or several with commas between them. A shell
# expands ~ at the start of a word, but not in --out_dir=~/runs.
PathName = NewType("path", str)
PRESETS = Path(__file__).parents[1] / "config"
# A power as a float: 9**9**9 overflows at once, where a whole number would take forever
ARITHMETIC = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Add: operator.add,
              ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: math.pow}
NO_VALUE = (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError)


def load_settings(cls, argv=None):
    """The dataclass cls, filled from its defaults, from presets and from arguments."""
    return build(cls, read_settings(cls, argv))


def read_settings(cls, argv=None, without=()):
    """
    {name: value} of what presets and arguments set, in the order given: a later one wins. Raises
    UserError for an unknown setting, a wrong value, and the names in `without`, which the tool
    decides itself. --help prints and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    kinds, given = {field.name: field.type for field in fields(cls)}, {}
    if "--help" in argv or "-h" in argv:
        print_help(cls, without)
        raise SystemExit(0)
    for argument in argv:
        where = "on the command line"
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals and kinds.get(name, bool) not in (bool, bool | str):
                fail(f"--{name} lacks its value: write --{name}=VALUE without spaces")
            found = {name: read_value(text, kinds.get(name)) if equals else True}
        elif argument.endswith(".py"):
            where, found = f"in {argument}", read_preset(argument)
        else:
            fail(f"{argument!r} is neither a preset (config/NAME.py) nor a setting (--key=value): "
                 f"see --help")
        for name, value in found.items():
            if name in without:
                fail(f"{name} {where}: this tool decides it itself; --help lists what you can set")
            if name not in kinds:
                close = difflib.get_close_matches(name, kinds, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                fail(f"unknown setting {name!r} {where}: {hint}see --help")
            given[name] = coerce(name, value, kinds[name], where)
    return given


def check(settings, least=(), choices=()):
    """Raise UserError for a setting below least[name] or not in the list choices[name]."""
    for name, lowest in dict(least).items():
        if getattr(settings, name) < lowest:
            fail(f"{name}={getattr(settings, name)}: it must be at least {lowest}")
    for name, allowed in dict(choices).items():
        if getattr(settings, name) not in allowed:
            options = ", ".join(map(str, allowed))
            fail(f"{name}={getattr(settings, name)!r}: choose from {options}")


def build(cls, values):
    """cls with those settings of the dict `values` that it has. Raises UserError if it refuses."""
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
    # A class comes after those that it inherits from, whose settings it may declare again
    code = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    meanings = dict(re.findall(r"^    (\w+): [\w |]+ = [^#\n]+# (.+)$", code, re.MULTILINE))
    for field in fields(cls):
        if field.name not in without:
            kind = getattr(field.type, "__name__", "text")
            default = repr(field.default) if kind in ("str", "path") else field.default
            print(f"  {f'--{field.name}={default}':38} {kind:6} {meanings.get(field.name, '')}")


# ---- reading values ------------------------------------------------------------------------------

def read_value(text, kind):
    """`text` of the command line as a literal, unless it is none or the setting is a text."""
    try:
        code = {"true": "True", "false": "False"}.get(text, text.strip())
        return text if kind in (str, PathName) else literal(ast.parse(code, mode="eval").body)
    except NO_VALUE:
        return text


def read_preset(path):
    """The assignments of a preset file as {name: value}. Raises UserError for anything else."""
    presets = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.py")))
    with naming_file("read", path, f"{os.path.relpath(PRESETS)} holds {presets}"):
        source = Path(path).read_bytes()
    settings, line = {}, 1
    try:
        for statement in ast.parse(source).body:
            line = statement.lineno
            match statement:
                case ast.Assign([ast.Name(name)], expression):
                    settings[name] = literal(expression)
                case ast.Expr(ast.Constant(str())) | ast.Import([ast.alias("time")]):
                    continue
                case _:
                    raise ValueError("this is code")
    except NO_VALUE as error:
        line, reason = getattr(error, "lineno", line), getattr(error, "msg", error)
        fail(f"{path}, line {line}: {reason}; a preset holds assignments like 'n_layer = 6' and "
             f"nothing else")
    return settings


def literal(node):
    """The value of a syntax tree of literals and arithmetic. ValueError for anything else."""
    match node:
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op, operand) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](literal(operand))
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            left, right = literal(left), literal(right)
            # Texts can be joined, but "a" * 10**9 would fill the memory
            if isinstance(left, str) == isinstance(right, str):
                return ARITHMETIC[type(op)](left, right)
        case ast.Call() if ast.unparse(node) == "str(time.time())":
            return str(time.time())               # nanoGPT's finetune preset names its run so
    raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor arithmetic on literals")


def coerce(name, value, kind, where):
    """value as the type `kind`: an int is a fine float, 1e4 a fine int. Raises UserError."""
    if type(value) in (int, float):               # not bool, which is a subclass of int
        # Python prints no very large whole numbers
        value = value if abs(value) < 2**1023 else math.inf
        if kind is float and math.isfinite(value):
            return float(value)
        if kind is int and value == value // 1 and abs(value) < 2**63:
            return int(value)
    if kind in (bool, str, bool | str) and isinstance(value, kind) and "\0" not in str(value):
        return value                              # no path may hold a NUL
    if kind is PathName:
        return expand(name, coerce(name, value, str, where))
    wanted = {bool: "True or False", int: "a whole number below 2**63", float: "a number"}
    fail(f"{name}={value!r:.99} {where}: it must be {wanted.get(kind, 'text')}")


def expand(name, paths):
    """The path, or paths with commas between, without ~. Raises UserError if it can be no path."""
    parts = [os.path.expanduser(part) for part in paths.split(",")]
    for part in parts:
        if part.startswith("~"):
            fail(f"{name}={paths}: no user has this name; write ./~ if it is part of the name")
        with naming_file("use", part, f"give another folder or file as --{name}"):
            Path(part).exists()
    return ",".join(parts)
