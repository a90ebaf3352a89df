"""Running statistics under activation checkpointing (torch.utils.checkpoint), which runs a forward again in backward.

In: a training step within `update_stats_once`. Out: statistics and counters that took each batch once.
"""

import contextlib
from collections.abc import Iterator

import torch

from .ops import is_compiling

# Contexts that are open, in any thread: what backward recomputes on a GPU runs in a thread of torch's.
_open = 0


@contextlib.contextmanager
def update_stats_once() -> Iterator[None]:
    """Within this context a forward pass that runs during a backward pass leaves running statistics and counters alone.

    torch.utils.checkpoint, use_reentrant or not, runs forwards a second time in backward, and batch norms would count
    their batch twice. Put forward and backward into the context; it may as well be around a whole training loop. For
    fastbn's modules; torch.nn's do not know of it. Outputs and gradients are the same with and without.

    Off unless asked, because of its price: every forward pass in training asks torch whether a backward pass is running
    in its thread, and one that a hook or a custom backward really wants to train on is taken for a repetition. Without
    this, a momentum of 1 - sqrt(1 - m) makes the same running statistics out of two updates as m of one, if all of the
    model is checkpointed. Compiled code (torch.compile) is not affected.

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
    """Whether the forward pass that runs now was asked to leave statistics alone."""
    return not is_compiling() and _open > 0 and torch._C._current_graph_task_id() != -1
