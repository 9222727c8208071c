"""
Pictures and tables of what was trained.

    python -m tools.report out-demo                    the loss of a run while it trained
    python -m tools.report out-demo out-demo-gpt2      of several runs, in one picture
    python -m tools.report --ladder=docs/race          several races, from small models to large

A picture is an SVG that can be read on light pages and on dark ones. tools/race.py makes its
table.md and race.svg here. --ladder writes into its folder, from the results.json of the races in
it: ladder.svg, each block's best losses against training compute; curves.svg, loss over tokens in
the largest race; ladder.md, a row for each race and contender, and for each race the compute
multiplier: the compute that DVA takes as a share of what GPT-2 would take to the same loss.
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

from nanodva.errors import check_new, fail, naming_file, replacing, run_script
from nanodva.settings import PathName, load_settings

# The 97.5 % quantile of Student's t for 1, 2 ... 10 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Blue, vermilion, green and purple of Okabe and Ito, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", ":", "-.")
# Legible on white and on black
GREY = "#7d7d7d"


# ---- figures -----------------------------------------------------------------------------------

def spread(losses):
    """{"mean", "sd", "n"} of the losses that are not None; None if they are too few."""
    losses = [loss for loss in losses if loss is not None]
    return {"mean": statistics.fmean(losses) if losses else None,
            "sd": statistics.stdev(losses) if len(losses) > 1 else None, "n": len(losses)}


def compare(ours, theirs):
    """
    {"mean", "low", "high", "n", "verdict"} of the differences ours - theirs of {seed: loss}, over
    the seeds that both have: their mean, and the ends of its 95 % interval by Student's t. The
    verdict is better, worse, or not told apart if the interval holds 0; too few seeds below three;
    broken if a loss is None.
    """
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not pairs or any(None in pair for pair in pairs):
        return {"mean": None, "low": None, "high": None, "n": len(pairs), "verdict": "broken"}
    differences = [a - b for a, b in pairs]
    n, mean = len(differences), statistics.fmean(differences)
    low, high, verdict = None, None, "not told apart" if n > 2 else "too few seeds"
    if n > 1:
        # For more seeds this is a little wider than need be
        margin = STUDENT[min(n - 1, 10) - 1] * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - margin, mean + margin
    if n > 2 and not low <= 0 <= high:
        verdict = "better" if high < 0 else "worse"
    return {"mean": mean, "low": low, "high": high, "n": n, "verdict": verdict}


def losses_of(fact, half=1):
    """{seed: loss} of a contender on the half that is reported (1), or that chooses (0)."""
    return {seed: pair and pair[half] for seed, pair in fact["losses"].items()}


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
    facts, plan = results["contenders"], results["plan"]
    rows = [table_row(label, results) for label in facts]
    lines = [
        f"# {results['name']}\n", f"```sh\n{results['command']}\n```\n",
        f"Data set {results['dataset']}, {plan['data']['tokens']['train']:,} tokens, sha256 of "
        f"train.bin {plan['data']['sha256']['train'][:12]}. {plan['machine']}, "
        f"{results['dtype']}. {results['choosing']} seed(s) chose the settings by the mean loss on "
        f"{plan['evaluated']:,} tokens, every second window of the validation split. Losses, in "
        f"nats per token, are those of other seeds on as many tokens between these: mean ± "
        f"standard deviation. Differences are taken seed by seed; brackets give the 95 % "
        f"confidence interval of their mean (Student's t, seeds alone, uncorrected for multiple "
        f"comparisons). Seconds are those of one thread with a core of its own.\n", markdown(rows),
        "What was tried, and its mean loss on those windows; * marks what was chosen:\n"]
    for label, fact in facts.items():
        tried = [f"{described(trial, fact)}: "
                 f"{'broken' if trial['loss'] is None else format(trial['loss'], '.4f')}"
                 for trial in fact["trials"]]
        lines.append(f"- {label}, {len(tried)} trials. {'; '.join(tried) or 'Nothing.'}")
    return "\n".join(lines) + "\n"


def described(trial, fact):
    """The settings in which a trial differs from another trial of its contender, as text."""
    texts = [f"{name} {value:g}" for name, value in trial.items() if name not in ("loss", "best")
             and len({other[name] for other in fact["trials"]}) > 1]
    return ("* " if trial["best"] else "") + ", ".join(texts)


def table_row(label, results):
    """{heading: text} of a contender."""
    facts = results["contenders"]
    fact, first = facts[label], next(iter(facts))
    row = {"contender": label, "layers x width": f"{fact['n_layer']} x {fact['n_embd']}",
           "parameters": f"{fact['parameters'] / 1e6:.3f} M", "tokens": f"{fact['tokens']:,}",
           "TFLOP": f"{fact['flops'] / 1e12:.3g}", "seconds": f"{fact['seconds']:.1f}",
           f"/ {first}": f"{fact['seconds'] / facts[first]['seconds']:.3f}",
           "rate": f"{fact['learning_rate']:g}",
           "loss": plus_minus(spread(losses_of(fact).values())), "n": str(len(fact["losses"]))}
    for other in dict.fromkeys([first, *results["against"]]):
        if other in facts:
            gap = compare(losses_of(fact), losses_of(facts[other]))
            pairs = "" if gap["n"] == len(fact["losses"]) else f", n = {gap['n']}"
            row[f"minus {other}"] = "" if other == label else gap_text(gap) + pairs
    return row


def gap_text(gap):
    """A comparison as text: mean [low, high] verdict."""
    text = "" if gap["mean"] is None else f"{gap['mean']:+.4f} "
    if gap["low"] is not None:
        text += f"[{gap['low']:+.4f}, {gap['high']:+.4f}] "
    return text + gap["verdict"]


def plus_minus(figure):
    """A spread() as text: mean ± sd."""
    if figure["n"] == 0:
        return "broken"
    return f"{figure['mean']:.4f}" + (f" ± {figure['sd']:.4f}" if figure["sd"] is not None else "")


# ---- the pictures ------------------------------------------------------------------------------

@contextmanager
def axes_for(path, title, panels=1):
    """
    Axes to draw on in a with block, or a list of several panels, after which each labelled line
    gets its name and the picture is saved as SVG. Raises UserError if matplotlib is missing.
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
        figure = Figure(figsize=(8, 4.5 * panels))
        found = figure.subplots(panels, squeeze=False)[:, 0]
        for axes in found:
            axes.spines[["top", "right"]].set_visible(False)
        found[0].set_title(title, loc="left", fontsize=11)
        yield found if panels > 1 else found[0]
        for axes in found:
            write_names(axes)
        with replacing(path) as file:
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


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


