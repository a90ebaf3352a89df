"""Statistics over seeds: what is a number's spread, and does a difference show?

Networks with the same seed begin with the same weights and see the same batches, so differences are taken seed by seed:
paired t tests. A difference "shows" if its 95 % interval leaves out zero, as one in twenty does that is none.
"""

import math
import statistics
from typing import NamedTuple

from scipy.stats import t as student


class Difference(NamedTuple):
    mean: float
    half: float  # of its 95 % interval's width

    @property
    def sign(self) -> int:
        """1 or -1 if a difference shows, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))

    def points(self) -> str:
        return f"{round(100 * self.mean, 1) + 0.0:+.1f} ± {100 * self.half:.1f} points"  # + 0.0: no -0.0


counted = 0  # tests made since the page was begun


def paired(ours: list[float], theirs: list[float]) -> Difference:
    """Of ours over theirs, seed by seed."""
    global counted
    counted += 1
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return Difference(differences[0], math.inf)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(statistics.fmean(differences), error * float(student.ppf(0.975, len(differences) - 1)))


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, int]:
    """Geometric mean of ours over theirs, and whether it shows that it is more (1) or less (-1) than 1."""
    logs = paired([math.log(v) for v in ours], [math.log(v) for v in theirs])
    return math.exp(logs.mean), logs.sign


def number(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def percent(values: list[float], digits: int = 1) -> str:
    return f"{number([100 * v for v in values], digits)} %"


def verdict(found: Difference, more: str, less: str, neither: str) -> str:
    return {1: more, -1: less, 0: neither}[found.sign]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
