"""In: settings, data. Out: the paper's figures 2 and 3 in small: accuracy of six variants against steps, the steps that
each takes to the best accuracy of the control (Inception without batch norm), and each one's best accuracy.
"""

from data import Data
from networks import Variant
from settings import Settings
from trials import control, curve_of, mean_curve, spread
from workers import Workers

# Name, variant, learning rate as a multiple of the control's.
VARIANTS = {
    "Inception": (Variant(norm=False), 1),
    "BN-Baseline": (Variant(), 1),
    "BN-x5": (Variant(), 5),
    "BN-x30": (Variant(), 30),
    "BN-x5-Sigmoid": (Variant(activation="sigmoid"), 5),
    "Inception-Sigmoid": (Variant(norm=False, activation="sigmoid"), 1),
}
CONTROL = "Inception"


def steps_to(curve: dict, level: float) -> int | None:
    """The first step evaluated at which the accuracy is at least that; None if it never is."""
    return next((s for s, a in zip(curve["steps"], curve["accuracy"], strict=True) if a >= level), None)


def summary(curves: dict[str, list[dict]]) -> dict:
    """For the control, steps to its own best in each seed; for others, to the mean over seeds of the control's best."""
    best = {name: [max(c["accuracy"]) for c in found] for name, found in curves.items()}
    level = spread(best[CONTROL])["mean"]
    result = {}
    for name, found in curves.items():
        levels = best[CONTROL] if name == CONTROL else [level] * len(found)
        steps = [steps_to(c, target) for c, target in zip(found, levels, strict=True)]
        reached = [s for s in steps if s is not None]
        result[name] = {
            "best": spread(best[name]),
            "last": spread([c["accuracy"][-1] for c in found]),
            "steps_to_control": spread(reached) if len(reached) == len(steps) else None,
            "reached": len(reached),
            "curve": mean_curve(found),
            "curves": [c["accuracy"] for c in found],
        }
    return {"level": level, "steps": curves[CONTROL][0]["steps"], "variants": result}


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    trials = len(VARIANTS) * len(settings.seeds)
    searches = len(settings.search_rates) * len(settings.search_seeds)
    found = control(settings, workers, searches / (searches + trials))
    rates = {name: multiple * found["rate"] for name, (_, multiple) in VARIANTS.items()}
    jobs = [{"training": settings.training, "variant": variant, "rate": rates[name], "seed": seed}
            for name, (variant, _) in VARIANTS.items() for seed in settings.seeds]  # fmt: skip
    curves = iter(workers.map(curve_of, jobs, trials / (searches + trials)))
    result = summary({name: [next(curves) for _ in settings.seeds] for name in VARIANTS})
    return {"search": found, "rates": rates, **result}