def draw_race(results, path, labels=None, over="seconds"):
    """
    Draw the mean curves of the contenders, or of those with these labels: the loss of the training
    batches against the seconds or the tokens of training.
    """
    with axes_for(path, "lower and further left is better") as axes:
        finals = []
        for i, label in enumerate(labels or results["contenders"]):
            fact = results["contenders"][label]
            if not fact["curve"]:
                continue
            tokens, losses = zip(*fact["curve"], strict=True)
            scale = fact[over] / fact["tokens"]
            axes.plot([count * scale for count in tokens], losses, label=label, linewidth=2,
                      **style(i))
            finals.append(losses[-1])
        axes.set(xlabel=f"{over} of training", ylabel="loss of new training text, nats per token")
        if finals:
            # The first steps would press everything else together
            top = max(finals) + max(0.25, 3 * (max(finals) - min(finals)))
            axes.set_ylim(min(finals) - 0.1 * (top - min(finals)), top)


# ---- several races: the ladder -------------------------------------------------------------------

def best_of(results, block):
    """
    The label of the block's best contender that takes at most 1.05 of the reference's seconds, with
    Muon and without banks, or None: by the reported seeds on the other half of the windows. One
    with a broken run or without a seed of the reference does not count.
    """
    facts, losses = results["contenders"], {}
    reference = next(iter(facts.values()))
    for label, fact in facts.items():
        found = losses_of(fact, half=0)
        whole = None not in found.values() and reference["losses"].keys() <= found.keys()
        if fact["block"] == block and fact["seconds"] <= 1.05 * reference["seconds"] and whole \
                and fact["optimizer"] == "muon" and not fact["bank_layers"]:
            losses[label] = spread(found.values())["mean"]
    return min(losses, key=losses.get, default=None)


