"""Results as in paper.json flow in, a page in Markdown flows out: what was done, ours beside the paper's, what shows.

What a sentence says of the results depends on the numbers, so that the page is true of any run.
"""

from collections.abc import Callable

from population import METHODS

# Inception, table of figure 3: steps to 72.2 %, and the best accuracy.
PAPER = {
    "Inception": ("31.0M", "72.2 %"),
    "BN-Baseline": ("13.3M", "72.7 %"),
    "BN-x5": ("2.1M", "73.0 %"),
    "BN-x30": ("2.7M", "74.8 %"),
    "BN-x5-Sigmoid": ("–", "69.8 %"),
    "Inception-Sigmoid": ("–", "below 0.1 %"),
}
SHIFTS = (("BN-Baseline", "Inception"), ("BN-x5", "Inception"), ("sigmoids, BN", "sigmoids"))
PAPER_FASTER = {"BN-Baseline": 31.0 / 13.3, "BN-x5": 31.0 / 2.1, "BN-x30": 31.0 / 2.7}


def percent(values: dict) -> str:
    return f"{100 * values['mean']:.1f} ± {100 * values['sd']:.1f} %"


def error(values: dict) -> str:
    return f"{100 * (1 - values['mean']):.1f} ± {100 * values['sd']:.1f} %"


def number(values: dict, digits: int) -> str:
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def rates(values: dict) -> str:
    return ", ".join(f"{rate}: {100 * value:.1f} %" for rate, value in values.items())


def apart(one: dict, other: dict) -> bool:
    """Whether all seeds of one lie above, or all below, all of the other."""
    a, b = one["values"], other["values"]
    return min(a) > max(b) or max(a) < min(b)


def sigmoids(found: dict, paper: dict) -> str:
    plan, networks = paper["settings"]["sigmoids"], found["networks"]
    without, with_ = networks["without"], networks["with"]
    rows = [[f"{name} batch norm", percent(n["best"]), percent(n["last"]), number(n["path"], 1), number(n["range"], 2)]
            for name, n in networks.items()]  # fmt: skip
    if not apart(with_["best"], without["best"]):
        better = "The seeds of the two overlap in the best accuracy: no difference shows."
    elif with_["best"]["mean"] > without["best"]["mean"]:
        better = "With batch norm every seed is better at its best than every seed without, as in the paper."
    else:
        better = "With batch norm every seed is **worse** at its best than every seed without, unlike in the paper."
    steady = "smaller" if with_["range"]["mean"] < without["range"]["mean"] else "**not smaller**"
    return f"""
## Three hidden layers of sigmoids

The network of the paper's section 4.1: three fully connected hidden layers of {plan["hidden"][0]} sigmoids,
Gaussian weights of standard deviation {plan["std"]:g}, batches of {plan["batch"]}, {plan["steps"]} steps of plain
SGD (the paper: 50,000, on MNIST). Images are as they are, neither moved nor noisy. The learning rate,
{found["search"]["rate"]:g} for both networks, is the one that suits the network *without* batch norm best: highest
mean of the test accuracy over training ({rates(found["search"]["accuracy"])}).

![Accuracy over steps, and percentiles of the input of a sigmoid, with and without batch norm](sigmoids.svg)

{table(["", "best test accuracy", "at the end", "path of the median", "range of the median"], rows)}

{better} The two panels on the right follow the 15th, 50th and 85th percentiles of what goes into one sigmoid of the
last hidden layer, over the test set (batch norm with the test set's statistics). It is a typical one: half of the
units of its layer have a median that goes further over training. *Path* is how far the median goes, and *range* the
distance of its extremes, both in widths (15th to 85th percentile) at the end. The paper says that batch norm makes
the distribution more stable: the range is {steady} with batch norm here.
"""


