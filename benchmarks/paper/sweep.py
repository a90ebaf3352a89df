"""Accuracy against learning rate, with and without batch norm, ReLU and sigmoid: the picture that explains the
comparison of variants. The best rate on the validation set for the network without batch norm is protocol T's.
"""

from pathlib import Path
from statistics import fmean

from data import batches, load_small
from matplotlib.figure import Figure
from networks import Variant, make_inception
from pages import BLACK, BLUE, GREY, ORANGE, figure, log_axis, percent_axis
from settings import PAPER_RATE, SECONDS, Plan
from spread import table
from training import accuracy, correct, fit, logits, marks
from workers import Workers

NETWORKS = {
    "Inception": Variant(norm=False),
    "Inception with BN": Variant(),
    "Inception, sigmoid": Variant(norm=False, activation="sigmoid"),
    "Inception with BN, sigmoid": Variant(activation="sigmoid"),
}
COLOURS = dict(zip(NETWORKS, (BLACK, BLUE, GREY, ORANGE), strict=True))


def train(images: Path, plan: Plan, variant: Variant, rate: float, seed: int, part: str = "test",
          keep: bool = False) -> dict:  # fmt: skip
    """The accuracy on some validation images on the way, and what a part of the data gives at the end; with ``keep``,
    the probabilities, too."""
    data, curve = load_small(images, "Fashion-MNIST"), []
    network = make_inception(variant, plan, data.train[0], seed)
    watched = tuple(t[: plan.watched] for t in data.validation)
    at = marks(min(20, plan.steps), plan.steps, plan.evaluations) if part == "test" and not keep else [plan.steps]
    fit(network, batches(data.train, plan.batch, seed), rate, plan.steps,
        observe=lambda _: curve.append(accuracy(network, watched)), at=at)  # fmt: skip
    some, labels = getattr(data, part)
    scores = logits(network, some)
    kept = {"probabilities": [[round(p, 5) for p in row] for row in scores.softmax(1).tolist()]} if keep else {}
    return {"steps": at, "curve": curve, "top1": correct(scores, labels), "top2": correct(scores, labels, 2), **kept}


def search(settings: Plan, workers: Workers) -> dict:
    """Validation accuracy: network -> rate -> seeds; all search seeds for the control, one for others."""
    plan, jobs, found = settings.sweep, {}, {name: {} for name in NETWORKS}
    for name, variant in NETWORKS.items():
        for rate in plan.few if name == "Inception, sigmoid" else plan.rates:
            for seed in settings.search_seeds[: None if name == "Inception" else 1]:
                jobs[name, str(rate), seed] = {"plan": settings.training, "variant": variant, "rate": rate,
                                               "part": "validation", "seed": seed}  # fmt: skip
    for (name, rate, _), values in workers.map(train, jobs, [0], SECONDS["sweep"]).items():
        found[name].setdefault(rate, []).extend(values["top1"])
    return found


def best(found: dict[str, list[float]]) -> float:
    return float(max(found, key=lambda rate: fmean(found[rate])))


def rate_of_control(settings: Plan, workers: Workers) -> float:
    return best(search(settings, workers)["Inception"])


def run(settings: Plan, workers: Workers) -> dict:
    return search(settings, workers)


def plot(found: dict, paper: dict) -> Figure:
    drawing, (axes,) = figure("Accuracy against learning rate", 1, 4.8)
    for name, values in found.items():
        axes.plot([float(r) for r in values], [fmean(v) for v in values.values()], marker="o", color=COLOURS[name],
                  label=name)  # fmt: skip
    for protocol, rate, height, line in (("P", PAPER_RATE, 1.0, "--"), ("T", best(found["Inception"]), 0.5, ":")):
        for multiple in (1, 5, 30):
            axes.axvline(multiple * rate, color=GREY, linewidth=1, linestyle=line)
            axes.annotate(f"{protocol} x{multiple}", (multiple * rate, height), xytext=(3, 0), fontsize=9,
                          xycoords=("data", "axes fraction"), textcoords="offset points", va="top")  # fmt: skip
    percent_axis(axes)
    axes.set_ylabel("validation accuracy at the end")
    log_axis(axes, "learning rate at the begin", [float(r) for r in found["Inception"]])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def words(found: dict, paper: dict) -> dict[str, str]:
    mean = {name: {rate: fmean(v) for rate, v in rates.items()} for name, rates in found.items()}
    columns = list(mean["Inception"])
    rows = [[n, *(f"{100 * values[r]:.1f} %" if r in values else "" for r in columns)] for n, values in mean.items()]
    said = {"table": table(["learning rate", *columns], rows), "times": f"{best(found['Inception']) / PAPER_RATE:.0f}"}
    for key, name in (
        ("control", "Inception"),
        ("norm", "Inception with BN"),
        ("sigmoid", "Inception with BN, sigmoid"),
    ):
        top = max(mean[name].values())
        near = [float(r) for r, value in mean[name].items() if value >= top - 0.03]
        said |= {f"{key}_low": f"{100 * mean[name][str(PAPER_RATE)]:.1f} %", f"{key}_top": f"{100 * top:.1f} %",
                 f"{key}_best": f"{best(found[name]):g}", f"{key}_wide": f"{max(near) / min(near):.0f}"}  # fmt: skip
    return said
