"""Six networks on protocol P's BN-x30, varied as in the paper, alone and as an ensemble, which predicts the mean of
their probabilities.
"""

import torch
from data import load_small
from matplotlib.figure import Figure
from networks import Variant
from pages import BLACK, GREY, RED, figure, percent_axis
from settings import MULTIPLES, PAPER_RATE, SECONDS, Plan
from spread import paired, percent, table, verdict
from sweep import train
from training import correct
from workers import Workers

MEMBERS = {
    "as BN-x30": Variant(),
    "weights x 2": Variant(gain=2.0),
    "dropout 5 %": Variant(dropout=0.05),
    "dropout 10 %": Variant(dropout=0.1),
    "per activation": Variant(per_activation=True),
    "weights x 2, dropout 5 %, per activation": Variant(gain=2.0, dropout=0.05, per_activation=True),
}
SINGLE = "best single network of all"
OTHERS = ("mean member", "best member", SINGLE, "ensemble")
RATE = MULTIPLES["BN-x30"] * PAPER_RATE


def summary(members: dict, labels: torch.Tensor) -> dict:
    """Top-1 and top-2 accuracies of the members and of what they make together: name -> top -> repetitions."""
    rows = {name: {top: m[top] for top in ("top1", "top2")} for name, m in members.items()}
    rows |= {name: {"top1": [], "top2": []} for name in ("mean member", "best member", "ensemble")}
    for i in range(len(members["as BN-x30"]["top1"])):
        best = max(members, key=lambda name, i=i: members[name]["curve"][i][-1])  # on validation images
        scores = torch.tensor([m["probabilities"][i] for m in members.values()]).mean(0)
        for among, top in ((1, "top1"), (2, "top2")):
            rows["mean member"][top].append(sum(m[top][i] for m in members.values()) / len(members))
            rows["best member"][top].append(members[best][top][i])
            rows["ensemble"][top].append(correct(scores, labels, among))
    return rows


def run(settings: Plan, workers: Workers) -> dict:
    jobs = {name: {"plan": settings.training, "variant": variant, "rate": RATE, "keep": True, "seed": number}
            for number, (name, variant) in enumerate(MEMBERS.items(), 100)}  # fmt: skip
    found = workers.map(train, jobs, [100 * seed for seed in settings.seeds], SECONDS["ensemble"])
    return summary(found, load_small(workers.images, "Fashion-MNIST").test[1])


def all_rows(found: dict, paper: dict) -> dict:
    """With the best network of all variants and protocols, which validation images choose for each seed."""
    parts = paper["results"].get("inception", {"protocols": {}})["protocols"].values()
    variants, single = [v for part in parts for v in part.values()], {"top1": [], "top2": []}
    for i in range(len(found["ensemble"]["top1"]) if variants else 0):
        best = max(variants, key=lambda v, i=i: v["curve"][i][-1])
        for top, values in single.items():
            values.append(best[top][i])
    rows = {**found, SINGLE: single}
    return {name: rows[name] for name in (*MEMBERS, *OTHERS) if rows[name]["top1"]}


def plot(found: dict, paper: dict) -> Figure:
    drawing, parts = figure("An ensemble of six networks like BN-x30", 2, 4.8, sharey=True)
    rows = dict(reversed(all_rows(found, paper).items()))
    for axes, top in zip(parts, ("top1", "top2"), strict=True):
        for place, (name, values) in enumerate(rows.items()):
            colour = RED if name == "ensemble" else BLACK if name in OTHERS else GREY
            errors = [1 - v for v in values[top]]
            axes.plot(errors, [place] * len(errors), "o", color=colour, markersize=5, alpha=0.5)
            axes.plot(sum(errors) / len(errors), place, "|", color=colour, markersize=16, markeredgewidth=2)
        axes.set_xlabel(f"top-{top[-1]} error on the test set (dots: repetitions)")
        axes.set_yticks(range(len(rows)), list(rows))
        percent_axis(axes, "x")
        axes.locator_params(axis="x", nbins=6)
    return drawing


def words(found: dict, paper: dict) -> dict[str, str]:
    rows, said = all_rows(found, paper), []
    for name in (n for n in OTHERS[1:3] if n in rows):
        for top in ("top1", "top2"):
            less = paired(rows["ensemble"][top], rows[name][top])
            said.append(f"{less.points()} of top-{top[-1]} accuracy over the {name}"
                        + verdict(less, "", " (**worse**)", " (which does not show)"))  # fmt: skip
    shown = [[n, *(percent([1 - v for v in values[top]]) for top in ("top1", "top2"))] for n, values in rows.items()]
    return {"rate": f"{RATE:g}", "repetitions": str(len(found["ensemble"]["top1"])), "gains": "; ".join(said),
            "table": table(["", "top-1 error", "top-2 error"], shown)}  # fmt: skip
