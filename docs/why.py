"""
Which tokens does a contender of a race lose? Its loss, split by what a token needs.

    python docs/why.py docs/race/2x32 --contenders="gpt2,dva,dva 64 wide in equal time"

    bigram     the token before is enough: a table of pairs, counted in the training text, would
               guess this token
    copying    it is not, but the same pair of tokens was in this window before: an induction head
               (arXiv 2209.11895) looks it up
    neither    all others

The first contender is the reference. All reported seeds of a race count; the tokens are those that
the race reports. Weights that are no longer in out/race_runs are trained again.
"""
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanodva.dataset import open_data
from nanodva.errors import fail, run_script
from nanodva.machine import pick_device
from nanodva.settings import PathName, load_settings
from nanodva.weights import load_model
from tools.race import carry_out, losses_of, make_run
from tools.report import compare, gap_text, markdown

KINDS = ("bigram", "copying", "neither")
# Training tokens in which pairs are counted
COUNTED = 2**25


@dataclass
class WhyConfig:
    contenders: str = ""       # labels with commas between; empty: all. The first is the reference
    data_dir: PathName = "data"   # where the race's data set lives


def bigram_guesses(ids, vocab_size):
    """(V,) the most frequent token after each token, in these ids."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    for first in range(0, len(ids) - 1, 2**22):
        part = ids[first:first + 2**22 + 1].astype(np.int64)
        counts += np.bincount(part[:-1] * vocab_size + part[1:], minlength=len(counts))
    return torch.from_numpy(counts.reshape(vocab_size, vocab_size).argmax(axis=1))


def kinds_of(x, y, guesses):
    """(B, T) the place in KINDS of each target y (B, T), which follows x (B, T)."""
    pairs = x * (len(guesses) + 1) + y
    # (B, T, T): is the pair at i also the pair at an earlier j?
    seen = (pairs[:, :, None] == pairs[:, None]).tril(diagonal=-1).any(dim=2)
    kinds = torch.where(seen, 1, 2)
    return torch.where(guesses[x] == y, 0, kinds)


def split_losses(run, evaluated, guesses, device):
    """(losses, shares): for each of KINDS its sum of losses by all tokens, and its tokens."""
    weights = Path(run.out_dir, "best.pt")
    if not weights.exists():
        print(f"training {run.block}, {run.n_layer} x {run.n_embd}, seed {run.seed} again ...")
        carry_out(run, evaluated, True)
    trained, ids = load_model(weights).to(device), open_data(run)["val"]
    sums, counts = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    for x, y, losses in losses_of(trained, ids, run.block_size, evaluated, device, half=1):
        kinds = kinds_of(x.cpu(), y.cpu(), guesses).flatten()
        sums.index_add_(0, kinds, losses.flatten().cpu())
        counts += torch.bincount(kinds, minlength=len(KINDS))
    return (sums / counts.sum()).tolist(), (counts / counts.sum()).tolist()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folders = [argument for argument in argv if not argument.startswith("-")]
    if len(folders) != 1 or not Path(folders[0], "results.json").exists():
        fail("which race? Name its folder, as in  python docs/why.py docs/race/2x32")
    cfg = load_settings(WhyConfig, [argument for argument in argv if argument.startswith("-")])
    results = json.loads(Path(folders[0], "results.json").read_bytes())
    facts, plan, device = results["contenders"], results["plan"], pick_device("auto")
    labels = cfg.contenders.split(",") if cfg.contenders else list(facts)
    if missing := set(labels) - set(facts):
        fail(f"contenders: {', '.join(missing)}: choose from {', '.join(facts)}")
    guesses, found, rows = None, {}, []
    for label in labels:
        found[label] = {}
        for seed in map(int, facts[label]["losses"]):
            run = make_run(facts[label]["settings"], seed, cfg.data_dir)
            if guesses is None:
                guesses = bigram_guesses(open_data(run)["train"][:COUNTED], run.vocab_size)
            found[label][seed], shares = split_losses(run, plan["evaluated"], guesses, device)
    for label in labels:
        row = {"contender": label}
        for place, (kind, share) in enumerate(zip(KINDS, shares, strict=True)):
            ours, theirs = ({seed: losses[place] for seed, losses in found[name].items()}
                            for name in (label, labels[0]))
            mean = statistics.fmean(ours.values())
            row[f"{kind}, {100 * share:.0f} %"] = f"{mean / share:.3f}"
            gap = compare(ours, theirs)
            row[f"minus {labels[0]}, {kind}"] = gap_text(gap) if label != labels[0] else ""
        rows.append(row)
    print(f"{markdown(rows)}\nLosses are means over the tokens of a kind. Differences are parts of "
          f"the whole loss: those of a row add up to its difference.")


if __name__ == "__main__":
    run_script(main)
