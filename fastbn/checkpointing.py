"""Running statistics under activation checkpointing (torch.utils.checkpoint), which repeats forward passes."""

import contextlib
from collections.abc import Iterator

import torch

from .ops import is_compiling

# The number of open contexts, of all threads: on a GPU, checkpoint recomputes in an autograd thread of torch.
_open = 0


@contextlib.contextmanager
def update_stats_once() -> Iterator[None]:
    """Context manager: a forward pass that runs during a backward pass does not update running statistics.

    torch.utils.checkpoint (with use_reentrant or without) runs forward passes a second time in backward, so that batch
    norms would update running_mean, running_var and num_batches_tracked twice for each batch. Put forward and backward
    into this context; it may enclose a whole training loop. It applies to fastbn's modules, not to those of torch.nn.
    Outputs and gradients are the same with and without it.

    It is not on by default, because every forward pass in training then asks torch whether a backward pass is running
    in its thread, and because a forward pass that a hook or a custom backward runs on purpose is taken for a
    recomputation. Without it, a momentum of 1 - sqrt(1 - m) gives after two updates the running statistics that m gives
    after one, if the whole model is checkpointed. Code compiled by torch.compile is not affected.

    >>> import torch, fastbn
    >>> from torch.utils.checkpoint import checkpoint
    >>> bn, x = fastbn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    >>> with fastbn.update_stats_once():
    ...     checkpoint(bn, x, use_reentrant=False).sum().backward()
    >>> bn.num_batches_tracked
    tensor(1)
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def is_repeated() -> bool:
    """Whether the current forward pass is a recomputation within `update_stats_once`."""
    return not is_compiling() and _open > 0 and torch._C._current_graph_task_id() != -1
