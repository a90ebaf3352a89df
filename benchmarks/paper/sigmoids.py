"""The paper's figure 1: test accuracy over steps of a network of sigmoids, with and without batch norm, and percentiles
over training of what goes into a sigmoid of the last hidden layer.
"""

import copy
import statistics
from pathlib import Path

import numpy as np
import torch
from data import Data, batches, load
from matplotlib.figure import Figure
from networks import Perceptron
from pages import COLOURS, NORM, band, figure, log_axis, percent_axis, plt
from settings import SECONDS, Plan
from spread import number, paired, percent, ratio, table, verdict
from training import accuracy, fit, marks, steps_to
from workers import Workers

LEVELS = (0.9, 0.95)


def typical(tracks: np.ndarray) -> int:
    """Of (evaluations, percentiles, units): the unit whose median travels further than those of half of the units."""
    lengths = np.abs(np.diff(tracks[:, tracks.shape[1] // 2], axis=0)).sum(0)
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])


def wander(tracks: np.ndarray) -> float:
    """The range of a unit's median over training, in widths of its distribution at the end; the median of all units."""
    width = np.maximum(tracks[-1, -1] - tracks[-1, 0], 1e-12)
    return float(np.median(np.ptp(tracks[:, tracks.shape[1] // 2], axis=0) / width))


def make(data: Data, plan: Plan, norm: bool, seed: int) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron(data.train[0][0].numel(), plan.hidden, norm, plan.std)


def train(images: Path, plan: Plan, norm: bool, rate: float, seed: int, steps: int, part: str) -> dict:
    """``part`` of the data is what the accuracy and the percentiles are of."""
    data = load(images, "MNIST")
    network, curve, tracks, seen = make(data, plan, norm, seed), [], [], getattr(data, part)
    which = torch.tensor(plan.percentiles, dtype=torch.float64) / 100
    at = marks(min(50, steps), steps, plan.evaluations)

    @torch.no_grad()
    def see(_: int) -> None:
        curve.append(accuracy(network, seen))
        trained = copy.deepcopy(network).train()  # with statistics of the images
        trained(seen[0][:2000])
        tracks.append(torch.quantile(trained.inputs.double(), which, dim=0).numpy())

    # of momentum or a falling rate the paper says nothing here
    fit(network, batches(data.train, plan.batch, seed), rate, steps, momentum=0.0, last=1.0, observe=see, at=at)
    array = np.stack(tracks)
    return {"steps": at, "curve": curve, "track": array[:, :, typical(array)].tolist(), "range": wander(array),
            "reached": [steps_to(at, curve, level) for level in LEVELS]}  # fmt: skip


def search(settings: Plan, workers: Workers) -> dict:
    """Validation accuracy by network and rate, the mean over training: nearly all rates end at the same."""
    plan = settings.sigmoids
    how = {"plan": plan, "steps": plan.search_steps, "part": "validation"}
    jobs = {(n, str(r)): {**how, "norm": n == "with", "rate": r} for n in NORM for r in plan.rates}  # fmt: skip
    found = workers.map(train, jobs, settings.search_seeds[:1], 0.15 * SECONDS["sigmoids"])
    return {n: {str(r): statistics.fmean(found[n, str(r)]["curve"][0]) for r in plan.rates} for n in NORM}


def rate_of_control(settings: Plan, workers: Workers) -> float:
    found = search(settings, workers)["without"]
    return float(max(found, key=found.get))


def run(settings: Plan, workers: Workers) -> dict:
    plan, rate = settings.sigmoids, rate_of_control(settings, workers)
    jobs = {n: {"plan": plan, "norm": n == "with", "rate": rate, "steps": plan.steps, "part": "test"} for n in NORM}
    networks = workers.map(train, jobs, settings.seeds, 0.85 * SECONDS["sigmoids"])
    for network in networks.values():
        network["steps"], network["track"] = network["steps"][0], network["track"][0]
    return {"search": search(settings, workers), "rate": rate, "networks": networks}


def plot(found: dict, paper: dict) -> Figure:
    drawing, (left, *others) = figure("Three hidden layers of 100 sigmoids (the paper's figure 1)", 3)
    for axes, (name, network) in zip(others, found["networks"].items(), strict=True):
        steps, track = network["steps"], list(zip(*network["track"], strict=True))
        band(left, steps, network["curve"], COLOURS[name])
        for values, p in zip(track, paper["settings"]["sigmoids"]["percentiles"], strict=True):
            axes.plot(steps, values, color=COLOURS[name], linewidth=1.8 if p == 50 else 1)
            axes.annotate(f"{p} %", (steps[-1], values[-1]), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=8, annotation_clip=False)  # fmt: skip
        axes.fill_between(steps, track[0], track[-1], color=COLOURS[name], alpha=0.1, linewidth=0)
        axes.set_title(f"Input of a sigmoid, {NORM[name]}")
    percent_axis(left)
    left.set_title("Test accuracy (mean and range over seeds)")
    left.legend([plt.Line2D([], [], color=COLOURS[name]) for name in NORM], NORM.values(), loc="lower right")
    others[0].set_ylabel("percentiles over test images")
    others[1].sharey(others[0])
    for axes in (left, *others):
        log_axis(axes, "training step", [s for s in (10, 100, 1000, 10_000) if steps[0] <= s <= steps[-1]])
    return drawing


def words(found: dict, paper: dict) -> dict[str, str]:
    without, with_ = found["networks"]["without"], found["networks"]["with"]
    rows, faster = [], []
    for name, network in found["networks"].items():
        levels = [number(v, 0) if None not in v else f"{len(v) - v.count(None)} of {len(v)} seeds arrive"
                  for v in zip(*network["reached"], strict=True)]  # fmt: skip
        rows.append([NORM[name], *levels, percent([c[-1] for c in network["curve"]], 2), number(network["range"], 2)])
    for number_, level in enumerate(LEVELS):
        a, b = ([r[number_] for r in network["reached"]] for network in (without, with_))
        times, sign = ratio(a, b) if None not in a + b else (0, 0)
        shows = "" if sign else " (which does not show)"
        faster.append(f"{times:.1f} times fewer to {level:.0%}{shows}" if times else f"in some seeds never {level:.0%}")
    end = paired([c[-1] for c in with_["curve"]], [c[-1] for c in without["curve"]])
    moves = paired(with_["range"], without["range"])
    grid = [[NORM[n], *(f"{100 * v:.1f} %" for v in values.values())] for n, values in found["search"].items()]
    return {
        "rate": f"{found['rate']:g}",
        "grid": table(["mean validation accuracy at a rate of", *found["search"]["with"]], grid),
        "table": table(["", *(f"steps to {level:.0%}" for level in LEVELS), "accuracy at the end", "range"], rows),
        "faster": " and ".join(faster), "difference": end.points(), "moves": f"{moves.mean:+.2f} ± {moves.half:.2f}",
        "end": verdict(end, "batch norm ends higher, as in the paper", "batch norm ends **lower**, unlike in the paper",
                       "**no difference shows**, unlike in the paper"),
        "range": verdict(moves, "**more**, unlike in the paper", "less, as in the paper", "neither more nor less"),
    }  # fmt: skip
