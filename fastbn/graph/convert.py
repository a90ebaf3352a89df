"""Swap the batch norms of a model for fastbn's, and back.

Modules flow in; the same modules flow out, with other classes.
"""

from typing import Any

import torch
from torch import nn

from ..arguments import check_module
from ..nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from ..nn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..nn.sync import SyncBatchNorm, become_local, desynchronize
from .fusing import fuse as _fuse
from .fusing import unfuse
from .report import Report, forget, keep

_TO_FASTBN: dict[type, type] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_TO_FASTBN_SYNC: dict[type, type] = {torch.nn.SyncBatchNorm: SyncBatchNorm}
_TO_TORCH = {ours: theirs for theirs, ours in (_TO_FASTBN | _TO_FASTBN_SYNC).items()}
_FROZEN: dict[type, type] = {
    nn.BatchNorm1d: FrozenBatchNorm1d, BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d, BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d, BatchNorm3d: FrozenBatchNorm3d,
}  # fmt: skip


def convert(module: torch.nn.Module, *, fuse: bool = False, sync: bool | None = None) -> torch.nn.Module:
    """Turn every ``torch.nn.BatchNorm1d/2d/3d`` in ``module`` into fastbn's, in place.

    Parameters and buffers stay the same objects (optimizers keep working), and so do hooks, training mode,
    extra attributes, and the modules themselves: a batch norm used in two places stays one module. Calling it
    again changes nothing. To keep the original, convert ``copy.deepcopy(module)``.

    Only the exact classes are swapped. Subclasses of them may override anything, so they are left alone:
    other people's, a lazy batch norm that has not seen its first batch, and a batch norm
    with a parametrization (torch gives each of these a class of its own; convert first, then parametrize).
    ``torch.nn.SyncBatchNorm`` stays too, unless ``sync`` is given: with True it becomes ``fastbn.SyncBatchNorm``, with
    the same process group; with False synchronized batch norms, torch's and fastbn's, become those of one process, for
    fine-tuning or deployment. Which of ``BatchNorm1d/2d/3d`` (or ``BatchNormAct1d/2d/3d``) follows from the class that
    ``fastbn.SyncBatchNorm.convert_sync_batchnorm`` has swapped; where it did not, from the module that is registered
    before: 1d after a linear layer or a Conv1d, 3d after a Conv3d, otherwise 2d. What is not synchronized becomes so by
    ``convert_sync_batchnorm`` alone.

    With ``fuse`` true, batch norms also take in the activations and residual adds that follow them: batch norm ->
    activation, -> add -> activation, and -> add, written with modules, functions, methods or operators. A module that
    contains batch norms captures its operations by Dynamo when it is first called (one to three seconds for a network,
    once for each mode, dtype or layout), as ``torch.compile(module, backend="fastbn_eager")`` does, and runs them with
    fused batch norms from then on, for as long as everything that its Python code looked at is as it was; otherwise it
    captures them again. No compiler runs. ``print(fastbn.report(model))`` tells after the first call what was fused,
    and why the rest was not. The tree, its classes (as isinstance sees them), the keys of state_dict, hooks, copies and
    pickles stay as they were. Under torch.compile, torch.export, torch.jit.trace, torch.fx and torch.func the module's
    own forward runs; ``torch.compile(model, backend="fastbn")`` fuses there.

    Args:
        module: any module; it may be a batch norm itself.
        fuse: also fuse the activations and residual adds that follow.
        sync: True swaps ``torch.nn.SyncBatchNorm`` too, False makes synchronized batch norms local, None leaves them.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    check_module(module, "convert")
    if sync is False:
        desynchronize(module)
    _reclass(module, _TO_FASTBN | _TO_FASTBN_SYNC if sync else _TO_FASTBN)
    if fuse:
        keep(module, _report(module, _fuse(module)))
    return module


def _report(root: torch.nn.Module, refused: dict[torch.nn.Module, str]) -> Report:
    """What is known before the first call; `fastbn.report` adds what the capture of a forward has found."""
    made = Report(swapped=[name for name, bn in root.named_modules() if type(bn) in _TO_TORCH])
    for owner, why in refused.items():
        inside = set(owner.modules())
        made.left.update({name: why for name, m in root.named_modules() if m in inside and name in made.swapped})
    return made


def revert(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`convert`, in place: every fastbn batch norm becomes torch's again, and every forward its class's.

    For tools that look for the exact classes of ``torch.nn``, such as exporters and quantizers. A
    ``fastbn.SyncBatchNorm`` becomes the ``torch.nn.BatchNorm1d/2d/3d`` that ``convert_sync_batchnorm`` made it of; one
    that was ``torch.nn.SyncBatchNorm``, or was made as it is, becomes that. For a model of one process, call
    ``convert(module, sync=False)`` first.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    check_module(module, "revert")
    unfuse(module)
    forget(module)
    for child in module.modules():
        if type(child) is SyncBatchNorm and child._dimensions is not None:
            become_local(child, getattr(torch.nn, f"BatchNorm{child._dimensions}d"))
    return _reclass(module, _TO_TORCH)


def _reclass(module: torch.nn.Module, classes: dict[type, type]) -> torch.nn.Module:
    # Changing the class of a module in place is how torch itself ends the life of a lazy module and begins
    # that of a parametrized one. A new module that takes over the old one's __dict__ would lose what points
    # to the old one from outside: the hooks that keep a weak reference to their module, aliases in plain
    # lists, a bound forward. It holds because fastbn's classes keep no state that torch's do not.
    for child in module.modules():
        if (target := classes.get(type(child))) is not None:
            child.__class__ = target
    return module


def freeze(module: nn.Module, *, trainable: bool = False) -> nn.Module:
    """Turn every ``BatchNorm1d/2d/3d`` in ``module``, torch.nn's or fastbn's, into a FrozenBatchNorm, in place.

    Modules stay the same objects, and so do their tensors. For good: num_batches_tracked is gone. Subclasses are left
    alone, and what ``convert(fuse=True)`` fused is undone.

    Args:
        module: any module; it may be a batch norm itself.
        trainable: keep weight and bias as parameters; otherwise they become buffers (remove them from optimizers).

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: a batch norm has no running statistics, or weight or bias are not its own (pruned), so that they
            cannot become buffers. Then nothing is changed.
    """
    check_module(module, "freeze")
    found = {name: m for name, m in module.named_modules() if type(m) in _FROZEN}
    for name, m in found.items():
        label = name or type(m).__name__
        if getattr(m, "running_mean", None) is None or getattr(m, "running_var", None) is None:
            raise ValueError(f"fastbn.freeze: {label} has no running statistics to use")
        if not trainable and not {"weight", "bias"} <= m._parameters.keys():
            raise ValueError(
                f"fastbn.freeze: weight and bias of {label} should be parameters of its own, to become buffers; undo "
                "what replaced them (torch.nn.utils.prune.remove), or use trainable=True"
            )
    unfuse(module)
    forget(module)
    for m in found.values():
        _freeze(m, trainable)
    return module


def _freeze(m: Any, trainable: bool) -> None:
    m.__class__ = _FROZEN[type(m)]
    for name in ("num_batches_tracked", "momentum", "affine", "track_running_stats"):
        if hasattr(m, name):
            delattr(m, name)
    if not trainable:
        for name in ("weight", "bias"):
            value = m._parameters.pop(name)
            m.register_buffer(name, None if value is None else value.detach())
