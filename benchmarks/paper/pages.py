"""What the experiments' pictures and pages share: colours, axes, the frame of a page."""

import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLACK, ORANGE, GREEN, BLUE, RED, PURPLE = "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#777777"
COLOURS = {
    "Inception": BLACK, "BN-Baseline": BLUE, "BN-x5": GREEN, "BN-x30": RED, "BN-x5-Sigmoid": ORANGE,
    "Inception-Sigmoid": GREY, "without": BLACK, "with": BLUE,
}  # fmt: skip
NORM = {"without": "without batch norm", "with": "with batch norm"}
STYLE = Path(__file__).parents[1] / "pictures.mplstyle"


def figure(title: str, columns: int, height: float = 4.2, rows: int = 1, **how) -> tuple[Figure, list[Axes]]:
    drawing, axes = plt.subplots(rows, columns, figsize=(11, height), squeeze=False, **how)
    drawing.suptitle(title, fontsize=13, fontweight="bold")
    return drawing, list(axes.flat)


def percent_axis(axes: Axes, which: str = "y") -> None:
    getattr(axes, f"{which}axis").set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def log_axis(axes: Axes, label: str, ticks: Iterable[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{value:,g}" for value in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{label} (log scale)")


def mean_curve(curves: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def band(axes: Axes, steps: list, curves: list[list[float]], colour: str, **how: object) -> None:
    """The mean over seeds, and from the lowest to the highest of them."""
    columns = list(zip(*curves, strict=True))
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, mean_curve(curves), color=colour, **how)


def save(drawing: Figure, path: Path) -> None:
    """An SVG without a date, so that the same results make the same file."""
    with plt.rc_context({"svg.fonttype": "none"}):
        drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=110)
    plt.close(drawing)
    if path.suffix == ".svg":
        path.write_text(shrunk(path.read_text()))


def shrunk(svg: str) -> str:
    """A third of the bytes: a class for each style, coordinates to a tenth of a point, no names of groups, no clips."""
    styles: dict[str, int] = {}
    svg = re.sub(r' (clip-path|transform)="(url|rotate\(-0)[^"]*"|<clipPath.*?</clipPath>', "", svg, flags=re.DOTALL)
    svg = re.sub(r' style="([^"]*)"', lambda m: f' class="s{styles.setdefault(m[1], len(styles))}"', svg)
    svg = re.sub(r"(\.\d)\d{4,}\b", r"\1", re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL))
    svg = re.sub(r"\s+", " ", re.sub(r'<g id="[\w.]+">', "<g>", svg)).replace("> <", "><")
    for _ in range(3):  # groups of one element
        svg = re.sub(r"<g>((?:<(?:use|path)[^>]*/>|<text[^>]*>[^<]*</text>)*)</g>", r"\1", svg)
    css = "".join(f".s{number}{{{style}}}" for style, number in styles.items())
    return svg.replace("<defs>", f"<style>{css}</style><defs>", 1) + "\n"
