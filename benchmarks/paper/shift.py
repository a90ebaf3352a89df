"""Internal covariate shift: what a training step does to the layers behind.

Moments: how far the inputs of each layer move in a step, over the same images. The distance of two Gaussians with each
channel's mean m and standard deviation s, sqrt(mean((m' - m)^2 + (s' - s)^2)), in units of sqrt(mean(s^2)).

Gradients, as Santurkar et al. (2018) have it: G is the gradient of a layer's weights on a batch, and G' the gradient on
the same batch when the layers before it have made their step. |G - G'| / |G|, and the cosine between the two.
"""

from pathlib import Path
from statistics import fmean

import sigmoids
import torch
from data import batches, load, load_small
from matplotlib.figure import Figure
from networks import Variant, make_inception
from pages import COLOURS, NORM, figure, mean_curve
from settings import SECONDS, Plan
from spread import number, paired, ratio, table, verdict
from sweep import rate_of_control
from torch import nn
from torch.nn import functional as F
from workers import Workers

MEASURES = {"moments": "movement of the inputs", "change": "change of gradients", "cosine": "cosine of gradients"}


@torch.no_grad()
def moments(network: nn.Module, images: torch.Tensor) -> list[tuple]:
    """Means and deviations of the inputs of every layer with weights but the first, whose inputs are the images."""
    seen: list[torch.Tensor] = []
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in layers[1:]]
    network(images)
    for hook in hooks:
        hook.remove()
    return [torch.std_mean(x.double().transpose(0, 1).flatten(1), 1, correction=0)[::-1] for x in seen]


def distance(before: tuple, after: tuple) -> float:
    (m0, s0), (m1, s1) = before, after
    moved = (m1 - m0).square().mean() + (s1 - s0).square().mean()
    return float((moved / (s0.square().mean() + 1e-12)).sqrt())  # units that are all dead have no spread


def values_of(network: nn.Module) -> dict:
    return {p: p.detach().clone() for p in network.parameters()}


@torch.no_grad()
def give(values: dict, parameters) -> None:
    for p in parameters:
        p.copy_(values[p])


def gradients(network: nn.Module, batch: tuple, weights: list[list[nn.Parameter]]) -> list[torch.Tensor]:
    """A vector for each layer."""
    found = iter(torch.autograd.grad(F.cross_entropy(network(batch[0]), batch[1]), [p for w in weights for p in w]))
    return [torch.cat([next(found).flatten() for _ in w]) for w in weights]


def gradient_change(network: nn.Module, layers: list[nn.Module], batch: tuple, before: dict) -> list[tuple]:
    """(|G - G'| / |G|, cosine) of each layer but the first, for the step from ``before`` to what the network has."""
    weights, after, changes = (
        [[p for p in layer.parameters() if p.dim() > 1] for layer in layers],
        values_of(network),
        [],
    )
    give(before, before)
    olds = gradients(network, batch, weights)
    for ahead, mine, old in zip(layers, weights[1:], olds[1:], strict=False):
        give(after, ahead.parameters())
        (new,) = gradients(network, batch, [mine])
        changes.append((((new - old).norm() / (old.norm() + 1e-30)).item(), F.cosine_similarity(old, new, 0).item()))
    give(after, after)
    return changes


def train(images: Path, plan: Plan, kind: str, size: Plan, norm: bool, rate: float, seed: int) -> dict:
    """The measures over the steps, each the mean over layers."""
    if kind == "Inception":
        data = load_small(images, "Fashion-MNIST")
        network: nn.Module = make_inception(Variant(norm=norm), size, data.train[0], seed)
        layers = [layer for layer in network if list(layer.parameters())]
    else:
        data = load(images, "MNIST")
        network = sigmoids.make(data, size, norm, seed)
        layers = list(network.layers)
    network.train()  # all statistics are of the batch at hand
    probe, stream = data.test[0][: plan.probe], batches(data.train, size.batch, seed)
    optimizer = torch.optim.SGD(network.parameters(), rate, 0.9 if kind == "Inception" else 0.0)
    found: dict = {name: [] for name in (*MEASURES, "loss")}
    for step in range(1, plan.steps + 1):
        batch, watched = next(stream), step % plan.every == 0
        start, inputs = (values_of(network), moments(network, probe)) if watched else ({}, [])
        loss = F.cross_entropy(network(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watched:
            moves = [distance(a, b) for a, b in zip(inputs, moments(network, probe), strict=True)]
            changes, cosines = zip(*gradient_change(network, layers, batch, start), strict=True)
            for name, values in zip(found, (moves, changes, cosines, [loss.item()]), strict=True):
                found[name].append(fmean(values))
    return found


def run(settings: Plan, workers: Workers) -> dict:
    rates = {"Inception": rate_of_control(settings, workers), "sigmoids": sigmoids.rate_of_control(settings, workers)}
    sizes = {"Inception": settings.training, "sigmoids": settings.sigmoids}
    jobs = {(kind, n): {"plan": settings.shift, "kind": kind, "size": sizes[kind], "norm": n == "with", "rate": rate}
            for kind, rate in rates.items() for n in NORM}  # fmt: skip
    found = workers.map(train, jobs, settings.more_seeds, SECONDS["shift"])
    return {"rates": rates, "networks": {kind: {name: found[kind, name] for name in NORM} for kind in rates}}


def plot(found: dict, paper: dict) -> Figure:
    drawing, axes = figure("Internal covariate shift: what a step does to the layers behind", 3, 6.4, 2, sharex=True)
    panels, every = iter(axes), paper["settings"]["shift"]["every"]
    for kind, networks in found["networks"].items():
        for (measure, label), where in zip(MEASURES.items(), panels, strict=False):
            for name, network in networks.items():
                values = mean_curve(network[measure])
                where.plot([every * (n + 1) for n in range(len(values))], values, color=COLOURS[name], label=NORM[name])
            where.set_title(f"{kind}: {label}")
            where.set_ylim(**{"top": 1.02} if measure == "cosine" else {"bottom": 0})
            where.locator_params(nbins=5)
    for where in axes[3:]:
        where.set_xlabel("training step")
    axes[0].legend()
    return drawing


def words(found: dict, paper: dict) -> dict[str, str]:
    rows, said = [], {f"{kind}_rate": f"{rate:g}" for kind, rate in found["rates"].items()}
    half = paper["settings"]["shift"]["steps"] // paper["settings"]["shift"]["every"] // 2
    for kind, networks in found["networks"].items():
        parts: dict = {"moments": [], "change": [], "cosine": []}
        for part, steps in (("first half", slice(half)), ("second half", slice(half, None))):
            means = {(n, m): [fmean(run_[steps]) for run_ in networks[n][m]] for n in NORM for m in (*MEASURES, "loss")}
            for n in NORM:
                rows.append([kind, NORM[n], part, *(number(means[n, m], 3) for m in (*MEASURES, "loss"))])
            for measure in ("moments", "change"):
                times, sign = ratio(means["with", measure], means["without", measure])
                parts[measure].append(f"{times:.2g} times{'' if sign else ' (no difference shows)'} in the {part}")
            turns = paired(means["with", "cosine"], means["without", "cosine"])
            text = f"{verdict(turns, 'higher', 'lower', 'no different')} in the {part}"
            parts["cosine"].append(f"{text} ({turns.mean:+.3f} ± {turns.half:.3f})")
        said |= {f"{kind}_{measure}": " and ".join(texts) for measure, texts in parts.items()}
    return {"table": table(["", "", "steps", *MEASURES.values(), "loss"], rows), **said}
