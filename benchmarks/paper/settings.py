"""Out: all that may be chosen, in one place: `FULL` is what `make paper` does, `QUICK` is for the tests.

Learning rates are candidates for the networks *without* batch norm, which get the best of them; those with batch norm
get that rate, or the paper's multiples of it.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Training:
    """Of the convolutional networks."""

    steps: int = 1500
    batch: int = 32
    evaluations: int = 50
    last: float = 0.1  # learning rate at the end, as a part of that at the begin
    margin: int = 2
    noise: float = 0.2
    width: int = 8
    strides: tuple[int, ...] = (1, 2, 1)


@dataclass(frozen=True)
class Sigmoids:
    """The paper's section 4.1: three hidden layers of 100 sigmoids, batches of 60, small Gaussian weights."""

    steps: int = 5000
    batch: int = 60
    hidden: tuple[int, ...] = (100, 100, 100)
    std: float = 0.1
    evaluations: int = 50
    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    percentiles: tuple[int, ...] = (15, 50, 85)


@dataclass(frozen=True)
class Population:
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    steps: int = 400
    rate: float = 0.1


@dataclass(frozen=True)
class BatchSize:
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    steps: int = 400
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)  # each network takes the best one at each batch
    timed: int = 100


@dataclass(frozen=True)
class Shift:
    steps: int = 300
    probe: int = 128


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    # other seeds than those that are reported
    search_seeds: tuple[int, ...] = (1000, 1001)
    search_rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    training: Training = field(default_factory=Training)
    sigmoids: Sigmoids = field(default_factory=Sigmoids)
    population: Population = field(default_factory=Population)
    batch_size: BatchSize = field(default_factory=BatchSize)
    shift: Shift = field(default_factory=Shift)


FULL = Settings()
_tiny = Training(steps=6, evaluations=3, width=2)
QUICK = Settings(
    seeds=(0, 1),
    search_seeds=(1000,),
    search_rates=(0.02, 0.05),
    training=_tiny,
    sigmoids=Sigmoids(steps=6, evaluations=3, rates=(0.1, 1.0)),
    population=Population(batches=(2, 8), steps=6),
    batch_size=BatchSize(batches=(2, 8), steps=6, rates=(0.03,), timed=5),
    shift=Shift(steps=4, probe=32),
)
