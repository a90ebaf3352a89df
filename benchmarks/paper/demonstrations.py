"""Two statements of the paper's text, shown: what happens if a layer is normalized outside the gradient (section 2),
and that batch norm is blind to the scale of the weights before it (section 3.3).
"""

from pathlib import Path

import torch
from data import batches, load
from settings import SECONDS, Plan
from spread import table
from torch import nn
from torch.nn import functional as F
from training import fit, logits
from workers import Workers

import fastbn


class Centred(nn.Module):
    """A hidden layer whose mean over the batch is subtracted, inside the gradient or outside: as the paper has it, a
    step then changes the bias as if the mean did not depend on it."""

    def __init__(self, inputs: int, width: int, inside: bool) -> None:
        super().__init__()
        self.first, self.last, self.inside = nn.Linear(inputs, width), nn.Linear(width, 10), inside
        nn.init.zeros_(self.first.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1))
        mean = x.mean(0)
        return self.last(torch.relu(x - (mean if self.inside else mean.detach())))


def drift(images: Path, plan: Plan, inside: bool, seed: int) -> dict:
    """The norm of the bias and the test loss over the steps."""
    data, found = load(images, "MNIST"), {"bias": [], "loss": []}
    torch.manual_seed(seed)
    network = Centred(data.train[0][0].numel(), plan.width, inside)

    def see(_: int) -> None:
        found["bias"].append(network.first.bias.norm().item())
        found["loss"].append(F.cross_entropy(logits(network, data.test[0], 10_000), data.test[1]).item())

    fit(network, batches(data.train, plan.batch, seed), plan.rate, max(plan.shown), momentum=0.0, last=1.0,
        observe=see, at=plan.shown)  # fmt: skip
    return found


def scaled(images: Path, plan: Plan, scale: float, seed: int) -> list[float]:
    """Largest differences, in parts of the largest value, between batch norm of (aW)u and of Wu, the gradients of u,
    and a times the gradient of aW and that of W."""
    data = load(images, "MNIST")
    torch.manual_seed(seed)
    weight = torch.randn(plan.width, data.train[0][0].numel()) / 10
    above, norm = torch.randn(plan.batch, plan.width), fastbn.BatchNorm1d(plan.width)

    def outcome(scale: float) -> list[torch.Tensor]:
        w, u = (scale * weight).requires_grad_(), data.train[0][: plan.batch].flatten(1).requires_grad_()
        y = norm(u @ w.T)
        du, dw = torch.autograd.grad(y, (u, w), above)
        return [y.detach(), du, scale * dw]

    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(outcome(scale), outcome(1.0), strict=True)]


def run(settings: Plan, workers: Workers) -> dict:
    plan, seed = settings.demonstrations, settings.seeds[:1]
    sides = {name: {"plan": plan, "inside": name == "inside"} for name in ("inside", "outside")}
    scales = {f"{scale:g}": {"plan": plan, "scale": scale} for scale in plan.scales}
    return {"drift": workers.map(drift, sides, seed, SECONDS["demonstrations"]),
            "scaled": workers.map(scaled, scales, seed, 0.1)}  # fmt: skip


def words(found: dict, paper: dict) -> dict[str, str]:
    rows = [[scale, *(f"{v:.1e}" for v in values[0])] for scale, values in found["scaled"].items()]
    sides = [
        [f"{label}, {name} the gradient", *(f"{v:.3g}" for v in found["drift"][name][what][0])]
        for what, label in (("bias", "norm of the bias"), ("loss", "test loss"))
        for name in found["drift"]
    ]
    return {"drift": table(["after steps", *map(str, paper["settings"]["demonstrations"]["shown"])], sides),
            "scaled": table(["a", "BN((aW)u)", "gradient of u", "a times the gradient of aW"], rows)}  # fmt: skip
