"""Pictures of the records of a run, with matplotlib: the same bytes for the same records and version.

Usage: plots.py results/latest.jsonl FOLDER    (make report draws those of README and docs/benchmarks.md)
"""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from records import (
    Record,
    groups_of,
    least_tensors,
    of_limit,
    resnet50,
    seconds,
    select,
    speedup,
    warm,
)  # fmt: skip
from suite import PASSES
from summaries import load
from svg import save
from tables import machine

# Okabe and Ito's colours, which the colour-blind can tell apart; one for each type and layout, or peer.
COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#F0E442"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
# Of fastbn, torch, and the others.
PEER_COLOURS = [COLOURS[i] for i in (0, 2, 4, 5, 3, 1, 6, 7)]
STYLE = Path(__file__).with_name("pictures.mplstyle")
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
TRAINING = ("forward", "forward+backward")


def plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def power_of_ten(value: float, _: object = None) -> str:
    """Of a tick of a logarithmic axis, as plain text: matplotlib's own are a formula each."""
    exponent = str(round(math.log10(value))) if value else ""
    return f"10{exponent.translate(SUPERSCRIPTS)}" if value else "0"


def figure(records: list[Record], title: str, columns: int, height: float, **how: object) -> tuple[Figure, list[Axes]]:
    drawing, axes = plt.subplots(1, columns, figsize=(11, height), squeeze=False, **how)
    drawing.suptitle(title, fontsize=13, fontweight="bold")
    return drawing, list(axes[0])


def _by_shape(
    records: list[Record], title: str, draw_group: Callable[[Axes, list[float], list[Record], int, str], None]
) -> tuple[Figure, list[Axes]]:
    """A panel for each pass; in it a column for each of ResNet-50's shapes, the largest first, and in that a place for
    each type and layout, which ``draw_group`` fills, given the places, the records, and the group's number and name."""
    cases = resnet50(records)
    title = f"{title}: batch norms of ResNet-50, batch {cases[0]['shape'][0]}"
    drawing, parts = figure(records, title, len(PASSES), 4.8, sharey=True)
    groups = groups_of(cases)
    shapes = sorted({tuple(r["shape"]) for r in cases}, key=lambda s: (-s[1] * s[2] * s[3], s))
    for axes, name in zip(parts, PASSES, strict=True):
        for index, (dtype, layout) in enumerate(groups):
            rows = select(cases, dtype=dtype, layout=layout, **{"pass": name})
            places = [shapes.index(tuple(r["shape"])) - 0.4 + (index + 0.5) * 0.8 / len(groups) for r in rows]
            draw_group(axes, places, rows, index, f"{dtype}, {layout}")
        axes.set_xticks(
            range(len(shapes)), [f"{s[1]} × {s[2]}²" for s in shapes], rotation=60, ha="right", rotation_mode="anchor"
        )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(shapes) - 0.4)
        axes.grid(axis="x", visible=False)
        edges = [edge - 0.5 for edge in range(1, len(shapes))]
        axes.plot([x for edge in edges for x in (edge, edge, math.nan)], [0, 1, math.nan] * len(edges), color="#eeeeee",
                  linewidth=0.7, zorder=0, transform=axes.get_xaxis_transform())  # fmt: skip
        axes.axhline(1, color="black", linewidth=1)
        axes.set_title(name)
    return drawing, parts


def sticks(axes: Axes, places: list[float], ends: list[tuple[float, float]], **how: object) -> None:
    """A vertical line at each place, all of them one path, which is a tenth of a path each."""
    xs = [x for place in places for x in (place, place, math.nan)]
    ys = [y for pair in ends for y in (*pair, math.nan)]
    axes.plot(xs, ys, solid_capstyle="butt", **how)


def plot_speedup(records: list[Record]) -> Figure | None:
    if not resnet50(records):
        return None

    def bars(axes: Axes, places: list[float], rows: list[Record], index: int, label: str) -> None:
        sticks(axes, places, [(1, speedup(r)) for r in rows], color=COLOURS[index], linewidth=3.5, label=label)

    drawing, parts = _by_shape(records, "Speed-up over eager PyTorch", bars)
    parts[0].set_yscale("log", base=2)
    parts[0].yaxis.set_major_formatter(FuncFormatter(plain))
    parts[0].set_ylabel("time of torch / time of fastbn\n(above 1 fastbn is faster; log scale)")
    parts[1].set_xlabel("channels × height² of the shapes, the largest tensor first")
    _legend_below(drawing, records, parts[0], 4)
    return drawing


def _legend_below(drawing: Figure, records: list[Record], axes: Axes, columns: int) -> None:
    how = {"loc": "outside lower center", "ncols": columns, "title": machine(records), "title_fontsize": 8}
    drawing.legend(*axes.get_legend_handles_labels(), **how)