def what_differs(found: dict) -> list[str]:
    """From the paper's findings."""
    variants = found["variants"]
    control = variants["Inception"]["best"]["mean"]
    best = {name: variant["best"]["mean"] for name, variant in variants.items()}
    steps = {n: v["steps_to_control"]["mean"] if v["steps_to_control"] else float("inf") for n, v in variants.items()}
    said = []
    for name in PAPER_FASTER:
        if steps[name] == float("inf"):
            said.append(f"{name} does not reach the control's best accuracy in every seed, and the paper's does")
        elif steps[name] >= steps["Inception"]:
            said.append(f"{name} takes no fewer steps than the control")
        if best[name] <= control:
            said.append(f"{name} ends no better than the control")
    if steps["BN-x5"] >= steps["BN-Baseline"]:
        said.append("BN-x5 takes no fewer steps than BN-Baseline (the paper: a sixth)")
    if best["BN-x30"] <= best["BN-x5"]:
        said.append("BN-x30 does not end above BN-x5 (the paper: 1.8 points above)")
    if best["BN-x5-Sigmoid"] >= control:
        said.append("BN-x5-Sigmoid ends above the control (the paper: 2.4 points below)")
    if best["Inception-Sigmoid"] > 0.2:
        said.append("Inception with sigmoids learns without batch norm, too (the paper's stays at chance)")
    return said


def inception(found: dict, paper: dict) -> str:
    plan, variants, seeds = paper["settings"]["training"], found["variants"], paper["settings"]["seeds"]
    base = variants["Inception"]["steps_to_control"]["mean"]
    rows = []
    for name, variant in variants.items():
        steps = variant["steps_to_control"]
        reached = f"– ({variant['reached']} of {len(seeds)} seeds)" if variant["reached"] else "–"
        faster = f"{base / steps['mean']:.1f}" if steps and steps["mean"] and name != "Inception" else "–"
        theirs = f"{PAPER_FASTER[name]:.1f}" if name in PAPER_FASTER else "–"
        rows.append([name, f"{found['rates'][name]:g}", number(steps, 0) if steps else reached, PAPER[name][0], faster,
                     theirs, percent(variant["best"]), PAPER[name][1]])  # fmt: skip
    said = what_differs(found)
    head = ["", "learning rate", "steps to the control's best", "paper: to 72.2 %", "times faster than the control",
            "paper: times faster", "best test accuracy", "paper: best accuracy"]  # fmt: skip
    return f"""
## Inception

A first convolution, {len(plan["strides"])} Inception modules (one with stride 2), {plan["steps"]} steps with
batches of {plan["batch"]}. Plain images are easy, which leaves little room for differences. So they lie at random
places of a canvas
{2 * plan["margin"]} pixels wider and higher than they are, under Gaussian noise of standard deviation
{plan["noise"]:g} (pixels go from 0 to 1), anew in each step; test images too, but once and for all. SGD with
momentum 0.9; the learning rate falls exponentially to {plan["last"]:g} of its first value, for all variants alike
(the paper lets it fall six times faster for BN-x5 and BN-x30).

The control is Inception without batch norm, with He's initial weights (with sigmoids Glorot's) and the learning
rate that is best for it: best test accuracy in the mean over {len(paper["settings"]["search_seeds"])} seeds that
are used for nothing else, {rates(found["search"]["accuracy"])}. That the test set chooses flatters the control. The
other variants have this rate, or 5 or 30 times as much; nothing else is tuned for them. (The paper's rates are 0.0015,
0.0075 and 0.045, and it does not say how the first was found. A control that has the best rate for it, as here, leaves
less room above.)

![Test accuracy over steps of six variants, and their best accuracy](inception.svg)

{table(head, rows)}

Steps to the control's best: for the control, in the mean, to the best accuracy of each seed; for the others, to the
mean of those. ± is the standard deviation over {len(seeds)} seeds. The accuracy is taken every
{plan["steps"] // plan["evaluations"]} steps, and the best is the highest of these, for all variants alike. The
paper's figures are of ImageNet.

{"Not as in the paper: " + "; ".join(said) + "." if said else "All of the paper's findings in this table show here."}
"""


