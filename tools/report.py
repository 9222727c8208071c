"""
Pictures and tables of what was trained.

    python -m tools.report out-demo                    the loss of a run while it trained
    python -m tools.report out-demo out-demo-gpt2      of several runs, in one picture

A picture is an SVG that can be read on light pages and on dark ones. tools/race.py makes its
figures, table.md and race.svg here.
"""
import json
import math
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# So that python tools/report.py finds the modules above this folder, too
sys.path.insert(0, str(Path(__file__).parents[1]))

from nanodva.errors import check_new, fail, replacing, run_script
from nanodva.settings import load_settings

# The 97.5 % quantile of Student's t for 1, 2 ... 10 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Blue, vermilion, green and purple of Okabe and Ito, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", ":", "-.")
# Legible on white and on black
GREY = "#7d7d7d"


# ---- figures -----------------------------------------------------------------------------------

def spread(values):
    """{"mean", "sd", "n"} of those values that are finite; None where there are too few."""
    values = [value for value in values if math.isfinite(value)]
    return {"mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None, "n": len(values)}


def compare(ours, theirs):
    """
    {"mean", "low", "high", "n", "verdict"} of the differences ours - theirs, two lists of losses
    of the same seeds: their mean, and the ends of its 95 % interval by Student's t. The verdict is
    better, worse, or not told apart where the interval holds 0; broken where a loss is infinite.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    if not all(math.isfinite(difference) for difference in differences):
        return {"mean": None, "low": None, "high": None, "n": n, "verdict": "broken"}
    mean, low, high, verdict = statistics.fmean(differences), None, None, "not told apart"
    if n > 1:
        # For more seeds this is a little wider than need be
        margin = STUDENT[min(n - 1, 10) - 1] * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - margin, mean + margin
        if high < 0:
            verdict = "better"
        if low > 0:
            verdict = "worse"
    return {"mean": mean, "low": low, "high": high, "n": n, "verdict": verdict}


def steps_to(steps, losses, target):
    """
    The step at which the losses, evaluated at `steps`, first reached the target, by straight lines
    between them; infinite where they never did.
    """
    if losses[0] <= target:
        return steps[0]
    for i in range(1, len(losses)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.inf


def figures_of(facts, against):
    """
    {contender: figures} from the facts of race.facts_of(). Every contender is compared with the
    first, the reference, and with those in the list `against`. The loss to reach is the mean of
    the reference's final ones; of the times to it, n says how many seeds reached it.
    """
    first = next(iter(facts))
    times = {name: fact["ms_before"] + fact["ms_after"] for name, fact in facts.items()}
    finals = {name: [math.inf if run["broken"] else run["test"][-1] for run in fact["runs"]]
              for name, fact in facts.items()}
    target = spread(finals[first])["mean"]
    if target is None:
        target = -math.inf
    figures = {}
    for name, fact in facts.items():
        ms = statistics.median(times[name])
        rates = {run["learning_rate"] for run in fact["sweep"]}
        bank_rates = {run["bank_lr"] for run in fact["sweep"]
                      if run["learning_rate"] == fact["learning_rate"]}
        reached = [math.inf if run["broken"] else steps_to(run["steps"], run["test"], target)
                   for run in fact["runs"]]
        figures[name] = {
            "ms_per_step": ms,
            "ms_before": statistics.median(fact["ms_before"]),
            "ms_after": statistics.median(fact["ms_after"]),
            # Turn by turn, so that a drift of the machine cancels
            "step_time_ratio": statistics.median(
                [ours / theirs for ours, theirs in zip(times[name], times[first], strict=True)]),
            "seconds": fact["settings"]["max_iters"] * ms / 1e3,
            "bracketed": {"learning_rate": is_bracketed(fact["learning_rate"], rates),
                          "bank_lr": is_bracketed(fact["bank_lr"], bank_rates)},
            "loss": spread(finals[name]),
            "seconds_to_reference": spread([steps * ms / 1e3 for steps in reached]),
            "against": {other: compare(finals[name], finals[other])
                        for other in dict.fromkeys([first, *against]) if other != name}}
    return figures


def is_bracketed(best, tried):
    """Was the best rate tried together with a lower one and a higher one, which were worse?"""
    return any(rate < best for rate in tried) and any(rate > best for rate in tried)


# ---- tables and files ----------------------------------------------------------------------------

def markdown(rows):
    """A table in Markdown of rows {heading: text}."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], *map(dict.values, rows))]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def write_json(value, path):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def table(results):
    """The text of table.md."""
    facts, conditions, rules = results["contenders"], results["conditions"], results["rules"]
    first = next(iter(facts))
    settings = facts[first]["settings"]
    batches = {fact["settings"]["batch_size"] * fact["settings"]["gradient_accumulation_steps"]
               for fact in facts.values()}
    lines = [
        f"# {results['name']}\n",
        f"Data set {conditions['dataset']}: {conditions['tokens']['train']:,} + "
        f"{conditions['tokens']['val']:,} tokens, sha256 of train.bin "
        f"{conditions['sha256']['train'][:12]}. {first} has {settings['n_layer']} layers, "
        f"{settings['n_embd']} wide, and {settings['block_size']} tokens of context; "
        f"{settings['max_iters']} steps of {settings['gradient_accumulation_steps']} x "
        f"{settings['batch_size']} sequences, {settings['optimizer']}, {settings['dtype']}, "
        f"{'compiled' if settings['compile'] else 'not compiled'}. Equal for all: "
        f"{rules['match']}. {conditions['machine']}, CPU threads: {results['threads']}, torch "
        f"{conditions['torch']}, nanoDVA {results['commit']}.\n",
        f"Where rates were not given, seed {rules['seed']} chose them, by its loss on the first "
        f"half of the validation split. \"Not bracketed\": this race has not tried a worse rate on "
        f"each side. Losses are those of {rules['seeds']} other seeds on "
        f"{conditions['reported']['tokens']:,} tokens of the second half: mean ± standard "
        f"deviation. Differences are taken seed by seed; in brackets stands the 95 % interval of "
        f"their mean, by Student's t, each for itself.\n",
        markdown([table_row(name, results) for name in facts]),
        "The sweeps: loss on the first half, by learning rate (x bank_lr).\n"]
    if len(batches) > 1:
        lines.insert(3, "Batches differ in size here, so equal seeds do not see equal batches.\n")
    for name, fact in facts.items():
        tried = []
        for run in sorted(fact["sweep"], key=lambda run: (run["learning_rate"], run["bank_lr"])):
            bank = f" x {run['bank_lr']:g}" if fact["settings"]["bank_layers"] else ""
            loss = "broken" if run["loss"] is None else f"{run['loss']:.4f}"
            tried.append(f"{run['learning_rate']:g}{bank}: {loss}")
        lines.append(f"- {name}: {', '.join(tried) or 'its rates were given'}")
    return "\n".join(lines) + "\n"


def table_row(name, results):
    """{heading: text} of a contender."""
    fact, figures = results["contenders"][name], results["figures"][name]
    first, seeds = next(iter(results["figures"])), results["rules"]["seeds"]
    ms = f"{figures['ms_per_step']:.2f}"
    if abs(figures["ms_after"] / figures["ms_before"] - 1) > 0.05:
        ms += f" (before {figures['ms_before']:.2f}, after {figures['ms_after']:.2f})"
    rates = {rate: f"{fact[rate]:g}{'' if bracketed else ' (not bracketed)'}"
             for rate, bracketed in figures["bracketed"].items()}
    # The text that the loss is of has its own number of bytes per token
    reported = results["conditions"]["reported"]
    bits = reported["tokens"] / reported["bytes"] / math.log(2)
    row = {"contender": name, "parameters": f"{fact['parameters'] / 1e6:.2f} M", "ms/step": ms,
           f"/ {first}": f"{figures['step_time_ratio']:.3f}",
           "steps": str(fact["settings"]["max_iters"]), "seconds": f"{figures['seconds']:.1f}",
           "learning rate": rates["learning_rate"],
           "bank_lr": rates["bank_lr"] if fact["settings"]["bank_layers"] else "-",
           "loss": plus_minus(figures["loss"], 4, seeds),
           "bits/byte": plus_minus(figures["loss"], 3, seeds, bits)}
    others = dict.fromkeys(other for entry in results["figures"].values()
                           for other in entry["against"])
    for other in others:
        gap = figures["against"].get(other)
        row[f"- {other}"] = gap_text(gap) if gap else "-"
    reached, whole = figures["seconds_to_reference"], results["figures"][first]["seconds"]
    row[f"time to {first}'s loss / its time"] = plus_minus(reached, 3, seeds, 1 / whole)
    return row


def gap_text(gap):
    """A comparison as text: mean [low, high] verdict."""
    text = "" if gap["mean"] is None else f"{gap['mean']:+.4f} "
    if gap["low"] is not None:
        text += f"[{gap['low']:+.4f}, {gap['high']:+.4f}] "
    return text + gap["verdict"]


def plus_minus(figure, digits, seeds, factor=1.0):
    """A spread() as text: mean ± sd, and the number of seeds where it is not all of them."""
    if figure["n"] == 0:
        return "-"
    text = f"{figure['mean'] * factor:.{digits}f}"
    if figure["sd"] is not None:
        text += f" ± {figure['sd'] * factor:.{digits}f}"
    if figure["n"] < seeds:
        text += f" ({figure['n']} of {seeds} seeds)"
    return text


# ---- the pictures ------------------------------------------------------------------------------

@contextmanager
def axes_for(path, title):
    """
    Axes to draw on in a with block, after which each labelled line gets its name, and the picture
    is saved as SVG. Raises UserError where there is no matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        fail(f"{path} needs matplotlib:  pip install matplotlib, and the same command again")
    greys = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                           "ytick.color"), GREY)
    # Text stays text, the same figures give the same file, and the page shines through
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "race", "savefig.transparent": True}
    with matplotlib.rc_context(greys | fixed):
        axes = Figure(figsize=(8, 4.5)).subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11)
        yield axes
        write_names(axes)
        with replacing(path) as file:
            axes.figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


def write_names(axes):
    """Write the label of each line that has one at the line's end."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    bottom, top = axes.get_ylim()
    height, right = bottom, 1.03 * max((line.get_xdata()[-1] for line in lines), default=0)
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xydata()[-1]
        # One name above the other, each with a thin line to its end
        height = max(y, height + (top - bottom) / 18)
        axes.annotate(line.get_label(), (x, y), (right, height), color=line.get_color(),
                      va="center", annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=line.get_color(), linewidth=0.5,
                                      relpos=(0, 0.5)))


