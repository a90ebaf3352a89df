"""In: settings, data. Out: internal covariate shift, measured: how far inputs of each layer move in a training step.

A step changes the mean m and the standard deviation s of each channel of a layer's input, over the same probe images.
The distance is that between Gaussians (2-Wasserstein), sqrt(mean((m' - m)^2 + (s' - s)^2)), over channels; relative
to the layer's spread over images, sqrt(mean(s^2)), and to its root mean square, sqrt(mean(m^2 + s^2)).
"""

import statistics

import sigmoids
import torch
from data import Data, batches
from networks import Perceptron, Variant
from settings import Settings
from torch import nn
from training import fit
from trials import control, make, placed_batches, placed_test, spread
from workers import Workers

# Network, with batch norm, multiple of the learning rate.
NETWORKS = {
    "Inception": ("inception", False, 1),
    "BN-Baseline": ("inception", True, 1),
    "BN-x5": ("inception", True, 5),
    "sigmoids": ("sigmoids", False, 1),
    "sigmoids, BN": ("sigmoids", True, 1),
}
TINY = 1e-12  # a layer whose units are all dead has no spread


class Moments:
    """Of the inputs of every layer with weights, but the first, whose inputs are the images."""

    def __init__(self, network: nn.Module) -> None:
        self.now: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.watching = False
        layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.names = [name for name, _ in layers[1:]]
        for name, module in layers[1:]:
            module.register_forward_pre_hook(lambda _, inputs, name=name: self.see(name, inputs[0]))

    def see(self, name: str, x: torch.Tensor) -> None:
        if self.watching:
            rows = x.detach().double().transpose(0, 1).flatten(1)
            std, mean = torch.std_mean(rows, 1, correction=0)
            self.now[name] = mean, std


def distance(before: tuple, after: tuple) -> tuple[float, float]:
    """Relative to the spread, and to the root mean square."""
    (m0, s0), (m1, s1) = before, after
    moved = (m1 - m0).square().mean() + (s1 - s0).square().mean()
    spread, mean = s0.square().mean(), m0.square().mean()
    return float((moved / (spread + TINY)).sqrt()), float((moved / (spread + mean + TINY)).sqrt())


def measure(data: Data, settings: Settings, kind: str, norm: bool, rate: float, seed: int) -> dict:
    plan = settings.shift
    if kind == "inception":
        probe = placed_test(data, settings.training)[: plan.probe]
        network: nn.Module = make(probe, settings.training, Variant(norm=norm), seed)
        stream = placed_batches(data, settings.training, settings.training.batch, seed)
        how = {}
    else:
        probe = data.test_images[: plan.probe]
        torch.manual_seed(seed)
        network = Perceptron(probe[0].numel(), settings.sigmoids.hidden, norm, settings.sigmoids.std)
        generator = torch.Generator().manual_seed(seed)
        stream = batches(data.train_images, data.train_labels, settings.sigmoids.batch, generator)
        how = {"momentum": 0.0}
    labels = data.test_labels[: plan.probe]
    moments, moves, losses = Moments(network), [], []

    @torch.no_grad()
    def see(step: int) -> None:
        before, moments.now, moments.watching = moments.now, {}, True
        # with the statistics of the probe: running ones, which this changes, are not used here
        losses.append(nn.functional.cross_entropy(network.train()(probe), labels).item())
        moments.watching = False
        if step:
            found = [distance(before[name], moments.now[name]) for name in moments.names]
            moves.append([statistics.fmean(column) for column in zip(*found, strict=True)])

    # a constant learning rate: a falling one would look like less shift
    fit(network, stream, rate, plan.steps, last=1.0, observe=see, **how)
    steps, relative = (list(column) for column in zip(*moves, strict=True))
    return {"steps": steps, "relative": relative, "losses": losses}


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    found = {"inception": control(settings, workers)["rate"], "sigmoids": sigmoids.control(settings, workers)["rate"]}
    jobs = []
    for kind, norm, multiple in NETWORKS.values():
        rate = multiple * found[kind]
        jobs += [{"settings": settings, "kind": kind, "norm": norm, "rate": rate, "seed": s} for s in settings.seeds]
    measured = iter(workers.map(measure, jobs))
    networks = {}
    for name in NETWORKS:
        mine = [next(measured) for _ in settings.seeds]
        networks[name] = {
            "shift": spread([statistics.fmean(m["steps"]) for m in mine]),
            "relative": spread([statistics.fmean(m["relative"]) for m in mine]),
            "loss": spread([m["losses"][-1] for m in mine]),
            "steps": [statistics.fmean(v) for v in zip(*(m["steps"] for m in mine), strict=True)],
            "losses": [statistics.fmean(v) for v in zip(*(m["losses"] for m in mine), strict=True)],
        }
    return {"rates": found, "networks": networks}
