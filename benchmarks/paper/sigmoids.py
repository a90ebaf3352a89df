"""In: settings, data. Out: the paper's figure 1: test accuracy against steps of a network of sigmoids, with and without
batch norm, and percentiles over training of what goes into a typical sigmoid of the last hidden layer.

Typical is the unit whose median wanders neither more nor less than that of half of the units of its layer.
"""

import statistics

import numpy as np
import torch
from data import Data, batches
from networks import Perceptron
from settings import Settings, Sigmoids
from training import accuracy, fit, with_batch_statistics
from trials import mean_curve, spread
from workers import Workers

NETWORKS = {"without": False, "with": True}


def percentiles(values: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor:
    """Of (samples, units): (percentiles, units), between two samples by a straight line."""
    return torch.quantile(values.double(), torch.tensor(which, dtype=torch.float64) / 100, dim=0)


def typical(tracks: np.ndarray) -> int:
    """Of (evaluations, percentiles, units): the unit that has the median of the paths' lengths."""
    middle = tracks[:, tracks.shape[1] // 2]
    lengths = np.abs(np.diff(middle, axis=0)).sum(0)
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])


def travel(track: np.ndarray) -> dict:
    """How far the median of a track (evaluations, percentiles) goes, and its extremes are apart, in last widths."""
    width = max(float(track[-1, -1] - track[-1, 0]), 1e-12)
    middle = track[:, track.shape[1] // 2]
    return {
        "path": float(np.abs(np.diff(middle)).sum()) / width,
        "range": float(np.ptp(middle)) / width,
    }


def train(data: Data, plan: Sigmoids, norm: bool, rate: float, seed: int) -> dict:
    torch.manual_seed(seed)
    network = Perceptron(data.train_images[0].numel(), plan.hidden, norm, plan.std)
    curve: dict = {"steps": [], "accuracy": []}
    tracks = []

    @torch.no_grad()
    def see(step: int) -> None:
        curve["steps"].append(step)
        curve["accuracy"].append(accuracy(network, data.test_images, data.test_labels))
        copy = with_batch_statistics(network)
        copy(data.test_images)
        tracks.append(percentiles(copy.inputs, plan.percentiles).numpy())

    generator = torch.Generator().manual_seed(seed)
    stream = batches(data.train_images, data.train_labels, plan.batch, generator)
    every = max(1, plan.steps // plan.evaluations)
    # as in the paper, neither momentum nor a falling rate is spoken of
    fit(network, stream, rate, plan.steps, momentum=0.0, last=1.0, observe=see, every=every)
    array = np.stack(tracks)
    track = array[:, :, typical(array)]
    return {**curve, "track": track.tolist(), "travel": travel(track)}


def control(settings: Settings, workers: Workers, share: float = 0.0) -> dict:
    """The learning rate that suits the network without batch norm: searched once in a run, as that of trials.py."""
    if "sigmoids" not in workers.known:
        plan = settings.sigmoids
        jobs = [{"plan": plan, "norm": False, "rate": rate, "seed": seed}
                for rate in plan.rates for seed in settings.search_seeds]  # fmt: skip
        found = iter(workers.map(train, jobs, share))
        # the mean over training, not the best: nearly all rates end at the same accuracy
        scores = {rate: statistics.fmean(statistics.fmean(next(found)["accuracy"]) for _ in settings.search_seeds)
                  for rate in plan.rates}  # fmt: skip
        scored = {str(rate): score for rate, score in scores.items()}
        workers.known["sigmoids"] = {"rate": max(scores, key=scores.get), "accuracy": scored}
    return workers.known["sigmoids"]


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    plan = settings.sigmoids
    searches, trials = len(plan.rates) * len(settings.search_seeds), len(NETWORKS) * len(settings.seeds)
    found = control(settings, workers, searches / (searches + trials))
    jobs = [{"plan": plan, "norm": norm, "rate": found["rate"], "seed": seed}
            for norm in NETWORKS.values() for seed in settings.seeds]  # fmt: skip
    curves = iter(workers.map(train, jobs, trials / (searches + trials)))
    networks = {}
    for name in NETWORKS:
        mine = [next(curves) for _ in settings.seeds]
        networks[name] = {
            "best": spread([max(c["accuracy"]) for c in mine]),
            "last": spread([c["accuracy"][-1] for c in mine]),
            "path": spread([c["travel"]["path"] for c in mine]),
            "range": spread([c["travel"]["range"] for c in mine]),
            "curve": mean_curve(mine),
            "curves": [c["accuracy"] for c in mine],
            "track": mine[0]["track"],
        }
    return {"search": found, "steps": mine[0]["steps"], "networks": networks}
