"""Replace the batch norms of a model by fastbn's and back, or freeze them, by changing the classes of the modules."""

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
    """Convert every ``torch.nn.BatchNorm1d/2d/3d`` in ``module`` to fastbn's, in place.

    Parameters and buffers stay the same objects (optimizers keep working), and so do hooks, training mode, extra
    attributes, and the modules themselves: a batch norm used in two places stays one module. Converting again changes
    nothing. To keep the original, convert ``copy.deepcopy(module)``.

    Only the exact classes are converted. Subclasses may override anything, so they are left as they are: classes of
    other libraries, a lazy batch norm before its first batch, and a batch norm with a parametrization (torch gives it a
    class of its own; convert first, then parametrize).

    Synchronized batch norms are converted only if ``sync`` is given. With True, ``torch.nn.SyncBatchNorm`` becomes
    ``fastbn.SyncBatchNorm`` with the same process group. With False, synchronized batch norms of torch and of fastbn
    become local ones, for fine-tuning or deployment: of the class that
    ``fastbn.SyncBatchNorm.convert_sync_batchnorm`` has converted, or else according to the module that is registered
    before them, 1d after a linear layer or a Conv1d, 3d after a Conv3d, otherwise 2d. To make local batch norms
    synchronized, use ``convert_sync_batchnorm``.

    With ``fuse`` true, batch norms also compute the activations and residual adds that follow them: batch norm ->
    activation, -> add -> activation, and -> add, written with modules, functions, methods or operators. When a module
    that contains batch norms is first called, Dynamo captures its operations (one to three seconds for a network, once
    for each mode, dtype or layout), as ``torch.compile(module, backend="fastbn_eager")`` does. From then on they run
    with fused batch norms. Dynamo guards everything that the module's Python code has read; where it has changed, the
    operations are captured again. No compiler runs. After the first call, ``print(fastbn.report(model))`` shows what
    was fused, and why the rest was not. The module tree, its classes (for isinstance), the keys of state_dict, hooks,
    copies and pickles do not change. Under torch.compile, torch.export, torch.jit.trace, torch.fx and torch.func the
    module's own forward runs; ``torch.compile(model, backend="fastbn")`` fuses there.

    Args:
        module: any module; it may be a batch norm itself.
        fuse: also fuse the activations and residual adds that follow.
        sync: True converts ``torch.nn.SyncBatchNorm`` too, False makes synchronized batch norms local, None does
            neither.

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
    """The report before the first call; `fastbn.report` adds the results of captures."""
    made = Report(swapped=[name for name, bn in root.named_modules() if type(bn) in _TO_TORCH])
    for owner, why in refused.items():
        inside = set(owner.modules())
        made.left.update({name: why for name, m in root.named_modules() if m in inside and name in made.swapped})
    return made


def revert(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`convert`, in place: fastbn's batch norms become torch's again, and nothing is fused.

    For tools that look for the exact classes of ``torch.nn``, such as exporters and quantizers. A
    ``fastbn.SyncBatchNorm`` that ``convert_sync_batchnorm`` has made of a ``torch.nn.BatchNorm1d/2d/3d`` becomes that
    class again; any other becomes ``torch.nn.SyncBatchNorm``. For a model of one process, call
    ``convert(module, sync=False)`` first.

    Args:
        module: any module; it may be a batch norm itself.

    Returns:
        ``module``.

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
    # Assigning to __class__ is how torch itself initializes lazy modules and parametrizes. A new module with the old
    # one's __dict__ would break references to the old one: hooks with a weak reference to their module, aliases in
    # lists, a bound forward. It is possible because fastbn's classes have no state that torch's do not have.
    for child in module.modules():
        if (target := classes.get(type(child))) is not None:
            child.__class__ = target
    return module


def freeze(module: nn.Module, *, trainable: bool = False) -> nn.Module:
    """Convert every ``BatchNorm1d/2d/3d`` in ``module``, torch.nn's or fastbn's, to a FrozenBatchNorm, in place.

    Modules and their tensors stay the same objects. It cannot be undone, because num_batches_tracked is deleted.
    Subclasses are not converted, and what ``convert(fuse=True)`` has fused runs unfused.

    Args:
        module: any module; it may be a batch norm itself.
        trainable: keep weight and bias as parameters; otherwise they become buffers (remove them from optimizers).

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: a batch norm has no running statistics, or its weight or bias is not a parameter (as after pruning)
            and cannot become a buffer. Nothing is changed then.
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
