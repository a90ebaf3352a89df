"""Records of a run flow in, pictures flow out: matplotlib, the same bytes for the same records and version."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from records import (
    Record,
    geometric_mean,
    groups_of,
    least_tensors,
    of_limit,
    peers_of,
    resnet50,
    seconds,
    select,
    speedup,
    warm,
)  # fmt: skip
from suite import PASSES

# Okabe and Ito's colours, which the colour-blind can tell apart; one for each type and layout, or peer.
COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#F0E442"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "svg.hashsalt": "fastbn", "figure.constrained_layout.use": True,
}  # fmt: skip
TRAINING = ("forward", "forward+backward")


def plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def label_of(dtype: str, layout: str) -> str:
    return f"{dtype}, {layout}"


def caption(records: list[Record]) -> str:
    (head,) = select(records, kind="environment")
    return (
        f"{head['threads']} threads of {head['cpu']} ({head['capability']}), torch {head['torch']}, "
        f"csrc {head['csrc'][:8]}, {head['date'][:10]}"
    )


def shape_names(records: list[Record]) -> list[str]:
    shapes = dict.fromkeys(tuple(r["shape"][1:]) for r in records)
    return [f"{c} × {h}²" for c, h, _ in shapes]


def figure(records: list[Record], title: str, columns: int, height: float, **how: object) -> tuple[Figure, list[Axes]]:
    drawing, axes = plt.subplots(1, columns, figsize=(11, height), squeeze=False, **how)
    drawing.suptitle(title, fontsize=13, fontweight="bold")
    drawing.supxlabel(caption(records), fontsize=8, color="#555555")
    return drawing, list(axes[0])


def _per_shape(records: list[Record], axes: Axes, name: str, value: Callable[[Record], float]) -> None:
    """A group of bars for each of ResNet-50's shapes, one bar for each type and layout."""
    cases = select(resnet50(records), **{"pass": name})
    groups = groups_of(cases)
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in cases))
    width = 0.8 / max(1, len(groups))
    for index, (dtype, layout) in enumerate(groups):
        rows = {tuple(r["shape"]): r for r in select(cases, dtype=dtype, layout=layout)}
        at = [i - 0.4 + (index + 0.5) * width for i, shape in enumerate(shapes) if shape in rows]
        heights = [value(rows[shape]) for shape in shapes if shape in rows]
        axes.bar(at, heights, width, color=COLOURS[index], label=label_of(dtype, layout))
    axes.set_xticks(range(len(shapes)), shape_names(cases), rotation=60, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    axes.set_title(name)


def plot_speedup(records: list[Record]) -> Figure | None:
    cases = resnet50(records)
    if not cases:
        return None
    batch = cases[0]["shape"][0]
    title = f"Speed-up over eager PyTorch: batch norms of ResNet-50, batch {batch}"
    drawing, parts = figure(records, title, len(PASSES), 4.6, sharey=True)
    for axes, name in zip(parts, PASSES, strict=True):
        _per_shape(records, axes, name, speedup)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.set_xlabel("channels × height²")
    parts[0].set_ylabel("time of torch / time of fastbn\n(higher is better; log scale)")
    _legend_below(drawing, parts[0], 4)
    return drawing


def _legend_below(drawing: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=columns, bbox_to_anchor=(0.5, 0.94))


def plot_limit(records: list[Record]) -> Figure | None:
    """The roofline of one-pass, memory-bound work: which part of a copy's speed is reached, moving the least bytes."""
    cases = resnet50(records)
    if not cases:
        return None
    title = f"Part of the memory limit reached: batch norms of ResNet-50, batch {cases[0]['shape'][0]}"
    drawing, parts = figure(records, title, len(PASSES), 4.6, sharey=True)
    for axes, name in zip(parts, PASSES, strict=True):
        for index, (dtype, layout) in enumerate(groups_of(cases)):
            rows = select(cases, dtype=dtype, layout=layout, **{"pass": name})
            rows = sorted(rows, key=lambda r: r["tensor_bytes"])
            megabytes = [r["tensor_bytes"] / 1e6 for r in rows]
            style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5}
            label = label_of(dtype, layout)
            axes.plot(megabytes, [of_limit(r) for r in rows], linestyle="none", label=f"fastbn {label}", **style)
            hollow = {**style, "markerfacecolor": "none", "alpha": 0.6}
            axes.plot(
                megabytes, [of_limit(r, "torch") for r in rows], linestyle="none", label=f"torch {label}", **hollow
            )
        axes.axhline(1, color="black", linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name} (least traffic: {PASSES[name]} tensors)")
        axes.set_xlabel("size of one tensor, MB (log scale)")
    parts[0].set_ylabel("time of a copy of the least bytes / time")
    parts[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    parts[0].set_ylim(bottom=0)
    parts[0].annotate("a copy into memory that is there", (0.02, 1), xycoords=("axes fraction", "data"),
                      va="bottom", fontsize=8)  # fmt: skip
    _legend_below(drawing, parts[0], 4)
    return drawing


def elements_of(record: Record) -> int:
    elements = 1
    for size in record["shape"]:
        elements *= size
    return elements


def plot_scaling(records: list[Record]) -> Figure | None:
    cases = warm(records, kind="case", suite="scaling")
    if not cases:
        return None
    groups = groups_of(cases)
    drawing, parts = figure(records, "Time for each element, 64 channels", len(groups), 4.6, sharey=True)
    (head,) = select(records, kind="environment")
    for axes, (dtype, layout) in zip(parts, groups, strict=True):
        for index, variant in enumerate(("fastbn", "torch")):
            for name, line in zip(TRAINING, ("-", "--"), strict=True):
                rows = sorted(select(cases, dtype=dtype, **{"pass": name}), key=elements_of)
                times = [seconds(r, variant) / elements_of(r) * 1e9 for r in rows]
                how = {"color": COLOURS[2 * index], "linestyle": line, "marker": MARKERS[index], "markersize": 4}
                axes.plot([elements_of(r) for r in rows], times, label=f"{variant}, {name}", **how)
        for name, line in zip(TRAINING, ("-", "--"), strict=True):
            rows = sorted(select(cases, dtype=dtype, **{"pass": name}), key=elements_of)
            times = [seconds(r, "copy") * least_tensors(r) / 2 / elements_of(r) * 1e9 for r in rows]
            label = f"limit, {name}"
            axes.plot([elements_of(r) for r in rows], times, color="#777777", linestyle=line, linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(FuncFormatter(plain))
        itemsize = cases[0]["tensor_bytes"] // elements_of(cases[0]) if dtype == cases[0]["dtype"] else 2
        if cache := head.get("cache_bytes"):
            place = cache / 2 / itemsize
            axes.axvline(place, color="#aaaaaa", linewidth=1, linestyle=":")
            axes.annotate("x and y\nexceed the cache", (place, 0.98), xycoords=("data", "axes fraction"), va="top",
                          fontsize=8, color="#555555", xytext=(3, 0), textcoords="offset points")  # fmt: skip
        axes.set_title(label_of(dtype, layout))
        axes.set_xlabel("elements of x (log scale)")
    parts[0].set_ylabel("ns per element (lower is better; log scale)")
    _legend_below(drawing, parts[0], 6)
    return drawing


def accuracy_and_speed(records: list[Record], dtype: str) -> dict[str, tuple[float, float]]:
    """Of each peer: its speed-up over eager torch in forward + backward, and its error, where both are known."""
    cases = [r for r in resnet50(records) if r["dtype"] == dtype and r["pass"] == "forward+backward"]
    points = {}
    for peer in ["fastbn", *peers_of(cases)]:
        ratios = [seconds(r, "torch") / seconds(r, peer) for r in cases if peer in r["seconds"]]
        errors = [max(r["errors"]["y"], r["errors"]["dx"]) for r in
                  select(records, kind="accuracy", dtype=dtype, peer=peer, std=1.0) if r["mean"] <= 100]  # fmt: skip
        if ratios and errors:
            points[peer] = geometric_mean(ratios), geometric_mean(errors)
    return points


def plot_accuracy(records: list[Record]) -> Figure | None:
    """Left: error over the mean of the input. Right: error against speed, one point for each peer."""
    found = select(records, kind="accuracy", dtype="float32", std=1.0)
    if not found:
        return None
    drawing, (left, right) = figure(records, "Accuracy and speed, float32", 2, 4.6)
    peers = list(dict.fromkeys(r["peer"] for r in found))
    for index, peer in enumerate(peers):
        rows = sorted(select(found, peer=peer), key=lambda r: r["mean"])
        errors = [r["errors"]["y"] for r in rows]
        left.plot(
            [r["mean"] for r in rows], errors, marker=MARKERS[index], color=COLOURS[index], markersize=5, label=peer
        )
    left.set_xscale("symlog", linthresh=1)
    left.set_yscale("log")
    left.set_xlabel("mean of the input, in standard deviations")
    left.set_ylabel("largest error of y / largest |y|\n(against float64; lower is better)")
    left.set_title("Error of the output")
    left.axhline(2**-24, color="#777777", linewidth=1, linestyle=":")
    left.annotate("half a unit in the last place", (0.98, 2**-24), xycoords=("axes fraction", "data"), ha="right",
                  va="top", fontsize=8, color="#555555")  # fmt: skip
    left.legend()
    for index, peer in enumerate(peers):
        if peer in (points := accuracy_and_speed(records, "float32")):
            speed, error = points[peer]
            right.plot(speed, error, marker=MARKERS[index], color=COLOURS[index], markersize=9, linestyle="none")
            right.annotate(peer, (speed, error), xytext=(8, 4), textcoords="offset points", fontsize=9)
    right.set_xscale("log")
    right.set_yscale("log")
    right.xaxis.set_major_formatter(FuncFormatter(plain))
    right.xaxis.set_minor_formatter(FuncFormatter(plain))
    right.margins(0.25)
    right.set_xlabel("speed over eager torch, forward + backward of ResNet-50's shapes\n(geometric mean; log scale)")
    right.set_ylabel("error of y and dx, whichever is larger\n(geometric mean over means of 0 to 100 deviations)")
    right.set_title("Error against speed (best: lower right)")
    return drawing


PLOTS: dict[str, Callable[[list[Record]], Figure | None]] = {
    "speedup": plot_speedup,
    "limit": plot_limit,
    "scaling": plot_scaling,
    "accuracy": plot_accuracy,
}


def draw(records: list[Record], folder: Path, suffix: str = "svg") -> Iterable[Path]:
    """Write a picture for each plot that the records have something for; names of the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    source = hashlib.sha256(repr(records).encode()).hexdigest()
    for name, plot in PLOTS.items():
        with plt.rc_context(STYLE):
            drawing = plot(records)
            if drawing is None:
                continue
            path = folder / f"{name}.{suffix}"
            # no date, so that the same records make the same file
            metadata = {"Date": None, "Description": f"from records {source}"} if suffix == "svg" else {}
            drawing.savefig(path, metadata=metadata, dpi=110)
            plt.close(drawing)
        yield path
