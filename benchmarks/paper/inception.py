"""The paper's figures 2 and 3 in small: six variants at the paper's learning rates (protocol P), and at multiples of
the rate that is best for the control, Inception without batch norm, on the validation set (T)."""

from matplotlib.figure import Figure
from networks import Variant
from pages import COLOURS, GREY, band, figure, log_axis, mean_curve, percent_axis
from settings import MULTIPLES, PAPER_RATE, SECONDS, Plan
from spread import paired, percent, ratio, table, verdict
from sweep import rate_of_control, train
from training import steps_to
from workers import Workers

CONTROL = "Inception"
# The paper's figure 3: steps to 72.2 % in millions, and the highest accuracy.
PAPER = {
    "Inception": (31.0, 0.722), "BN-Baseline": (13.3, 0.727), "BN-x5": (2.1, 0.730), "BN-x30": (2.7, 0.748),
    "BN-x5-Sigmoid": (None, 0.698), "Inception-Sigmoid": (None, 0.001),
}  # fmt: skip


def reached(steps: list[int], curves: list[list[float]], control: list[list[float]]) -> list[float | None]:
    """Steps to the control's best accuracy on the way, seed by seed."""
    return [steps_to(steps, curve, max(other)) for curve, other in zip(curves, control, strict=True)]


def run(settings: Plan, workers: Workers) -> dict:
    """The protocols' rates, the steps of evaluations, and for each protocol and variant what seeds gave."""
    rates = {"P": PAPER_RATE, "T": rate_of_control(settings, workers)}
    variants = {name: Variant(name.startswith("BN"), "sigmoid" if "Sigmoid" in name else "relu") for name in MULTIPLES}
    jobs = {(protocol, name): {"plan": settings.training, "variant": variants[name], "rate": multiple * rate}
            for protocol, rate in rates.items() for name, multiple in MULTIPLES.items()}  # fmt: skip
    found = workers.map(train, jobs, settings.seeds, SECONDS["inception"])
    protocols: dict = {protocol: {} for protocol in rates}
    for (protocol, name), values in found.items():
        (steps, *_), control = values.pop("steps"), found[protocol, CONTROL]["curve"]
        protocols[protocol][name] = {**values, "reached": reached(steps, values["curve"], control)}
    return {"rates": rates, "steps": steps, "protocols": protocols}


def plot(found: dict, paper: dict) -> Figure:
    drawing, axes = figure("Inception in small, two protocols (the paper's figures 2 and 3)", 2, 5, sharey=True)
    steps = found["steps"]
    for where, (protocol, variants) in zip(axes, found["protocols"].items(), strict=True):
        for name, v in variants.items():
            band(where, steps, v["curve"], COLOURS[name], label=name)
        percent_axis(where)
        log_axis(where, "training step", [s for s in (20, 50, 100, 200, 400, 800) if s <= steps[-1]])
        level = max(mean_curve(variants[CONTROL]["curve"]))
        where.axhline(level, color=GREY, linewidth=1, linestyle=":")
        which = "P: the paper's rates" if protocol == "P" else "T: the control's rate tuned"
        where.set_title(f"{which} ({found['rates'][protocol]:g}, x5, x30)")
    axes[0].set_ylabel("validation accuracy (mean and range\nover seeds; dotted: the control's best)")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return drawing


def fewer(variants: dict, one: str, other: str) -> tuple[float, int] | None:
    """How many times fewer steps to the control's best; None if a seed of one of them never gets there."""
    steps = variants[other]["reached"], variants[one]["reached"]
    return None if None in steps[0] + steps[1] else ratio(*steps)


def claims(variants: dict) -> dict[str, str]:
    """What the paper found in its figure 3, and whether it shows here."""
    says, said = ("does not show", "yes", "**the opposite**"), {}
    for one, other in (("BN-Baseline", CONTROL), ("BN-x5", "BN-Baseline"), ("BN-x30", CONTROL)):
        found = fewer(variants, one, other)
        missing = [name for name in (one, other) if None in variants[name]["reached"]]
        text = f"{says[found[1]]}: {found[0]:.1f} times" if found else f"**no**: seeds of {missing[0]} never arrive"
        said[f"{one} takes fewer steps than {other}"] = text
    for high, low in (("BN-Baseline", CONTROL), ("BN-x5", CONTROL), ("BN-x30", "BN-x5"), (CONTROL, "BN-x5-Sigmoid")):
        gain = paired(variants[high]["top1"], variants[low]["top1"])
        said[f"{high} ends higher than {low}"] = f"{says[gain.sign]}: {gain.points()}"
    stuck = max(variants["Inception-Sigmoid"]["top1"]) < 0.12
    return {**said, "Inception-Sigmoid stays at chance": "yes" if stuck else "**no**"}


def words(found: dict, paper: dict) -> dict[str, str]:
    rows, parts = [], found["protocols"]
    for protocol, variants in parts.items():
        for name, v in variants.items():
            arrived = [s for s in v["reached"] if s is not None]
            steps = f"{sum(arrived) / len(arrived):.0f}" if arrived else "–"
            some = f" ({len(arrived)} of {len(v['reached'])})" if 0 < len(arrived) < len(v["reached"]) else ""
            times, other = fewer(variants, name, CONTROL), name != CONTROL
            rows.append([
                protocol, name, f"{MULTIPLES[name] * found['rates'][protocol]:g}", steps + some,
                f"{times[0]:.1f}" if times and other else "–",
                f"{PAPER[CONTROL][0] / PAPER[name][0]:.1f}" if PAPER[name][0] and other else "–",
                percent(v["top1"]), paired(v["top1"], variants[CONTROL]["top1"]).points() if other else "",
                f"{100 * PAPER[name][1]:.1f} %"])  # fmt: skip
    head = ["protocol", "", "rate", "steps to the control's best", "times fewer", "paper: times fewer",
            "test accuracy", "over the control", "paper: highest accuracy"]  # fmt: skip
    checks = {protocol: claims(variants) for protocol, variants in parts.items()}
    tuned, rate = paired(parts["T"][CONTROL]["top1"], parts["P"][CONTROL]["top1"]), found["rates"]["T"]
    lists = {f"{key}_{p}": "; ".join(f'"{c}"' for c, said in checks[p].items() if said.startswith(start)) or "nothing"
             for p in checks for key, start in (("missing", "**"), ("open", "does"))}  # fmt: skip
    most = {p: max([(fewer(v, n, CONTROL) or (0, 0))[0], n] for n in list(v)[1:]) for p, v in parts.items()}
    return {
        **lists, **{f"most_{p}": f"{times:.1f} times fewer steps ({name})" for p, (times, name) in most.items()},
        "table": table(head, rows), "rate": f"{rate:g}", "times": f"{rate / PAPER_RATE:.0f}",
        "claims": table(["the paper's finding", "P", "T"], [[c, checks["P"][c], checks["T"][c]] for c in checks["P"]]),
        "tuned": tuned.points() + verdict(tuned, "", " (less!)", " (which does not show)"),
    }  # fmt: skip