def power_law(points):
    """(a, b) of the line log loss = a - b log compute through points (compute, loss)."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    slope, intercept = statistics.linear_regression(x, y)
    return intercept, -slope


def multiplier(ours, theirs, gap, exponent, axis):
    """
    (mean, low, high) of the compute of the contender `ours` as a share of what `theirs` would take
    to its loss, if the loss of theirs falls as compute ** -exponent; gap is compare() of the two.
    """
    loss = spread(losses_of(theirs).values())["mean"]
    return [None if gap[name] is None else
            ours[axis] / theirs[axis] * (1 + gap[name] / loss) ** (1 / exponent)
            for name in ("mean", "low", "high")]


def frontier(races, block, axis):
    """[(compute, mean loss)] of the block's best contender in each race."""
    facts = [results["contenders"][best_of(results, block)] for results in races
             if best_of(results, block)]
    return [(fact[axis], spread(losses_of(fact).values())["mean"]) for fact in facts]


def ladder_table(races):
    """The text of ladder.md."""
    headings = ("contender", "layers x width", "parameters", "tokens", "TFLOP", "/ gpt2", "loss",
                "n", "minus gpt2")
    lines = [markdown([{"race": f"[{results['name']}]({results['name']}/table.md)"}
                       | {name: table_row(label, results).get(name, "") for name in headings}
                       for results in races for label in results["contenders"]])]
    rows = []
    for results in races:
        facts, names = results["contenders"], [best_of(results, block) for block in ("gpt2", "dva")]
        if None in names or len(frontier(races, "gpt2", "seconds")) < 2:
            continue
        theirs, ours = (facts[name] for name in names)
        gap, row = compare(losses_of(ours), losses_of(theirs)), {}
        for axis in ("seconds", "flops"):
            exponent = power_law(frontier(races, "gpt2", axis))[1]
            found = multiplier(ours, theirs, gap, exponent, axis)
            texts = ["?" if value is None else f"{value:.2f}" for value in found]
            row[f"{axis}, DVA / GPT-2"] = f"{texts[0]} [{texts[1]}, {texts[2]}]"
        rows.append({"race": results["name"], "GPT-2": names[0], "DVA": names[1],
                     "difference": gap_text(gap), "n": str(gap["n"])} | row)
    lines += [markdown(rows)] if rows else ["One race has no slope, so no compute multiplier yet."]
    return "\n".join(lines)


def draw_ladder(races, path):
    """Draw each contender's loss against its FLOPs and its seconds, and a power law for each
    block's best ones."""
    title = "squares: gpt2, circles: dva; lower and further left is better"
    with axes_for(path, title, panels=2) as panels:
        for axes, axis in zip(panels, ("flops", "seconds"), strict=True):
            for i, block in enumerate(("gpt2", "dva")):
                facts = [fact for results in races for fact in results["contenders"].values()
                         if fact["block"] == block]
                axes.scatter([fact[axis] for fact in facts],
                             [spread(losses_of(fact).values())["mean"] for fact in facts],
                             marker="so"[i], alpha=0.4, color=COLOURS[i])
                points = frontier(races, block, axis)
                if len(points) > 1:
                    a, b = power_law(points)
                    ends = [points[0][0] / 1.3, points[-1][0] * 1.3]
                    axes.plot(ends, [math.exp(a) * end ** -b for end in ends], linewidth=2,
                              label=f"{block}, compute^-{b:.3f}", **style(i))
            axes.set(xscale="log", yscale="log", xlabel=f"{axis} of training",
                     ylabel="loss on unseen text, nats per token")
            axes.yaxis.set_major_formatter("{x:.2f}")
            axes.yaxis.set_minor_formatter("{x:.2f}")


