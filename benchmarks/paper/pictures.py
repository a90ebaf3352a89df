"""Results as in paper.json flow in, a picture for each experiment flows out: the same bytes for the same results and
version of matplotlib.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from population import METHODS

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"
COLOURS = {
    "Inception": BLACK, "BN-Baseline": BLUE, "BN-x5": GREEN, "BN-x30": RED, "BN-x5-Sigmoid": ORANGE,
    "Inception-Sigmoid": GREY, "without": BLACK, "with": BLUE, "sigmoids": GREY, "sigmoids, BN": ORANGE,
}  # fmt: skip
NORM = {"without": "without batch norm", "with": "with batch norm"}
STYLE = Path(__file__).parents[1] / "pictures.mplstyle"
LABEL_GAP = 12  # points between labels of neighbouring lines


def figure(title: str, columns: int, height: float = 4.2, **how: object) -> tuple[Figure, list[Axes]]:
    drawing, axes = plt.subplots(1, columns, figsize=(11, height), squeeze=False, **how)
    drawing.suptitle(title, fontsize=13, fontweight="bold")
    return drawing, list(axes[0])


def percent(axes: Axes, which: str = "y") -> None:
    getattr(axes, f"{which}axis").set_major_formatter(PercentFormatter(1.0, decimals=None))


def batches_axis(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(size) for size in batches])
    axes.set_xlabel("batch size (log scale)")


def name_lines(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """A label to the right of each line's last point, moved apart where they would meet."""
    axes.figure.canvas.draw()
    points = 72 / axes.figure.dpi
    heights = {name: axes.transData.transform(end)[1] * points for name, end in ends.items()}
    at = float("-inf")
    for name in sorted(ends, key=heights.get):
        at = max(heights[name], at + LABEL_GAP)
        axes.annotate(name, ends[name], xytext=(6, at - heights[name]), textcoords="offset points", va="center",
                      color=colours[name], fontsize=9, annotation_clip=False)  # fmt: skip


def band(axes: Axes, steps: list, curves: list[list[float]], mean: list[float], colour: str, **how: object) -> None:
    """The mean over seeds, and from the lowest to the highest of them."""
    columns = list(zip(*curves, strict=True))
    axes.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(steps, mean, color=colour, **how)


