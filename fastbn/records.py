"""Which batch norms were fused in captured graphs, and which were not and why, kept for `fastbn.report`.

A graph contains tensors, not modules: a batch norm is identified by its weight, or by its running mean if it has none.
"""

import threading

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.weak import WeakTensorKeyDictionary

_results: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def record(weight: Tensor | None, running_mean: Tensor | None, training: bool, pattern: str | None, why: str) -> None:
    """Store the result for the batch norm with these tensors in one mode: its pattern, or why it has none."""
    key = running_mean if weight is None else weight
    if key is not None:
        with _lock:
            _results.setdefault(key, {})[training] = (pattern, why)


def recorded(bn: nn.Module) -> dict[bool, tuple[str | None, str]]:
    """For each mode (training is True or False) that was captured: the pattern or None, and why there is none."""
    key = _key(bn)
    with _lock:
        return {} if key is None else dict(_results.get(key) or {})


def forget(root: nn.Module) -> None:
    """Delete the results of all batch norms in root."""
    for bn in root.modules():
        if isinstance(bn, _NormBase) and (key := _key(bn)) is not None:
            with _lock:
                _results.pop(key, None)


def _key(bn: nn.Module) -> Tensor | None:
    weight, running_mean = getattr(bn, "weight", None), getattr(bn, "running_mean", None)
    return running_mean if weight is None else weight
