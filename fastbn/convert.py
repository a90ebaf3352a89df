"""Swap the batch norms of a model for fastbn's, and back.

Modules flow in; the same modules flow out, with other classes.
"""

import torch

from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_TO_FASTBN = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FASTBN.items()}


def convert(module: torch.nn.Module, *, fuse: bool = False) -> torch.nn.Module:
    """Turn every ``torch.nn.BatchNorm1d/2d/3d`` in ``module`` into fastbn's, in place.

    Parameters and buffers stay the same objects (optimizers keep working), and so do hooks, training mode,
    extra attributes, and the modules themselves: a batch norm used in two places stays one module. Calling it
    again changes nothing. To keep the original, convert ``copy.deepcopy(module)``.

    Only the exact classes are swapped. Subclasses of them may override anything, so they are left alone:
    other people's, ``SyncBatchNorm``, a lazy batch norm that has not seen its first batch, and a batch norm
    with a parametrization (torch gives each of these a class of its own; convert first, then parametrize).

    Args:
        module: any module; it may be a batch norm itself.
        fuse: also fuse the activations and residual adds that follow. Not available yet.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        NotImplementedError: ``fuse`` is true.
    """
    _check_module(module, "convert")
    if fuse:
        raise NotImplementedError(
            "fastbn.convert: fuse=True is not implemented yet; fuse=False swaps the batch norms alone"
        )
    return _reclass(module, _TO_FASTBN)


def revert(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`convert`, in place: every fastbn batch norm becomes torch's again.

    For tools that look for the exact classes of ``torch.nn``, such as exporters and quantizers.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    _check_module(module, "revert")
    return _reclass(module, _TO_TORCH)


def _check_module(module: object, caller: str) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"fastbn.{caller}: expected a torch.nn.Module, got {type(module).__name__}")


def _reclass(module: torch.nn.Module, classes: dict[type, type]) -> torch.nn.Module:
    # Changing the class of a module in place is how torch itself ends the life of a lazy module and begins
    # that of a parametrized one. A new module that takes over the old one's __dict__ would lose what points
    # to the old one from outside: the hooks that keep a weak reference to their module, aliases in plain
    # lists, a bound forward. It holds because fastbn's classes keep no state that torch's do not.
    for child in module.modules():
        if (target := classes.get(type(child))) is not None:
            child.__class__ = target
    return module