def draw_losses(runs, path):
    """
    Draw the losses of runs {name: records of metrics.jsonl} against the step: on val as a strong
    line, of the training batches as a thin one.
    """
    with axes_for(path, "strong: unseen text; thin: training text; lower is better") as axes:
        heights = []
        for i, (name, records) in enumerate(runs.items()):
            for loss, label, width, marker in (("train_loss", None, 0.5, ""),
                                               ("val_loss", name, 2, "o")):
                points = [(record["step"], record[loss]) for record in records if loss in record]
                axes.plot(*zip(*points, strict=True), label=label, linewidth=width, marker=marker,
                          markersize=4, **style(i))
                # The first tenth of a run would press everything else together
                heights += [y for x, y in points if x >= points[-1][0] / 10]
        margin = 0.05 * (max(heights) - min(heights)) or 1
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
        axes.set(xlabel="step", ylabel="loss, nats per token")


# ---- what is drawn -----------------------------------------------------------------------------

@dataclass
class ReportConfig:
    picture: PathName = ""   # the file to write; empty: loss.svg in the first run's folder
    ladder: PathName = ""    # a folder with races, which gets ladder.svg, curves.svg and ladder.md


def read_lines(path):
    """The records in a file of JSON lines, of which a kill may have cut the last. Or UserError."""
    with naming_file("read", path, "move it away"):
        text = path.read_bytes() if path.exists() else b""
    try:
        # What is after the last line's end is no line
        records = [json.loads(line) for line in text.split(b"\n")[:-1]]
    except ValueError as error:
        fail(f"{path} is damaged ({error}): move it away, or mend it")
    if not all(isinstance(record, dict) for record in records):
        fail(f"{path} is damaged, a line of it is no record: move it away, or mend it")
    return records


def read_run(folder):
    """The records in the metrics.jsonl of a run's folder."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        fail(f"no {path}: give the out_dir of a run of train.py")
    records = read_lines(path)
    if not any("val_loss" in record for record in records):
        fail(f"{path} holds no evaluation yet")
    return records


def write_ladder(folder):
    """Write ladder.md, ladder.svg and curves.svg of the races in a folder."""
    paths = folder.glob("*/results.json")
    races = [results for path in paths if (results := json.loads(path.read_bytes()))["contenders"]]
    if not races:
        fail(f"ladder={str(folder)!r} holds no race: name the --results of tools.race")
    races.sort(key=lambda results: next(iter(results["contenders"].values()))["flops"])
    text = ladder_table(races)
    with replacing(folder / "ladder.md") as file:
        file.write(text.encode())
    print(text)
    largest = races[-1]
    labels = dict.fromkeys([*largest["contenders"]][:2] + [best_of(largest, "dva")])
    draw_ladder(races, folder / "ladder.svg")
    draw_race(largest, folder / "curves.svg", [label for label in labels if label], over="tokens")
    print(f"all is in {folder}/")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    runs = [argument for argument in argv if not argument.startswith("-")]
    cfg = load_settings(ReportConfig, [argument for argument in argv if argument not in runs])
    if cfg.ladder:
        write_ladder(Path(cfg.ladder))
        return
    if not runs:
        fail("which run shall be drawn? Name its out_dir, or several:  python -m tools.report RUN")
    path = Path(cfg.picture or Path(runs[0], "loss.svg"))
    check_new("picture", path, ".svg")
    records = {run: read_run(run) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_losses(records, path)
    losses = {run: [record["val_loss"] for record in lines if "val_loss" in record]
              for run, lines in records.items()}
    print(markdown([{"run": run, "step": str(records[run][-1]["step"]),
                     "last val loss": f"{found[-1]:.4f}", "lowest": f"{min(found):.4f}"}
                    for run, found in losses.items()]))
    measured = [lines[0].get("measured_on", {}) for lines in records.values()]
    for name, what in dict(data="text", windows="number of windows", dtype="type").items():
        if len({str(found.get(name)) for found in measured}) > 1:
            print(f"the runs were not evaluated on the same {what}: their losses cannot be "
                  f"compared, but for those that have the same {name} in the first line of their "
                  f"metrics.jsonl")
    print(f"the picture is {path}")


if __name__ == "__main__":
    run_script(main)