def plot_limit(records: list[Record]) -> Figure | None:
    """The roofline of one-pass, memory-bound work: which part of a copy's speed is reached, moving the least bytes."""
    if not resnet50(records):
        return None

    def from_torch_to_us(axes: Axes, places: list[float], rows: list[Record], index: int, label: str) -> None:
        ours, theirs = ([of_limit(r, variant) for r in rows] for variant in ("fastbn", "torch"))
        how = {"color": COLOURS[index]}
        sticks(axes, places, list(zip(theirs, ours, strict=True)), linewidth=1, **how)
        sticks(axes, places, [(y - 0.025, y) for y in ours], linewidth=5, label=label, **how)

    drawing, parts = _by_shape(records, "Part of the memory limit that is reached", from_torch_to_us)
    for axes, name in zip(parts, PASSES, strict=True):
        axes.set_title(f"{name}: at least {PASSES[name]} tensors to move")
    parts[0].set_ylabel(
        "time of a copy of the least bytes / time\n(from torch, thin, to fastbn, thick; higher is better)"
    )
    parts[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    parts[0].set_ylim(bottom=0)
    parts[0].annotate("limit: speed of a copy", (0.99, 1), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    parts[1].set_xlabel("channels × height² of the shapes, the largest tensor first")
    _legend_below(drawing, records, parts[0], 4)
    return drawing


def elements_of(record: Record) -> int:
    return math.prod(record["shape"])


def plot_scaling(records: list[Record]) -> Figure | None:
    cases = warm(records, kind="case", suite="scaling")
    if not cases:
        return None
    groups = groups_of(cases)
    drawing, parts = figure(records, "Time for each element, 64 channels", len(groups), 4.6, sharey=True)
    (head,) = select(records, kind="environment")
    for axes, (dtype, layout) in zip(parts, groups, strict=True):
        for name, line in zip(TRAINING, ("-", "--"), strict=True):
            rows = sorted(select(cases, dtype=dtype, **{"pass": name}), key=elements_of)
            curves = {f"{v}, {name}": [seconds(r, v) for r in rows] for v in ("fastbn", "torch")}
            curves[f"limit (copy), {name}"] = [seconds(r, "copy") * least_tensors(r) / 2 for r in rows]
            for (label, times), colour in zip(curves.items(), (*PEER_COLOURS[:2], "#777777"), strict=True):
                ns = [time / elements_of(r) * 1e9 for time, r in zip(times, rows, strict=True)]
                axes.plot([elements_of(r) for r in rows], ns, color=colour, linestyle=line, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(power_of_ten))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(FuncFormatter(plain))
        itemsize = cases[0]["tensor_bytes"] // elements_of(cases[0]) if dtype == cases[0]["dtype"] else 2
        if cache := head.get("cache_bytes"):
            place = cache / 2 / itemsize
            axes.axvline(place, color="#aaaaaa", linewidth=1, linestyle=":")
            axes.annotate("from here on x and y\nexceed the cache", (place, 0.98), xycoords=("data", "axes fraction"),
                          xytext=(-3, 0), textcoords="offset points", va="top", ha="right", fontsize=8)  # fmt: skip
        axes.set_title(f"{dtype}, {layout}")
        axes.set_xlabel("elements of x (log scale)")
    parts[0].set_ylabel("ns per element (lower is better; log scale)")
    _legend_below(drawing, records, parts[0], 2)
    return drawing


def plot_accuracy(records: list[Record]) -> Figure | None:
    """Error of the output over the mean of the input, a panel for each type."""
    found = select(records, kind="accuracy", std=1.0)
    if not found:
        return None
    ulps = {"float32": 24, "bfloat16": 8, "float16": 11, "float64": 53}
    dtypes = list(dict.fromkeys(r["dtype"] for r in found))
    drawing, parts = figure(records, "Error of the output against float64", len(dtypes), 4.2)
    for axes, dtype in zip(parts, dtypes, strict=True):
        for index, peer in enumerate(dict.fromkeys(r["peer"] for r in found)):
            rows = sorted(select(found, peer=peer, dtype=dtype), key=lambda r: r["mean"])
            how = {"marker": MARKERS[index], "color": PEER_COLOURS[index], "markersize": 5, "label": peer}
            axes.plot([r["mean"] for r in rows], [r["errors"]["y"] for r in rows], **how)
        axes.axhline(0.5 ** ulps[dtype], color="#777777", linestyle=":", label="half a unit in the last place")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.3, 2 * max(r["mean"] for r in found))
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(power_of_ten))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("mean of the input, in standard deviations")
        axes.set_title(dtype)
    parts[0].set_ylabel("largest error of y / largest |y|\n(lower is better; log scale)")
    _legend_below(drawing, records, parts[0], 4)
    return drawing


PLOTS: dict[str, Callable[[list[Record]], Figure | None]] = {
    "speedup": plot_speedup,
    "limit": plot_limit,
    "scaling": plot_scaling,
    "accuracy": plot_accuracy,
}


def draw(records: list[Record], folder: Path) -> Iterable[Path]:
    """Write a picture for each plot that the records have something for; names of the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        with plt.style.context(STYLE):
            drawing = plot(records)
            if drawing is None:
                continue
            save(drawing, folder / f"{name}.svg")
            plt.close(drawing)
        yield folder / f"{name}.svg"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for picture in draw(load(Path(sys.argv[1])), Path(sys.argv[2])):
        print(picture)
