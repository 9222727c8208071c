"""What the four scripts share. Imports go one way: tools -> scripts -> nanodva -> model.py."""
import sys
from importlib.util import find_spec

if sys.version_info < (3, 11):
    print(f"error: nanoDVA needs Python 3.11 or newer, and this is {sys.version.split()[0]}",
          file=sys.stderr)
    raise SystemExit(2)
missing = [name for name in ("torch", "numpy", "tqdm") if not find_spec(name)]
if missing:
    print(f"error: this Python, {sys.executable}, lacks {', '.join(missing)}: after make, run "
          f"source .venv/bin/activate; or run pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2)
