"""
What came of races. From the facts that tools/race.py writes to results.json this makes a race's
figures, its table.md and its two pictures.

    python -m tools.report                      draw gaps against the size, from several races

A gap is the mean difference of two contenders' losses, seed by seed, with its 95 % interval. A
race knows the gap of OURS to THEIRS if THEIRS was its first contender, or in its --against=.
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

from nanodva.errors import fail, replacing, run_script
from nanodva.settings import load_settings
from tools.bench import markdown

# The 97.5 % quantile of Student's t for 1, 2 ... 30 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
           2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
           2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# Blue, vermilion, green and purple of Okabe and Ito, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
# Legible on white and on black
GREY = "#7d7d7d"
DASHES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (5, 1)))


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
        margin = STUDENT[min(n - 1, 30) - 1] * statistics.stdev(differences) / math.sqrt(n)
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
    if losses and losses[0] <= target:
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
    ms = {name: statistics.median(fact["ms_before"] + fact["ms_after"])
          for name, fact in facts.items()}
    finals = {name: [math.inf if run["broken"] else run["test"][-1] for run in fact["runs"]]
              for name, fact in facts.items()}
    target = spread(finals[first])["mean"]
    if target is None:
        target = -math.inf
    figures = {}
    for name, fact in facts.items():
        times, reference_times = (facts[key]["ms_before"] + facts[key]["ms_after"]
                                  for key in (name, first))
        # A sweep with no worse rate on both sides of the best has not found the best
        rates = {run["learning_rate"] for run in fact["sweep"]}
        bank_rates = {run["bank_lr"] for run in fact["sweep"]
                      if run["learning_rate"] == fact["learning_rate"]}
        ends = [min(rates), max(rates)] if len(rates) > 1 else []
        bank_ends = [min(bank_rates), max(bank_rates)] if len(bank_rates) > 1 else []
        reached = [math.inf if run["broken"] else steps_to(run["steps"], run["test"], target)
                   for run in fact["runs"]]
        figures[name] = {
            "ms_per_step": ms[name],
            "ms_before": statistics.median(fact["ms_before"]),
            "ms_after": statistics.median(fact["ms_after"]),
            # Turn by turn, so that a drift of the machine cancels
            "step_time_ratio": statistics.median(
                [ours / theirs for ours, theirs in zip(times, reference_times, strict=True)]),
            "seconds": fact["settings"]["max_iters"] * ms[name] / 1e3,
            "bracketed": (fact["learning_rate"] not in ends and fact["bank_lr"] not in bank_ends),
            "loss": spread(finals[name]),
            "seconds_to_reference": spread([steps * ms[name] / 1e3 for steps in reached]),
            "against": {other: compare(finals[name], finals[other])
                        for other in dict.fromkeys([first, *against]) if other != name}}
    return figures


# ---- the table ---------------------------------------------------------------------------------

def table(results):
    """The text of table.md."""
    facts, conditions = results["contenders"], results["conditions"]
    first, seeds = next(iter(facts)), results["rules"]["seeds"]
    settings = facts[first]["settings"]
    compiled = "compiled" if settings["compile"] else "not compiled"
    rows = [table_row(name, results) for name in facts]
    lines = [
        f"# {results['name']}\n",
        f"Data set {conditions['dataset']}: {conditions['tokens']['train']:,} + "
        f"{conditions['tokens']['val']:,} tokens, sha256 of train.bin "
        f"{conditions['sha256']['train'][:12]}. {first} has {settings['n_layer']} layers, "
        f"{settings['n_embd']} wide, and {settings['block_size']} tokens of context; "
        f"{settings['max_iters']} steps of {settings['gradient_accumulation_steps']} x "
        f"{settings['batch_size']} sequences, {settings['optimizer']}, {settings['dtype']}, "
        f"{compiled}. Equal for all: {results['rules']['match']}. {conditions['machine']}, "
        f"CPU threads: {results['threads']}, torch {conditions['torch']}, nanoDVA "
        f"{results['commit']}.\n",
        f"Learning rates were chosen on the first half of the validation split, in runs of "
        f"{results['rules']['sweep_share']:g} times the length. Losses are those on its second "
        f"half, mean and standard deviation of {seeds} seeds. Differences are taken "
        f"seed by seed; in brackets stands the 95 % interval of their mean, by Student's t, each "
        f"for itself.\n",
        markdown(rows),
        "The sweeps: loss of the first seed on the first half, by learning rate (x bank_lr).\n"]
    for name, fact in facts.items():
        tried = []
        for run in sorted(fact["sweep"], key=lambda run: (run["learning_rate"], run["bank_lr"])):
            bank = f" x {run['bank_lr']:g}" if fact["settings"]["bank_layers"] else ""
            loss = "broken" if run["loss"] is None else f"{run['loss']:.4f}"
            tried.append(f"{run['learning_rate']:g}{bank}: {loss}")
        lines.append(f"- {name}: {', '.join(tried)}")
    return "\n".join(lines) + "\n"


def table_row(name, results):
    """{heading: text} of a contender."""
    fact, figures = results["contenders"][name], results["figures"][name]
    first, seeds = next(iter(results["figures"])), results["rules"]["seeds"]
    conditions = results["conditions"]
    ms = f"{figures['ms_per_step']:.2f}"
    if abs(figures["ms_after"] / figures["ms_before"] - 1) > 0.05:
        ms += f" (before {figures['ms_before']:.2f}, after {figures['ms_after']:.2f})"
    per_byte = conditions["tokens"]["val"] / conditions["bytes"]["val"] / math.log(2)
    row = {"contender": name, "parameters": f"{fact['parameters'] / 1e6:.2f} M", "ms/step": ms,
           f"/ {first}": f"{figures['step_time_ratio']:.3f}",
           "steps": str(fact["settings"]["max_iters"]), "seconds": f"{figures['seconds']:.1f}",
           "learning rate": f"{fact['learning_rate']:g}",
           "bank_lr": f"{fact['bank_lr']:g}" if fact["settings"]["bank_layers"] else "-",
           "loss": plus_minus(figures["loss"], 4, seeds),
           "bits/byte": plus_minus(figures["loss"], 3, seeds, per_byte)}
    if not figures["bracketed"]:
        row["learning rate"] += " (not bracketed)"
    others = dict.fromkeys(other for entry in results["figures"].values()
                           for other in entry["against"])
    for other in others:
        difference = figures["against"].get(other, {"mean": None, "low": None, "verdict": "-"})
        text = "-" if difference["mean"] is None else f"{difference['mean']:+.4f}"
        if difference["low"] is not None:
            text += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
        row |= {f"- {other}": text, f"than {other}": difference["verdict"]}
    reached, whole = figures["seconds_to_reference"], results["figures"][first]["seconds"]
    row[f"seconds to {first}'s loss"] = plus_minus(reached, 1, seeds)
    row[f"/ {first}'s seconds"] = plus_minus(reached, 3, seeds, 1 / whole)
    return row


def plus_minus(figure, digits, seeds, factor=1.0):
    """mean ± sd of a spread(), as far as there are, and how many seeds it is of if not of all."""
    if figure["n"] == 0:
        return "-"
    text = f"{figure['mean'] * factor:.{digits}f}"
    if figure["sd"] is not None:
        text += f" ± {figure['sd'] * factor:.{digits}f}"
    if figure["n"] < seeds:
        text += f" ({figure['n']} of {seeds} seeds)"
    return text


# ---- the pictures ------------------------------------------------------------------------------

def draw_all(results, highlight, folder):
    """
    Write race.svg, with the contenders in the list `highlight` in colour, and race-all.svg with
    all of them in grey. Without matplotlib one line says how to get it.
    """
    colours = {name: (colour, "-") for name, colour in zip(highlight, COLOURS, strict=False)}
    greys = {name: (GREY, DASHES[i % len(DASHES)]) for i, name in enumerate(results["contenders"])}
    try:
        draw(results, colours, folder / "race.svg")
        draw(results, greys, folder / "race-all.svg")
    except ImportError:
        print("no pictures, which need matplotlib:  pip install matplotlib, and the same command "
              "again")


@contextmanager
def axes_for(path):
    """Axes in the colours of the pictures, for a with block, after which they are saved as SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    greys = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                           "ytick.color"), GREY)
    # Text stays text, the same figures give the same file, and the page shines through
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "race", "savefig.transparent": True}
    with matplotlib.rc_context(greys | fixed):
        figure = Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        with replacing(path) as file:
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


