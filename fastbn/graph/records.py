"""What the rewriting of captured graphs did to each batch norm, kept for `fastbn.report`.

A graph knows tensors, not modules, so a batch norm is recognized by its weight, or its running mean where it has none.
"""

import threading

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_results: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def record(weight: Tensor | None, running_mean: Tensor | None, training: bool, pattern: str | None, why: str) -> None:
    """Note what became of the batch norm with these tensors in one mode: its pattern, or why there is none."""
    key = running_mean if weight is None else weight
    if key is not None:
        with _lock:
            _results.setdefault(key, {})[training] = (pattern, why)


def recorded(bn: nn.Module) -> dict[bool, tuple[str | None, str]]:
    """For each mode (training or not) in which a batch norm was captured: its pattern or None, and why there is none."""
    weight, running_mean = getattr(bn, "weight", None), getattr(bn, "running_mean", None)
    key = running_mean if weight is None else weight
    with _lock:
        return {} if key is None else dict(_results.get(key) or {})
