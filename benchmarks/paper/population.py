"""In: settings, data. Out: test accuracy of networks trained with batches of 2 to 64, for each way to choose the mean
and the variance that batch norm uses at inference: moving averages, `fastbn.update_bn` in both modes, the batch itself.
"""

import copy

import torch
from data import Data
from networks import Variant
from settings import Settings
from training import accuracy, correct, fit, with_batch_statistics
from trials import make, placed_batches, placed_test, spread
from workers import Workers

import fastbn

METHODS = {
    "moving average": "moving average (momentum 0.1)",
    "update_bn": "update_bn",
    "update_bn, eval": "update_bn, mode eval",
    "batch": "batch statistics, batches as in training",
    "whole test set": "batch statistics, all test images at once",
}
# update_bn sees so many images, augmented as in training.
IMAGES = 2048
# Of update_bn in mode "eval": no number depends on it, and larger batches are faster.
EVAL_BATCH = 256


@torch.no_grad()
def by_batch(network: torch.nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    trained = with_batch_statistics(network)
    # a last batch that is too small for statistics joins the one before it
    parts = list(images.split(size))
    if len(parts) > 1 and len(parts[-1]) < size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return torch.cat([trained(part) for part in parts])


def train(data: Data, settings: Settings, size: int, seed: int) -> dict[str, float]:
    plan, training = settings.population, settings.training
    test, labels = placed_test(data, training), data.test_labels
    network = make(test, training, Variant(), seed)
    fit(network, placed_batches(data, training, size, seed), plan.rate, plan.steps, last=training.last)
    stream = placed_batches(data, training, size, seed + 1)
    batches = [next(stream)[0] for _ in range(max(1, min(IMAGES, size * plan.steps) // size))]
    pooled, exact = copy.deepcopy(network), copy.deepcopy(network)
    fastbn.update_bn(batches, pooled)
    fastbn.update_bn(torch.cat(batches).split(EVAL_BATCH), exact, mode="eval")
    return {
        "moving average": accuracy(network, test, labels),
        "update_bn": accuracy(pooled, test, labels),
        "update_bn, eval": accuracy(exact, test, labels),
        "batch": correct(by_batch(network, test, size), labels),
        "whole test set": correct(by_batch(network, test, len(test)), labels),
    }


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    plan = settings.population
    jobs = [{"settings": settings, "size": size, "seed": seed} for size in plan.batches for seed in settings.seeds]
    found = iter(workers.map(train, jobs))
    rows = {str(size): [next(found) for _ in settings.seeds] for size in plan.batches}
    return {
        "batches": list(plan.batches),
        "methods": {method: {size: spread([r[method] for r in row]) for size, row in rows.items()}
                    for method in METHODS},
    }  # fmt: skip