def ensemble(found: dict, paper: dict) -> str:
    rows = [[name, error(values)] for name, values in found["members"].items()]
    rows += [["mean member", error(found["mean_member"])], ["best member", error(found["best_member"])],
             ["**ensemble**", f"**{error(found['ensemble'])}**"]]  # fmt: skip
    ours, best = found["ensemble"]["values"], found["best_member"]["values"]
    wins = sum(e > b for e, b in zip(ours, best, strict=True))
    return f"""
## An ensemble of six

Six networks like BN-x30 (learning rate {found["rate"]:g}), varied as in the paper: larger initial weights, some
dropout, and in the last module statistics for each activation instead of each channel. The ensemble predicts the
mean of their probabilities. The paper's ensemble of six had a top-5 error of 4.82 % on ImageNet's test set (4.9 %
on the validation set), and its best single network 7.82 % with one crop.

![Test error of six networks and of their ensemble](ensemble.svg)

{table(["", "test error"], rows)}

The ensemble is better than its best member, which the test set chose, in {wins} of {len(ours)} repetitions with
other seeds.
"""


def population(found: dict, paper: dict) -> str:
    plan, methods = paper["settings"]["population"], found["methods"]
    sizes = [str(size) for size in found["batches"]]
    rows = [[METHODS[m], *(percent(values[s]) for s in sizes)] for m, values in methods.items()]

    def gain(method: str, size: str) -> str:
        return f"{100 * (methods[method][size]['mean'] - methods['moving average'][size]['mean']):+.1f} points"

    return f"""
## Population statistics

At inference the paper replaces mean and variance of the batch with the population's, averaged over many training
batches (its algorithm 2); frameworks keep moving averages instead. `fastbn.update_bn` does what the paper says,
with all values pooled. Its mode "eval" gives each batch norm the statistics of what it sees at inference, with the
batch norms before it in eval mode. Networks as above, {plan["steps"]} steps each at a learning rate of
{plan["rate"]:g}, whatever the batch size.

![Test accuracy against batch size for five ways to choose the statistics](population.svg)

{table(["test accuracy after training with batches of", *sizes], rows)}

Against the moving average, in the mean: `update_bn` {gain("update_bn", sizes[0])} at batches of {sizes[0]} and
{gain("update_bn", sizes[-1])} at {sizes[-1]}; its mode "eval" {gain("update_bn, eval", sizes[0])} and
{gain("update_bn, eval", sizes[-1])}; the batch's own statistics {gain("batch", sizes[0])} and
{gain("batch", sizes[-1])}. (With the batch's own statistics a prediction depends on which other images are in the
batch.)
"""


def batch_size(found: dict, paper: dict) -> str:
    plan, networks, times = paper["settings"]["batch_size"], found["networks"], paper["times"]["batch_size"]["steps"]
    sizes = [str(size) for size in found["batches"]]
    rows = []
    for name, network in networks.items():
        rows.append([f"{name} batch norm: accuracy", *(percent(network[s]["accuracy"]) for s in sizes)])
        rows.append([f"{name}: its learning rate", *(f"{network[s]['rate']:g}" for s in sizes)])
        rows.append([f"{name}: ms a step", *(f"{1e3 * times[name][s]:.1f}" for s in sizes)])
    accuracies = [(networks["with"][s]["accuracy"]["mean"], networks["without"][s]["accuracy"]["mean"]) for s in sizes]
    worse = [s for s, (with_, without) in zip(sizes, accuracies, strict=True) if with_ <= without]
    helps = f"no better at batches of {' and '.join(worse)}" if worse else "better at every batch size tried"
    ratio = times["with"][sizes[-1]] / times["without"][sizes[-1]]
    return f"""
## Batch size

Networks as above, {plan["steps"]} steps each, so that larger batches see more images; at each batch size each
network has the best of the learning rates {", ".join(f"{r:g}" for r in plan["rates"])}. The time of a step is
the median of {plan["timed"]}, in one thread, both networks in turns.

![Test accuracy and time of a step against batch size, with and without batch norm](batch_size.svg)

{table(["batch size", *sizes], rows)}

With batch norm the accuracy is {helps}. At a batch of {sizes[-1]} a step with batch norm takes {ratio:.2f} times as
long as one without. (fastbn computes batch norm and ReLU in one operation, and a convolution before batch norm
needs no bias.)
"""


