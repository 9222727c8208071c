"""Settings: presets and --key=value arguments become one typed, checked dataclass.

    python train.py config/demo.py --n_layer=8 --compile

A dataclass declares each setting once: its name, type and default, and in the comment behind it the line that --help
prints. A preset file is data: assignments of literals and of arithmetic on literals. It is parsed, never executed.
"""
import ast
import difflib
import inspect
import math
import operator
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def fail(message):
    """Something that the user can put right: one line on stderr, exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def check(settings, least={}, choices={}):
    """Raise ValueError, with the value and what it may be, for a setting below its least value or not among its choices."""
    for name, lowest in least.items():
        if getattr(settings, name) < lowest:
            raise ValueError(f"{name}={getattr(settings, name)}: it must be at least {lowest}")
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name}={getattr(settings, name)!r}: there are {', '.join(map(str, allowed))}")


def literal(node):
    """The value of an expression tree of literals and arithmetic on them. Raises ValueError for anything else."""
    match node:
        case ast.Expression(body):
            return literal(body)
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand) if is_number(value := literal(operand)):
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            left, right = literal(left), literal(right)
            numbers = is_number(left) and is_number(right)
            texts = isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str)
            huge = isinstance(op, ast.Pow) and numbers and max(abs(left), abs(right)) > 1000    # 9**9**9 never ends
            if (numbers or texts) and not huge:
                return ARITHMETIC[type(op)](left, right)
        case ast.Call() if ast.unparse(node) == "str(time.time())":   # nanoGPT's finetune preset names its run so
            return str(time.time())
    raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor arithmetic on literals")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def coerce(value, kind):
    """value as the declared type: an int is a fine float, 1e4 a fine int. Raises ValueError."""
    if kind is float and is_number(value) and abs(value) < 2**1023:            # neither infinite nor beyond a float
        return float(value)
    if kind is int and is_number(value) and value == value // 1 and abs(value) < 2**63:
        return int(value)
    if kind in (bool, str, bool | str) and isinstance(value, kind) and "\0" not in str(value):       # no path holds a NUL
        return value
    raise ValueError


def read_preset(path):
    """The assignments of a preset file, as {name: value}."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except OSError as error:
        presets = " ".join(sorted(p.stem for p in Path("config").glob("*.py") if p.stem != "__init__"))
        fail(f"cannot read the preset {path}: {error.strerror or error}; config/NAME.py is there for {presets}")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fail(f"{path} is not a preset, assignments like 'n_layer = 6': {error}")
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
                fail(f"{path}, line {statement.lineno}: a preset holds assignments like 'n_layer = 6' and nothing else")
    return settings


def read_argument(text, kinds):
    """'--key=value' as (key, value); the first '=' splits, a bare '--key' means True, values stay text if they must."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals:
        return key, True
    if kinds.get(key) is str:                             # taken as it stands: --start=3, --out_dir=true
        return key, value
    if value in ("true", "false"):
        return key, value == "true"
    try:
        return key, literal(ast.parse(value.strip(), mode="eval"))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return key, value


def read(cls, argv=None):
    """
    {name: value} of what presets and arguments set, in the order given (a later one wins), each of its declared type.

    Exits with status 2 and one line for an unknown setting or a value of the wrong type; with 0 after printing --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(cls)
        raise SystemExit(0)
    kinds = {f.name: f.type for f in fields(cls)}
    settings = {}
    for argument in argv:
        if argument.startswith("--"):
            found, where = dict([read_argument(argument, kinds)]), "on the command line"
        elif argument.endswith(".py"):
            found, where = read_preset(argument), f"in {argument}"
        else:
            fail(f"{argument!r} is neither a preset (config/NAME.py) nor a setting (--key=value); see --help")
        for key, value in found.items():
            if key not in kinds:
                close = difflib.get_close_matches(key, kinds, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
                fail(f"unknown setting {key!r} {where}: {hint}")
            try:
                settings[key] = coerce(value, kinds[key])
            except ValueError:
                wanted = {bool: "True or False", int: "a whole number", float: "a number"}.get(kinds[key], "text")
                fail(f"{key}={shown(value)} {where}: it must be {wanted}")
    return settings


def shown(value):
    """repr(value), for a message: not all of a very long one, and Python refuses to print very long numbers."""
    huge = isinstance(value, int) and abs(value) >= 10**60
    return "a huge number" if huge else text if len(text := repr(value)) < 100 else text[:99] + "..."


def build(cls, settings):
    """cls(**settings); exits with status 2 for a ValueError of its __post_init__, which holds the ranges."""
    try:
        return cls(**settings)
    except (ValueError, TypeError) as error:                           # TypeError: a setting of another version's checkpoint
        fail(error)


def load(cls, argv=None):
    """The dataclass cls, filled from its defaults, presets and arguments: build(read())."""
    return build(cls, read(cls, argv))


def print_help(cls):
    """Every setting of cls: type, default, and the comment behind its declaration."""
    declared = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    meaning = dict(re.findall(r"^    (\w+): [\w |]+ = [^#\n]+# (.+)$", declared, re.MULTILINE))
    print(inspect.cleandoc(inspect.getmodule(cls).__doc__), "\n\nSettings, with their defaults:\n")
    for f in fields(cls):
        default = repr(f.default) if f.type is str else f.default
        print(f"  {f'--{f.name}={default}':44} {getattr(f.type, '__name__', 'text'):6} {meaning.get(f.name, '')}")