def style(i):
    """The colour and dashes of line number i, as matplotlib's arguments."""
    return dict(color=COLOURS[i % 4], linestyle=DASHES[i // 4 % 4])


def draw_race(results, path):
    """
    Draw each contender's loss against its seconds: the mean of its seeds, and a band from the
    lowest to the highest.
    """
    with axes_for(path, "lower and further left is better") as axes:
        finals = []
        for i, (name, fact) in enumerate(results["contenders"].items()):
            runs = [run for run in fact["runs"] if not run["broken"]]
            if not runs:
                continue
            ms = results["figures"][name]["ms_per_step"]
            seconds = [step * ms / 1e3 for step in runs[0]["steps"]]
            losses = list(zip(*(run["test"] for run in runs), strict=True))    # by step, all seeds
            means = [statistics.fmean(values) for values in losses]
            axes.plot(seconds, means, label=name, linewidth=2, **style(i))
            axes.fill_between(seconds, [min(values) for values in losses],
                              [max(values) for values in losses], color=style(i)["color"],
                              alpha=0.2, linewidth=0)
            finals.append(means[-1])
        axes.set(xlabel="seconds of training", ylabel="loss on unseen text, nats per token")
        if finals:
            # The first steps would press everything else together
            top = max(finals) + max(0.25, 3 * (max(finals) - min(finals)))
            axes.set_ylim(min(finals) - 0.1 * (top - min(finals)), top)


def draw_losses(runs, path):
    """
    Draw the losses of runs {name: records of metrics.jsonl} against the step: on val as a strong
    line, of the training batches as a thin one.
    """
    with axes_for(path, "strong: unseen text; thin: training text; lower is better") as axes:
        heights = []
        for i, (name, records) in enumerate(runs.items()):
            for loss, label, width in (("train_loss", None, 0.5), ("val_loss", name, 2)):
                points = [(record["step"], record[loss]) for record in records if loss in record]
                axes.plot(*zip(*points, strict=True), label=label, linewidth=width, **style(i))
                # The first tenth of a run would press everything else together
                heights += [y for x, y in points if x >= points[-1][0] / 10]
        margin = 0.05 * (max(heights) - min(heights)) or 1
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
        axes.set(xlabel="step", ylabel="loss, nats per token")


# ---- what is drawn -----------------------------------------------------------------------------

@dataclass
class ReportConfig:
    picture: str = ""        # the file to write; empty: loss.svg in the first run's folder


def read_run(folder):
    """The records in the metrics.jsonl of a run's folder, of which a kill may have cut the last."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        fail(f"no {path}: give the out_dir of a run of train.py")
    lines = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    if not any("val_loss" in record for record in records):
        fail(f"{path} holds no evaluation yet")
    return records


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    runs = [argument for argument in argv if not argument.startswith("-")]
    cfg = load_settings(ReportConfig, [argument for argument in argv if argument not in runs])
    if not runs:
        fail("which run shall be drawn? Name its out_dir, or several:  python -m tools.report RUN")
    path = Path(cfg.picture or Path(runs[0], "loss.svg"))
    check_new("picture", path, ".svg")
    records = {run: read_run(run) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_losses(records, path)
    sets = {lines[0]["config"]["dataset"] for lines in records.values()}
    if len(sets) > 1:
        print(f"the data sets {', '.join(sorted(sets))} differ, and losses of different texts or "
              f"tokens cannot be compared")
    print(f"the picture is {path}")


if __name__ == "__main__":
    run_script(main)
