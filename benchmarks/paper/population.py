"""Batch size, with as many images seen at each; and which mean and variance batch norm uses at inference: moving
averages, the paper's algorithm 2 with and without its m/(m-1), `fastbn.update_bn` in both modes, the batch itself.
"""

import copy
from pathlib import Path

import torch
from data import batches, load_small
from matplotlib.figure import Figure
from networks import Variant, make_inception
from pages import BLACK, BLUE, COLOURS, GREEN, NORM, ORANGE, PURPLE, band, figure, log_axis, percent_axis
from settings import SECONDS, Plan
from spread import number, paired, percent, table
from torch import nn
from torch.nn import functional as F
from training import correct, fit, logits
from workers import Workers

import fastbn

BASE = "moving average"
ALGORITHM, BIASED, POOLED, EXACT = "algorithm 2", "algorithm 2 without m/(m-1)", "update_bn", "update_bn, eval"
METHODS = (ALGORITHM, BIASED, POOLED, EXACT, "batch")


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if getattr(m, "running_var", None) is not None]


@torch.no_grad()
def algorithm_2(network: nn.Module, stream: list[torch.Tensor], corrected: bool) -> nn.Module:
    """A copy with the averages over batches of mean and variance (lines 7 to 12), times m/(m-1) or not."""
    network, sizes = copy.deepcopy(network).train(), {}
    for norm in norms_of(network):
        norm.reset_running_stats()
        norm.momentum = None  # an average in which all batches count alike, of variances that are corrected
        norm.register_forward_pre_hook(lambda m, x: sizes.__setitem__(m, x[0].numel() // x[0].shape[1]))
    for images in stream:
        network(images)
    for norm, m in sizes.items():
        norm.running_var *= 1 if corrected else (m - 1) / m
    return network


@torch.no_grad()
def by_batch(network: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    trained, parts = copy.deepcopy(network).train(), list(images.split(size))  # its running statistics stay
    if len(parts) > 1 and len(parts[-1]) < size:  # too small for statistics: it joins the one before it
        parts[-2:] = [torch.cat(parts[-2:])]
    return torch.cat([trained(part) for part in parts])


def train(images: Path, plan: Plan, norm: bool, size: int, rate: float, seed: int, methods: bool) -> dict:
    """Accuracy and loss: of validation images with moving averages, or of test images by method; then how far algorithm
    2's variances are from those of all images pooled, too."""
    data = load_small(images, "Fashion-MNIST")
    network = make_inception(Variant(norm=norm), plan, data.train[0], seed)
    fit(network, batches(data.train, size, seed), rate, plan.images // size)
    some, labels = (t[: plan.test] for t in (data.test if methods else data.validation))
    scores, ratios = {BASE: logits(network, some)}, {}
    if norm and methods:
        source = batches(data.train, size, seed + 500)
        stream = [next(source)[0] for _ in range(max(1, plan.averaged // size))]
        copies = {ALGORITHM: algorithm_2(network, stream, True), BIASED: algorithm_2(network, stream, False),
                  POOLED: copy.deepcopy(network), EXACT: copy.deepcopy(network)}  # fmt: skip
        fastbn.update_bn(stream, copies[POOLED])
        fastbn.update_bn(torch.cat(stream).split(256), copies[EXACT], mode="eval")
        scores |= {name: logits(other, some) for name, other in copies.items()}
        scores["batch"] = by_batch(network, some, size)
        variances = {name: torch.cat([m.running_var for m in norms_of(n)]) for name, n in copies.items()}
        alive = variances[POOLED] > 1e-6
        ratios = {n: (variances[n] / variances[POOLED])[alive].median().item() for n in (ALGORITHM, BIASED)}
    return {**{f"accuracy, {name}": correct(s, labels) for name, s in scores.items()},
            **{f"loss, {name}": F.cross_entropy(s, labels).item() for name, s in scores.items()},
            **{f"variance, {name}": value for name, value in ratios.items()}}  # fmt: skip


def run(settings: Plan, workers: Workers) -> dict:
    plan, grid, best, jobs = settings.population, {}, {}, {}
    kinds = {f"{size} {name}": {"plan": plan, "norm": name == "with", "size": size}
             for name in NORM for size in plan.batches}  # fmt: skip
    searched = {(kind, str(rate)): {**job, "rate": rate, "methods": False} for kind, job in kinds.items()
                for rate in plan.rates}  # fmt: skip
    found = workers.map(train, searched, settings.search_seeds[:1], 0.5 * SECONDS["population"])
    for kind, job in kinds.items():
        grid[kind] = {str(rate): found[kind, str(rate)][f"accuracy, {BASE}"][0] for rate in plan.rates}
        best[kind] = float(max(grid[kind], key=grid[kind].get))
        jobs[kind] = {**job, "rate": best[kind], "methods": True}
    networks = workers.map(train, jobs, settings.more_seeds, 0.5 * SECONDS["population"])
    return {"sizes": list(plan.batches), "search": grid, "rates": best, "networks": networks}


def plot(found: dict, paper: dict) -> Figure:
    drawing, (left, right) = figure("Batch size, and which statistics at inference", 2, 4.8)
    sizes, networks = found["sizes"], found["networks"]
    for name in NORM:
        seeds = zip(*(networks[f"{size} {name}"][f"accuracy, {BASE}"] for size in sizes), strict=True)
        band(left, sizes, list(seeds), COLOURS[name], marker="o", label=NORM[name])
    left.set_title("Test accuracy after as many images")
    left.legend(loc="lower left")
    percent_axis(left)
    how = zip(METHODS, (BLACK, ORANGE, BLUE, GREEN, PURPLE), "osD^v", ("-", "--", "-", ":", ":"), strict=True)
    for at, (method, colour, marker, line) in enumerate(how):
        gains = [gain(networks[f"{size} with"], "accuracy", method) for size in sizes]
        moved = [size * 2 ** (0.08 * (at - 2)) for size in sizes]  # beside each other
        right.errorbar(moved, [100 * g.mean for g in gains], [100 * g.half for g in gains], label=method, capsize=3,
                       color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.3)  # fmt: skip
    right.set_title("With batch norm: over moving averages, same networks")
    right.set_ylabel("points of test accuracy\n(mean and its 95 % interval over seeds)")
    right.legend(loc="lower right")
    for axes in (left, right):
        log_axis(axes, "batch size in training", sizes)
    return drawing


def gain(network: dict, what: str, one: str, other: str = BASE):
    return paired(network[f"{what}, {one}"], network[f"{what}, {other}"])


def where(differences: dict) -> str:
    """At which sizes it shows that a difference is positive or negative."""
    signs = {size: d.sign for size, d in differences.items()}
    said = [f"{word} at {', '.join(str(s) for s in signs if signs[s] == sign)}"
            for sign, word in ((1, "higher"), (-1, "lower")) if sign in signs.values()]  # fmt: skip
    return " and ".join(said) or "no difference shows"


def words(found: dict, paper: dict) -> dict[str, str]:
    sizes, networks, rates = found["sizes"], found["networks"], found["rates"]
    with_ = {size: networks[f"{size} with"] for size in sizes}
    rows, key = [], f"accuracy, {BASE}"
    for name in NORM:
        rows.append([f"{NORM[name]}: test accuracy", *(percent(networks[f"{s} {name}"][key]) for s in sizes)])
        rows.append(["its learning rate", *(f"{rates[f'{s} {name}']:g}" for s in sizes)])
    over = {s: paired(with_[s][key], networks[f"{s} without"][key]) for s in sizes}
    rows.append(["difference", *(d.points() for d in over.values())])
    ends = paper["settings"]["population"]["rates"]
    edge = [kind for kind, rate in rates.items() if rate in (ends[0], ends[-1])]
    methods = [[m, *(gain(with_[s], "accuracy", m).points() for s in sizes)] for m in METHODS]
    shares = [[m, *(number(with_[s][f"variance, {m}"], 3) for s in sizes)] for m in (ALGORITHM, BIASED)]
    factor = {what: where({s: gain(with_[s], what, ALGORITHM, BIASED) for s in sizes}) for what in ("accuracy", "loss")}
    most = max(abs(gain(with_[s], "loss", ALGORITHM, BIASED).mean) for s in sizes)
    return {
        "table": table(["batch size", *map(str, sizes)], rows),
        "over": where(over),
        "edge": f" (an end of the grid was best for {', '.join(edge)} batch norm)" if edge else "",
        "methods": table(["batches of", *map(str, sizes)], methods),
        "shares": table(["batches of", *map(str, sizes)], shares),
        "accuracy": factor["accuracy"], "loss": factor["loss"],
        "most": f"{most:.1g}",
        "against": "; ".join(f"{m}: {where({s: gain(with_[s], 'accuracy', m) for s in sizes})}" for m in METHODS),
    }  # fmt: skip