def draw(results, styles, path):
    """
    Draw loss against seconds, as SVG: for each contender in styles {name: (colour, line style)}
    the mean of its seeds, a band from the lowest to the highest, and its name at the line's end.
    """
    with axes_for(path) as axes:
        ends = []
        for name, (colour, line) in styles.items():
            runs = [run for run in results["contenders"][name]["runs"] if not run["broken"]]
            if not runs:
                continue
            ms = results["figures"][name]["ms_per_step"]
            seconds = [step * ms / 1e3 for step in runs[0]["steps"]]
            losses = list(zip(*(run["test"] for run in runs), strict=True))    # by step, all seeds
            means = [statistics.fmean(values) for values in losses]
            axes.plot(seconds, means, color=colour, linestyle=line, linewidth=2)
            axes.fill_between(seconds, [min(values) for values in losses],
                              [max(values) for values in losses], color=colour, alpha=0.2,
                              linewidth=0)
            ends.append((means[-1], seconds[-1], name, colour))
        axes.set(xlabel="seconds of training", ylabel="loss on unseen text, nats per token")
        axes.set_title("lower and further left is better", loc="left", fontsize=11)
        if ends:
            lowest, highest = min(ends)[0], max(ends)[0]
            # The first steps would press everything else together
            top = highest + max(0.25, 3 * (highest - lowest))
            axes.set_ylim(lowest - 0.1 * (top - lowest), top)
            write_names(axes, ends)


