"""The protocol of every measurement: functions flow in, their times flow out.

Times of one function alone say little on a shared machine, where the clock and the neighbours change by the
second. So the variants of a comparison are called in turns, in a new random order each round, and what is
compared is medians of the same rounds. One variant takes part twice under two names: the difference between
these two is the noise of the comparison.

A call's outputs are dropped before the clock stops, because a training loop pays for freeing them, too.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# A sample shorter than this is repeated within the clock, so that reading the clock (0.1 us) does not count.
SHORTEST_SAMPLE = 200e-6


@dataclass(frozen=True)
class Protocol:
    seconds: float  # to spend on a comparison
    least_rounds: int = 7
    most_rounds: int = 60


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    variants: dict[str, Callable[[], object]],
    protocol: Protocol,
    rng: random.Random,
    sample: Callable[[Callable[[], object], int], float] = _sample,
) -> dict[str, dict[str, float]]:
    """Seconds per call of each variant: median, and quartiles ``low`` and ``high``."""
    repeats, round_time = {}, 0.0
    for name, call in variants.items():
        sample(call, 1)  # warm up
        estimate = sample(call, 1)
        if estimate < SHORTEST_SAMPLE:
            estimate = sample(call, 10)
        repeats[name] = math.ceil(SHORTEST_SAMPLE / estimate)
        round_time += repeats[name] * estimate
    rounds = int(max(protocol.least_rounds, min(protocol.most_rounds, protocol.seconds / round_time)))

    samples: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(list(variants), len(variants)):
                samples[name].append(sample(variants[name], repeats[name]))
    finally:
        gc.enable()

    times = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        times[name] = {"median": median, "low": low, "high": high}
    return times