def plot_sigmoids(found: dict, paper: dict) -> Figure:
    drawing, (left, *others) = figure("Three hidden layers of 100 sigmoids (the paper's figure 1)", 3)
    ends = {}
    for name, network in found["networks"].items():
        band(left, found["steps"], network["curves"], network["curve"], COLOURS[name])
        ends[NORM[name]] = found["steps"][-1], network["curve"][-1]
    percent(left)
    left.set_title("Test accuracy")
    left.set_xlabel("training step")
    handles = [plt.Line2D([], [], color=COLOURS[name]) for name in NORM]
    left.legend(handles, NORM.values(), loc="lower right")
    which = paper["settings"]["sigmoids"]["percentiles"]
    for axes, name in zip(others, NORM, strict=True):
        track = list(zip(*found["networks"][name]["track"], strict=True))
        for values, p in zip(track, which, strict=True):
            middle = p == which[len(which) // 2]
            axes.plot(found["steps"], values, color=COLOURS[name], linewidth=1.8 if middle else 1)
            axes.annotate(f"{p} %", (found["steps"][-1], values[-1]), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=8, annotation_clip=False)  # fmt: skip
        axes.fill_between(found["steps"], track[0], track[-1], color=COLOURS[name], alpha=0.1, linewidth=0)
        axes.set_title(f"Input of a sigmoid, {NORM[name]}")
        axes.set_xlabel("training step")
    others[0].set_ylabel("percentiles of the test set")
    others[1].sharey(others[0])
    return drawing


def plot_inception(found: dict, paper: dict) -> Figure:
    drawing, (left, right) = figure("Inception in small (the paper's figures 2 and 3)", 2, 4.8, width_ratios=(3, 2))
    steps, variants = found["steps"], found["variants"]
    for name, variant in variants.items():
        band(left, steps, variant["curves"], variant["curve"], COLOURS[name])
    name_lines(left, {n: (steps[-1], v["curve"][-1]) for n, v in variants.items()}, COLOURS)
    left.axhline(found["level"], color=GREY, linewidth=1, linestyle=":")
    left.annotate("best of Inception", (0, found["level"]), xytext=(2, 3), textcoords="offset points", fontsize=8)
    percent(left)
    left.set_xlabel("training step")
    left.set_ylabel("test accuracy\n(mean and range over seeds)")
    for place, (name, variant) in enumerate(reversed(variants.items())):
        values = variant["best"]["values"]
        right.plot(values, [place] * len(values), "o", color=COLOURS[name], markersize=5, alpha=0.5)
        right.plot(variant["best"]["mean"], place, "|", color=COLOURS[name], markersize=18, markeredgewidth=2)
    right.axvline(found["level"], color=GREY, linewidth=1, linestyle=":")
    right.set_yticks(range(len(variants)), list(reversed(variants)))
    right.tick_params(axis="y", length=0)
    right.grid(axis="y", visible=False)
    percent(right, "x")
    right.set_xlabel("best test accuracy (dots: seeds, line: mean)")
    return drawing


def plot_ensemble(found: dict, paper: dict) -> Figure:
    drawing, (axes,) = figure("An ensemble of six networks like BN-x30", 1, 4.6)
    rows = {**found["members"], "mean member": found["mean_member"], "best member": found["best_member"],
            "ensemble": found["ensemble"]}  # fmt: skip
    places = [i + (i > 2) * 0.6 for i in range(len(rows))]  # a gap between the members and the rest
    for place, (name, values) in zip(places, reversed(rows.items()), strict=True):
        colour = RED if name == "ensemble" else BLACK if name in ("mean member", "best member") else GREY
        errors = [1 - v for v in values["values"]]
        axes.plot(errors, [place] * len(errors), "o", color=colour, markersize=5, alpha=0.5)
        axes.plot(1 - values["mean"], place, "|", color=colour, markersize=16, markeredgewidth=2)
        axes.annotate(f"{1 - values['mean']:.1%}", (1 - values["mean"], place), xytext=(0, 9), fontsize=8, color=colour,
                      textcoords="offset points", ha="center")  # fmt: skip
    axes.axhline(2.9, color=GREY, linewidth=0.7)
    axes.set_yticks(places, list(reversed(rows)))
    axes.set_ylim(-0.6, places[-1] + 0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    percent(axes, "x")
    axes.set_xlabel("test error (a dot for each seed, a line for their mean; lower is better)")
    return drawing


def plot_population(found: dict, paper: dict) -> Figure:
    drawing, (left, right) = figure("Which statistics at inference", 2, 4.8)
    sizes, base = found["batches"], found["methods"]["moving average"]
    how = zip((BLACK, BLUE, GREEN, ORANGE, PURPLE), "osD^v", ("-", "-", "--", "-", ":"), strict=True)
    for (method, rows), (colour, marker, line) in zip(found["methods"].items(), how, strict=True):
        values = [rows[str(size)] for size in sizes]
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.3}
        left.plot(sizes, [v["mean"] for v in values], label=METHODS[method], **style)
        gains = [[100 * (a - b) for a, b in zip(v["values"], base[str(size)]["values"], strict=True)]
                 for v, size in zip(values, sizes, strict=True)]  # fmt: skip
        means = [statistics.fmean(g) for g in gains]
        errors = [statistics.stdev(g) if len(g) > 1 else 0.0 for g in gains]
        right.errorbar(sizes, means, errors, capsize=3, **style)
    for axes in (left, right):
        batches_axis(axes, sizes)
        axes.set_xlabel("batch size in training (log scale)")
    percent(left)
    left.set_title("Test accuracy")
    right.set_title("Against the moving average, in the same network")
    right.set_ylabel("points of accuracy\n(mean and standard deviation over seeds)")
    drawing.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def plot_batch_size(found: dict, paper: dict) -> Figure:
    drawing, (left, right) = figure("Batch size", 2)
    sizes = found["batches"]
    for name, rows in found["networks"].items():
        values = [rows[str(size)]["accuracy"] for size in sizes]
        left.errorbar(sizes, [v["mean"] for v in values], [v["sd"] for v in values], color=COLOURS[name], marker="o",
                      markersize=5, capsize=3, label=NORM[name])  # fmt: skip
        times = paper["times"]["batch_size"]["steps"][name]
        right.plot(sizes, [1e3 * times[str(size)] for size in sizes], color=COLOURS[name], marker="o", markersize=5)
    for axes in (left, right):
        batches_axis(axes, sizes)
    percent(left)
    left.set_ylabel("test accuracy after as many steps\n(mean and standard deviation over seeds)")
    left.legend(loc="upper left")
    right.set_ylabel("milliseconds of a training step, one thread")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    return drawing


def smooth(values: list[float], width: int = 10) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]


def plot_shift(found: dict, paper: dict) -> Figure:
    drawing, parts = figure("Internal covariate shift: how far a step moves the inputs of layers", 2, sharey=True)
    kinds = [[n for n in found["networks"] if n.startswith("sigmoids") == sigmoids] for sigmoids in (False, True)]
    for axes, names in zip(parts, kinds, strict=True):
        for name in names:
            values = smooth(found["networks"][name]["steps"])
            axes.plot(range(1, len(values) + 1), values, color=COLOURS[name], linewidth=1.3, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("training step")
        axes.legend()
    parts[0].set_title("Inception in small")
    parts[1].set_title("Three hidden layers of sigmoids")
    parts[0].set_ylabel("movement per step, in standard\ndeviations of the layer (log scale)")
    for axes in parts:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return drawing


PLOTS: dict[str, Callable[[dict, dict], Figure]] = {
    "sigmoids": plot_sigmoids,
    "inception": plot_inception,
    "ensemble": plot_ensemble,
    "population": plot_population,
    "batch_size": plot_batch_size,
    "shift": plot_shift,
}


def draw(paper: dict, folder: Path, suffixes: tuple[str, ...] = ("svg", "png")) -> None:
    """Pictures of each experiment that was run, named after it."""
    for name, found in paper["results"].items():
        with plt.style.context(STYLE):
            drawing = PLOTS[name](found, paper)
            for suffix in suffixes:
                # no date, so that the same results make the same file
                metadata = {"Date": None} if suffix == "svg" else {}
                drawing.savefig(folder / f"{name}.{suffix}", metadata=metadata, dpi=110)
            plt.close(drawing)