def shift(found: dict, paper: dict) -> str:
    networks, plan = found["networks"], paper["settings"]["shift"]
    rows = [[name, number(n["shift"], 3), number(n["relative"], 3), f"{n['losses'][0]:.2f}", number(n["loss"], 2)]
            for name, n in networks.items()]  # fmt: skip
    head = ["", "movement per step, by the spread", "by the root mean square", "loss before", "loss after"]

    def compared(one: str, other: str) -> str:
        parts = []
        for measure, unit in (("shift", "spread"), ("relative", "root mean square")):
            a, b = networks[one][measure], networks[other][measure]
            parts.append(f"{a['mean'] / b['mean']:.2g}{'' if apart(a, b) else ' (seeds overlap)'} by the {unit}")
        return f"{one} over {other}: {parts[0]}, {parts[1]}"

    less = [m for m in ("shift", "relative") if networks["BN-Baseline"][m]["mean"] < networks["Inception"][m]["mean"]]
    verdict = ("**not less**", "less by one measure, **and not by the other**,", "less")[len(less)]
    return f"""
## Internal covariate shift, measured

The paper explains batch norm by internal covariate shift, "the change in the distribution of network activations due to
the change in network parameters during training". Here it is measured, for {plan["steps"]} steps at a constant learning
rate: how far the inputs of each layer (after the activation; the first layer sees the images and is left out) move from
one step to the next over the same {plan["probe"]} test images. It is the distance between Gaussians with each channel's
mean and standard deviation before and after, over the layer's spread (the standard deviation over images) or over its
root mean square, in the mean over layers and steps. Batch norms use the statistics of these images. The picture shows
the first measure.

![Movement of the inputs of layers per training step, with and without batch norm](shift.svg)

{table(head, rows)}

Ratios of movement: {"; ".join(compared(*pair) for pair in SHIFTS)}. So at the same learning rate the Inception network
with batch norm has {verdict} internal covariate shift than the one without, as measured here. The unit matters: in a
network without batch norm images may differ little from each other beside what they have in common, and then a small
change is many times their spread. And that less shift is *why* the network trains faster does not follow. Santurkar et
al. ([How Does Batch Normalization Help Optimization?](https://arxiv.org/abs/1805.11604), 2018) found networks that
train fast with batch norm although noise was added to shift their layers' inputs, measured shift by gradients and found
it no smaller with batch norm, and see the reason in a smoother loss. Their measure was not tried here.
"""


SECTIONS: dict[str, Callable[[dict, dict], str]] = {
    "sigmoids": sigmoids,
    "inception": inception,
    "ensemble": ensemble,
    "population": population,
    "batch_size": batch_size,
    "shift": shift,
}


def page(paper: dict) -> str:
    data, machine, seeds = paper["data"], paper["machine"], paper["settings"]["seeds"]
    head = f"""# The paper's experiments, in small

Ioffe & Szegedy ([Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift](https://arxiv.org/abs/1502.03167), 2015) say that with batch norm networks train in far fewer steps, bear
higher learning rates and saturating nonlinearities, and end better. `make paper` tries that in minutes on a CPU,
with fastbn's batch norms: other data, smaller networks, the same questions. It also writes this page.

Data: {data["name"]}, {data["train"]} images for training and {data["test"]} for the test. Seeds:
{", ".join(map(str, seeds))}; ± is the standard deviation over them. Made with torch {machine["torch"]},
{machine["capability"]}. Each training runs in one thread, so that no number but times depends on how many cores there
are. On another kind of processor, or with another torch, rounding differs, and so do the numbers. All of them, with
seeds, settings and times, are in `paper.json`.
"""
    return head + "".join(SECTIONS[name](found, paper) for name, found in paper["results"].items())