def write_names(axes, ends):
    """Write each name at the end of its line; ends are (height, x, name, colour)."""
    bottom, top = axes.get_ylim()
    height, right = bottom, 1.03 * max(x for _, x, _, _ in ends)
    for y, x, name, colour in sorted(ends):
        # One name above the other, each with a thin line to its end
        height = max(y, height + (top - bottom) / 18)
        axes.annotate(name, (x, y), (right, height), color=colour, va="center",
                      annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.5))


# ---- several races -----------------------------------------------------------------------------

@dataclass
class ReportConfig:
    gaps: str = "docs/race/gaps.json"        # {line: [[RACE, OURS, THEIRS], ...]}, four at most
    picture: str = "docs/race/gaps.svg"      # the file to write
    title: str = "below the grey line, DVA is better"      # what stands above it


def read_lines(path):
    """
    {line: [(size, gap), ...]} of a file as --gaps= describes it, where the folders of the races
    lie beside it. Raises UserError where the file, a race or a pair is not there, or the file
    holds something else.
    """
    if not path.exists():
        fail(f"gaps: there is no {path}; docs/race/gaps.json is an example")
    try:
        given = json.loads(path.read_bytes())
        lines = {line: [(race, ours, theirs) for race, ours, theirs in pairs]
                 for line, pairs in given.items()}
    except (ValueError, TypeError, AttributeError):
        lines = {}
    if not 1 <= len(lines) <= len(COLOURS) or not all(lines.values()):
        fail(f"{path} must hold {{line: [[RACE, OURS, THEIRS], ...]}} with one to four lines; "
             f"docs/race/gaps.json is an example")
    for pairs in lines.values():
        for i, (race, ours, theirs) in enumerate(pairs):
            results = path.parent / race / "results.json"
            if not results.exists():
                fail(f"{path}: there is no {results}; python -m tools.race writes such a file")
            pairs[i] = read_gap(json.loads(results.read_bytes()), ours, theirs)
    return lines


def read_gap(results, ours, theirs):
    """(size of the models, comparison of ours with theirs) in a race. Raises UserError."""
    against = results["figures"].get(ours, {"against": {}})["against"]
    if theirs not in against or against[theirs]["mean"] is None:
        known = [f"{name} to {other}" for name, entry in results["figures"].items()
                 for other, gap in entry["against"].items() if gap["mean"] is not None]
        fail(f"the race {results['name']} knows no gap of {ours!r} to {theirs!r}, but of "
             f"{', '.join(known)}")
    first = next(iter(results["contenders"].values()))["settings"]
    return f"{first['n_layer']} layers x {first['n_embd']}", against[theirs]


def draw_gaps(lines, title, path):
    """Draw the lines of read_lines() as SVG, under a title. Bars are the 95 % intervals."""
    with axes_for(path) as axes:
        ends = []
        for i, (line, points) in enumerate(lines.items()):
            # Side by side, so that the bars do not hide each other
            places = [x + 0.04 * (i - (len(lines) - 1) / 2) for x in range(len(points))]
            means = [gap["mean"] for _, gap in points]
            margins = [0 if gap["high"] is None else gap["high"] - gap["mean"]
                       for _, gap in points]
            axes.errorbar(places, means, margins, color=COLOURS[i], marker="o", linewidth=2,
                          elinewidth=1, capsize=3)
            ends.append((means[-1], places[-1], line, COLOURS[i]))
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xticks(range(len(points)), [size for size, _ in points])
        axes.set(ylabel="difference of the losses, nats per token")
        axes.set_title(title, loc="left", fontsize=11)
        write_names(axes, ends)


def main(argv=None):
    cfg = load_settings(ReportConfig, argv)
    lines = read_lines(Path(cfg.gaps))
    try:
        draw_gaps(lines, cfg.title, Path(cfg.picture))
    except ImportError:
        fail("a picture needs matplotlib:  pip install matplotlib, and the same command again")
    print(f"the picture is {cfg.picture}")


if __name__ == "__main__":
    run_script(main)
