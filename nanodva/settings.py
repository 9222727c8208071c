"""
Settings: from a dataclass's defaults, presets and the command line.

    python train.py config/demo.py --n_layer=8 --compile

A dataclass declares each setting once: its name, type and default, and in the comment behind it
the line that --help prints. A dataclass may hold another one, whose settings then count as its own.
A preset is data: assignments of literals and of arithmetic on literals, read and never executed.
"""
import ast
import difflib
import inspect
import operator
import re
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

from nanodva.errors import fail

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
              ast.Pow: operator.pow}


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
            fail(f"{name}={getattr(settings, name)!r}: there are {options}")


# ---- what a dataclass declares -----------------------------------------------------------------

def declared(cls):
    """
    {name: dataclass field} of the settings of cls and of the dataclasses that it holds, but for
    those that a held one's field(metadata={"without": names}) leaves out.
    """
    found = {}
    for field in fields(cls):
        if is_dataclass(field.type):
            without = field.metadata.get("without", ())
            held = declared(field.type)
            found |= {name: held[name] for name in held if name not in without}
        else:
            found[field.name] = field
    return found


def left_out(cls):
    """The names of the settings that dataclasses held by cls have, and cls leaves out."""
    return {name for field in fields(cls) for name in field.metadata.get("without", ())}


def flat(cfg):
    """{name: value} of the settings in cfg and in the dataclasses that it holds."""
    values = {}
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        values |= flat(value) if is_dataclass(value) else {field.name: value}
    return values


def build(cls, values):
    """cls with the settings in the dict `values`. Raises UserError for what cls itself refuses."""
    arguments = {}
    for field in fields(cls):
        if is_dataclass(field.type):
            arguments[field.name] = build(field.type, values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    try:
        return cls(**arguments)
    except ValueError as error:
        # Python's own ValueError is a mistake in the code, and keeps its traceback
        if type(error) is ValueError:
            raise
        fail(error)


def change(cfg, **changes):
    """A copy of cfg with some settings changed, wherever in it they stand."""
    return build(type(cfg), flat(cfg) | changes)


def print_help(cls):
    """Print each setting of cls with its default, type and the comment behind its declaration."""
    print(inspect.cleandoc(inspect.getmodule(cls).__doc__), "\n\nSettings, with their defaults:\n")
    meanings = comments(cls)
    for name, field in declared(cls).items():
        default = repr(field.default) if field.type is str else field.default
        kind = getattr(field.type, "__name__", "text")
        print(f"  {f'--{name}={default}':38} {kind:6} {meanings.get(name, '')}")


def comments(cls):
    """{name: the comment behind its declaration} of the settings of cls and of those it holds."""
    found = {}
    for field in fields(cls):
        if is_dataclass(field.type):
            found |= comments(field.type)
    pattern = r"^    (\w+): [\w |]+ = [^#\n]+# (.+)$"
    return found | dict(re.findall(pattern, inspect.getsource(cls), re.MULTILINE))


# ---- what the user gave ------------------------------------------------------------------------

class Given(dict):
    """{name: value} of the settings that the user gave. `origin` tells where each came from."""

    def __init__(self):
        super().__init__()
        self.origin = {}                          # name: "on the command line" or "in config/x.py"


def load_settings(cls, argv=None):
    """The dataclass cls, filled from its defaults, from presets and from arguments."""
    return build(cls, read_settings(cls, argv))


def read_settings(cls, argv=None):
    """
    What presets and arguments set, in the order given (a later one wins), as a Given dict.

    Raises UserError for an unknown setting or a value of the wrong type. --help prints and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print_help(cls)
        raise SystemExit(0)
    known, given = declared(cls), Given()
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            where = "on the command line"
            name, equals, text = argument.removeprefix("--").partition("=")
            if name in known and not equals and not takes_bool(known[name].type):
                following = argv[position + 1] if position + 1 < len(argv) else "VALUE"
                fail(f"--{name} lacks its value: write --{name}={following}")
            is_text = name in known and known[name].type is str
            found = {name: read_value(text, is_text) if equals else True}
        elif argument.endswith(".py"):
            where = f"in {argument}"
            found = read_preset(argument)
        else:
            fail(f"{argument!r} is neither a preset (config/NAME.py) nor a setting (--key=value); "
                 f"see --help")
        for name, value in found.items():
            if name not in known and name in left_out(cls):
                fail(f"{name} {where}: this tool decides it itself; see --help for what is yours")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
                fail(f"unknown setting {name!r} {where}: {hint}")
            given[name] = coerce(name, value, known[name].type, where)
            given.origin[name] = where
    return given


def takes_bool(kind):
    return kind in (bool, bool | str)


def read_value(text, is_text):
    """The value that `text` stands for; where the setting is text it is taken as it is."""
    if is_text:
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
        folder = Path(__file__).parents[1] / "config"
        names = sorted(p.name for p in folder.glob("*.py"))
        fail(f"cannot read the preset {path}: {error.strerror or error}; in {folder} there are "
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
    fail(f"{name}={shown(value)} {where}: it must be {wanted}")


def shown(value):
    """repr(value) for a message, cut where it is long; Python prints no very long numbers."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a huge number"
    text = repr(value)
    return text if len(text) < 100 else text[:99] + "..."
