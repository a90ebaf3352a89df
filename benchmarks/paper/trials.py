"""In: settings, a variant, a rate, a seed. Out: one network trained on placed images, the same each time.
What the experiments with the Inception network share: its trials, the control's learning rate, means over seeds.
"""

import statistics
from collections.abc import Callable

import torch
from data import Data, batches, place
from networks import Inception, Variant
from settings import Settings, Training
from training import accuracy, fit
from workers import Workers

# Of the test images' places and noise: always the same.
TEST_SEED = 12345


def placed_test(data: Data, training: Training) -> torch.Tensor:
    return place(data.test_images, training.margin, training.noise, torch.Generator().manual_seed(TEST_SEED))


def placed_batches(data: Data, training: Training, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return batches(data.train_images, data.train_labels, size, generator, training.margin, training.noise)


def make(images: torch.Tensor, training: Training, variant: Variant, seed: int) -> Inception:
    torch.manual_seed(seed)
    return Inception(variant, images.shape[-1], training.width, training.strides)


def trial(data: Data, training: Training, variant: Variant, rate: float, seed: int,
          observe: Callable | None = None) -> tuple[Inception, dict]:  # fmt: skip
    """A network, trained, and its test accuracy over the steps."""
    test = placed_test(data, training)
    network = make(test, training, variant, seed)
    curve = {"steps": [], "accuracy": []}

    def see(step: int) -> None:
        curve["steps"].append(step)
        curve["accuracy"].append(accuracy(network, test, data.test_labels))

    every = max(1, training.steps // training.evaluations)
    stream = placed_batches(data, training, training.batch, seed)
    fit(network, stream, rate, training.steps, last=training.last, observe=see, every=every)
    return network, curve


def curve_of(data: Data, **job: object) -> dict:
    return trial(data, **job)[1]


def spread(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "values": values}


def mean_curve(curves: list[dict]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(c["accuracy"] for c in curves), strict=True)]


def search(settings: Settings, workers: Workers, variant: Variant, share: float) -> dict:
    """The learning rate whose best test accuracy is highest, in the mean over seeds that are used for nothing else. The
    test set chooses, so that the result flatters the network that is searched for."""
    jobs = [{"training": settings.training, "variant": variant, "rate": rate, "seed": seed}
            for rate in settings.search_rates for seed in settings.search_seeds]  # fmt: skip
    curves = iter(workers.map(curve_of, jobs, share))
    found = {rate: statistics.fmean(max(next(curves)["accuracy"]) for _ in settings.search_seeds)
             for rate in settings.search_rates}  # fmt: skip
    return {"rate": max(found, key=found.get), "accuracy": {str(rate): value for rate, value in found.items()}}


def control(settings: Settings, workers: Workers, share: float = 0.0) -> dict:
    """What the search found for the network without batch norm: searched once in a run, and for free afterwards."""
    if "inception" not in workers.known:
        workers.known["inception"] = search(settings, workers, Variant(norm=False), share)
    return workers.known["inception"]
