"""In: a network, batches, a learning rate. Out: the network trained, and what was observed on the way.

Stochastic gradient descent with momentum; the learning rate falls exponentially, as in the paper.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]


def fit(network: nn.Module, batches: Iterable[Batch], rate: float, steps: int, momentum: float = 0.9,
        last: float = 0.01, observe: Callable[[int], None] | None = None, every: int = 1) -> None:  # fmt: skip
    """Train for so many steps, to a learning rate of ``rate`` times ``last``. ``observe`` is called with the step
    before the first one and after every ``every``."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, last ** (1 / steps))
    if observe:
        observe(0)
    for step, (images, labels) in zip(range(1, steps + 1), batches, strict=False):
        network.train()
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if observe and step % every == 0:
            observe(step)


@torch.no_grad()
def logits(network: nn.Module, images: torch.Tensor, chunk: int = 500) -> torch.Tensor:
    """In eval mode, in pieces that fit into the cache."""
    network.eval()
    return torch.cat([network(part) for part in images.split(chunk)])


def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return correct(logits(network, images), labels)


def correct(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(1) == labels).double().mean().item()


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy in training mode: its batch norms use the batch, and the network's own running statistics stay."""
    return copy.deepcopy(network).train()
