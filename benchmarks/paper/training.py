"""Stochastic gradient descent with an exponentially falling rate, as in the paper, and what is measured on the way."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F


def marks(first: int, last: int, count: int) -> list[int]:
    """About so many steps from first to last, evenly on a log axis: where networks are evaluated."""
    ratio = (last / first) ** (1 / max(1, count - 1))
    return sorted({round(first * ratio**k) for k in range(count)} | {last})


def fit(network: nn.Module, batches: Iterable, rate: float, steps: int, momentum: float = 0.9, last: float = 0.1,
        decay: float = 0.0, observe: Callable[[int], None] | None = None, at: Iterable[int] = ()) -> None:  # fmt: skip
    """Train, to ``rate * last`` at the end; ``decay`` is of L2; ``observe`` gets the steps ``at`` after them."""
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum, weight_decay=decay, fused=True)
    at = set(at)
    network.train()
    for step, (images, labels) in enumerate(itertools.islice(batches, steps), 1):
        optimizer.param_groups[0]["lr"] = rate * last ** ((step - 1) / steps)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in at:
            observe(step)
            network.train()


@torch.no_grad()
def logits(network: nn.Module, images: torch.Tensor, chunk: int = 200) -> torch.Tensor:
    """In eval mode, in chunks that fit into the cache."""
    network.eval()
    return torch.cat([network(part) for part in images.split(chunk)])


def correct(scores: torch.Tensor, labels: torch.Tensor, among: int = 1) -> float:
    """The part of the images whose label is among so many highest scores."""
    return (scores.topk(among, 1).indices == labels[:, None]).any(1).double().mean().item()


def accuracy(network: nn.Module, part: tuple[torch.Tensor, torch.Tensor]) -> float:
    return correct(logits(network, part[0]), part[1])


def steps_to(steps: list[int], values: list[float], level: float) -> float | None:
    """The step at which the level is first reached, by a straight line between evaluations; None if it never is."""
    before = (0, 0.0)
    for now in zip(steps, values, strict=True):
        if now[1] >= level:
            part = (level - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 1.0
            return before[0] + part * (now[0] - before[0])
        before = now
    return None
