"""In: settings, data. Out: test accuracy and the time of a training step for batches of 2 to 64, with and without batch
norm; after as many steps of each, at the best of a few learning rates.
"""

import statistics
import time
from itertools import product

from data import Data
from networks import Variant
from settings import Settings
from training import accuracy, fit
from trials import make, placed_batches, placed_test, spread
from workers import Workers

# Steps are timed so many at once, because to make an optimizer takes some time, too.
AT_ONCE = 5
NETWORKS = {"without": Variant(norm=False), "with": Variant()}


def train(data: Data, settings: Settings, name: str, size: int, rate: float, seed: int) -> float:
    plan, training = settings.batch_size, settings.training
    test = placed_test(data, training)
    network = make(test, training, NETWORKS[name], seed)
    fit(network, placed_batches(data, training, size, seed), rate, plan.steps, last=training.last)
    return accuracy(network, test, data.test_labels)


def step_times(data: Data, settings: Settings) -> dict:
    """Median seconds of a training step in one thread, both networks in turns so that they see the same machine."""
    plan, training = settings.batch_size, settings.training
    test = placed_test(data, training)
    networks = {name: make(test, training, variant, 0) for name, variant in NETWORKS.items()}
    times: dict = {name: {} for name in NETWORKS}
    for size in plan.batches:
        stream = placed_batches(data, training, size, 0)
        parts = [[next(stream) for _ in range(AT_ONCE)] for _ in range(plan.timed // AT_ONCE + 1)]
        seconds: dict = {name: [] for name in NETWORKS}
        for part, name in product(parts, NETWORKS):
            start = time.perf_counter()
            fit(networks[name], part, 1e-6, AT_ONCE)
            seconds[name].append((time.perf_counter() - start) / AT_ONCE)
        for name in NETWORKS:
            times[name][str(size)] = statistics.median(seconds[name][1:])  # without the first, which allocates
    return times


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    plan = settings.batch_size
    kinds = list(product(NETWORKS, plan.batches, plan.rates))
    jobs = [{"settings": settings, "name": name, "size": size, "rate": rate, "seed": seed}
            for name, size, rate in kinds for seed in settings.seeds]  # fmt: skip
    values = iter(workers.map(train, jobs))
    found = {kind: spread([next(values) for _ in settings.seeds]) for kind in kinds}
    networks: dict = {}
    for name, size in product(NETWORKS, plan.batches):
        rate = max(plan.rates, key=lambda rate, name=name, size=size: found[name, size, rate]["mean"])
        networks.setdefault(name, {})[str(size)] = {"rate": rate, "accuracy": found[name, size, rate]}
    # the workers have nothing to do by now, so that this core is not shared with them
    return {"batches": list(plan.batches), "networks": networks, "times": step_times(data, settings)}
