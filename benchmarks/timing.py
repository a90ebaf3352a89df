"""The protocol by which functions are timed.

Times of one function alone say little on a shared machine, where the clock and the neighbours change by the
second. So the variants of a comparison are called in turns, in a new random order each round, and what is
compared is medians of the same rounds. One variant takes part twice under two names: the difference between
these two is the noise of the comparison. A variant that is slow sits out some rounds, evenly spread, so that it
does not take the time of the others.

Each turn begins with a call that is not timed. Otherwise a variant would be timed with the caches and the free memory
that another one left, and its time would depend on who else takes part: one ratio for torch and fastbn alone, another
with JAX between them. That call does not warm inputs that are to be cold, as the next call takes other ones.

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
# A first call longer than this serves as the estimate, too: it decides how many rounds there are, and no more. Nor do
# turns of such calls begin with one that is not timed: what is in the caches before is little of what they take.
LONG_CALL = 50e-3
# Half the width of an interval that holds 99 % of a normal distribution, in standard deviations; what a median's
# standard error is in those of a mean; and the quartiles' distance in standard deviations.
WIDTH_99, OF_MEDIAN, QUARTILES = 2.576, 1.2533, 1.349

HOPELESS, HOPELESS_ROUNDS = 2.0, 1

Times = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Protocol:
    seconds: float  # to spend on a comparison, in equal parts for the variants
    least_rounds: int = 5
    most_rounds: int = 40
    # Those of `others` that take HOPELESS times as long as `base` cannot be the fastest of the peers: one round each.
    base: str = ""
    others: tuple[str, ...] = ()


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
    failed: dict[str, Exception] | None = None,
) -> Times:
    """Seconds per call of each variant: median, quartiles ``low`` and ``high``, and every round's ``samples``.
    A variant that raises at its first call is left out and put into ``failed``, if there is one."""
    repeats: dict[str, int] = {}
    settling: dict[str, bool] = {}
    rounds: dict[str, int] = {}
    estimates: dict[str, float] = {}
    for name, call in variants.items():
        try:
            estimate = sample(call, 1)  # warms up
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
            continue
        if estimate < LONG_CALL:
            estimate = sample(call, 1)
        if estimate < SHORTEST_SAMPLE:
            estimate = sample(call, 10)
        estimates[name] = estimate
        repeats[name] = math.ceil(SHORTEST_SAMPLE / estimate)
        settling[name] = estimate < LONG_CALL
        affordable = protocol.seconds / len(variants) / ((repeats[name] + settling[name]) * estimate)
        rounds[name] = int(max(protocol.least_rounds, min(protocol.most_rounds, affordable)))
    if protocol.base in rounds:
        for name in rounds.keys() & set(protocol.others):
            if estimates[name] > HOPELESS * estimates[protocol.base]:
                rounds[name] = HOPELESS_ROUNDS
    most = max(rounds.values(), default=0)

    samples: dict[str, list[float]] = {name: [] for name in rounds}
    gc.collect()
    gc.disable()
    try:
        for turn in range(most):
            # a variant takes part in as many of the `most` turns as it has rounds
            due = [name for name, n in rounds.items() if (turn + 1) * n // most > turn * n // most]
            for name in rng.sample(due, len(due)):
                if settling[name]:
                    variants[name]()
                samples[name].append(sample(variants[name], repeats[name]))
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: list[float]) -> dict[str, object]:
    """Median, quartiles, and ``error``: how far the median may be from the one of infinitely many rounds, as a part of
    it, at 99 % confidence."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    error = WIDTH_99 * OF_MEDIAN * (high - low) / QUARTILES / math.sqrt(len(samples)) / median
    return {
        "median": median,
        "low": low,
        "high": high,
        "error": error if len(samples) > 1 else math.inf,
        "samples": [float(f"{value:.4g}") for value in samples],
    }


def pooled(first: Times, second: Times) -> Times:
    """The rounds of both."""
    return {name: summary(first[name]["samples"] + second[name]["samples"]) for name in first}


def noise(times: Times, over: str, under: str, again: str = "fastbn again", first: str = "fastbn") -> float:
    """The relative error of the ratio of two variants: the errors of both medians, and the difference
    between two measurements of fastbn, which also has what the rounds of a variant have in common."""
    repeated = math.log(times[again]["median"] / times[first]["median"]) if again in times else 0.0
    return math.hypot(times[over]["error"], times[under]["error"], repeated)
