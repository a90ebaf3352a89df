"""All that may be chosen, in one place: `FULL` is what `make paper` does, `QUICK` is for tests. The budget: 15 minutes
on two cores, 1800 core seconds, of which the plans below take about 1600 (`SECONDS`). In one thread of an EPYC (Genoa)
whose other core is busy a training step costs, in milliseconds,

    perceptron, batch 60                             0.5
    Inception, width 24, six modules, batch 32      11.3   (0.12 an image at inference)
    Inception, width 16, three modules, batch 32     3.6   (2.3 with batches of 4, 9 with 128)
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "paper"
WORK = ROOT / "build" / "paper"  # finished trainings, for a run that goes on after one that was stopped

# About how long each experiment's trainings take, in seconds of one core: what progress is measured in. In the order
# of the page; those that need others' rates get them by asking for the same trainings.
SECONDS = {"sigmoids": 230, "sweep": 360, "inception": 400, "ensemble": 200, "population": 270, "shift": 60,
           "ablation": 100, "demonstrations": 5}  # fmt: skip

# The paper's learning rate (section 4.2.1), and its multiples.
PAPER_RATE = 0.0015
MULTIPLES = {"Inception": 1, "BN-Baseline": 1, "BN-x5": 5, "BN-x30": 30, "BN-x5-Sigmoid": 5, "Inception-Sigmoid": 1}


class Plan(dict):
    """What an experiment does, its values as attributes, too."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise AttributeError(name)


# fmt: off
FULL = Plan(
    seeds=[0, 1, 2],
    more_seeds=[0, 1, 2, 3],  # of small networks
    search_seeds=[1000, 1001],  # other seeds than those that are reported
    # the paper's section 4.1: 50,000 steps of 60, small Gaussian weights
    sigmoids=Plan(steps=50_000, batch=60, hidden=[100, 100, 100], std=0.1, evaluations=50, percentiles=[15, 50, 85],
                  rates=[0.3, 1.0, 3.0, 10.0], search_steps=5000),
    # the experiments sweep, inception and ensemble; so many validation images are watched on the way
    training=Plan(width=24, strides=[1, 1, 2, 1, 1, 1], steps=800, batch=32, evaluations=14, watched=1000),
    # few rates for sigmoids without batch norm, which stay at chance
    sweep=Plan(rates=[0.0015, 0.0034, 0.0075, 0.018, 0.045, 0.1, 0.3, 0.9], few=[0.0015, 0.045]),
    # so many images are seen in training, whatever the batch size, and averaged for statistics
    population=Plan(width=16, strides=[1, 2, 1], batches=[4, 8, 16, 32, 64, 128], images=8192, averaged=2048, test=5000,
                    rates=[0.01, 0.03, 0.1, 0.3, 1.0]),
    shift=Plan(steps=300, every=10, probe=128),
    # few images, seen often: what was changed is regularization for the most part
    ablation=Plan(width=16, strides=[1, 2, 1], images=4000, steps=800, batch=32, rate=0.1, test=5000),
    demonstrations=Plan(width=100, batch=60, rate=0.1, shown=[100, 1000, 2000, 4000], scales=[0.01, 0.1, 10, 100]),
)
_TINY = {"width": 2, "strides": [2, 1]}
QUICK = Plan(
    seeds=[0, 1],
    more_seeds=[0, 1],
    search_seeds=[1000],
    sigmoids=Plan(FULL.sigmoids, steps=12, evaluations=3, rates=[0.1, 1.0], search_steps=4),
    training=Plan(FULL.training, **_TINY, steps=6, evaluations=3, watched=50),
    sweep=Plan(rates=[0.0015, 0.045], few=[0.0015]),
    population=Plan(FULL.population, **_TINY, batches=[4, 16], images=64, averaged=64, test=60, rates=[0.03]),
    shift=Plan(steps=4, every=2, probe=32),
    ablation=Plan(FULL.ablation, **_TINY, images=64, steps=4, test=60),
    demonstrations=Plan(FULL.demonstrations, shown=[5, 10]),
)
