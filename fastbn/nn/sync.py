"""Synchronized batch norm as modules, and their conversion from and to local ones; `functional.sync` computes it."""

import copy
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

from .. import records
from ..autograd import batch_norm
from ..functional.sync import sync_batch_norm
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    Device,
    _BatchNormAct,
    _FastBatchNorm,
    state_of,
)


def _group_of(module: Any) -> Any:
    """The process group for a forward pass; None in eval, without torch.distributed, or if it has one rank."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if module.process_group is None else module.process_group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"SyncBatchNorm: rank {dist.get_rank()} is not in process_group, and cannot train with it")
    return group if size > 1 else None


def _run(module: Any, input: Tensor, *epilogue: Any) -> Tensor:
    """The forward pass of both modules. epilogue: activation, activation_param and residual, or nothing."""
    weight, bias, mean, var, counter, training = state_of(module)
    if (group := _group_of(module)) is None:
        return batch_norm(input, weight, bias, mean, var, counter, training, module.momentum, module.eps, *epilogue)
    return sync_batch_norm(input, weight, bias, mean, var, counter, module.momentum, module.eps, group, *epilogue)


class _Synchronized(_NormBase):
    """What both modules have in common, apart from the constructor."""

    if TYPE_CHECKING:  # torch.jit.script would read this annotation at run time
        process_group: Any

    # Spatial dimensions, 1 to 3, of the class that convert_sync_batchnorm has replaced; None if that is not known.
    _dimensions: int | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _check_scripted(self) -> None:
        if self.training:
            raise RuntimeError(
                "fastbn: synchronized batch norm does not train in TorchScript; script the model in eval mode, or "
                "after fastbn.convert(model, sync=False)"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.process_group)] = self.process_group  # process groups cannot be copied
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class SyncBatchNorm(_Synchronized, _FastBatchNorm, nn.BatchNorm2d):
    """Batch norm over the batch of all ranks of a process group, as torch.nn.SyncBatchNorm, on CPUs and GPUs.

    Input is (N, C, ...) with any number of dimensions; N may differ between ranks and be 0. In eval, without
    torch.distributed, and in a group of one rank, it is a local batch norm. All ranks have to call forward, and
    backward, equally often. If a rank ends, the others raise an exception at the latest after the group's timeout.

    It is a subclass of torch.nn.BatchNorm2d, so that tools that look for norm layers by class find it. It is not one of
    torch.nn.SyncBatchNorm, which DDP does not accept on CPUs.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as for torch.nn's batch norms.
        process_group: of torch.distributed; None for all ranks.

    Raises:
        ValueError: input has fewer than 2 dimensions; there is one value per channel on all ranks together (on CPUs; on
            GPUs, where the host does not know the count, the output is bias and the running statistics stay); or the
            rank is not in process_group.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def _compute(self, input: Tensor) -> Tensor:
        return _run(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any | None = None) -> nn.Module:
        """Make every batch norm in ``module`` synchronized, in place.

        BatchNorm1d/2d/3d and SyncBatchNorm of torch and of fastbn become fastbn.SyncBatchNorm, BatchNormAct1d/2d/3d
        become SyncBatchNormAct. Modules, parameters, buffers and hooks stay the same objects. Only the exact classes
        are converted; a warning names other batch norms. What `fastbn.convert(fuse=True)` has fused runs unfused.
        ``fastbn.convert(module, sync=False)`` undoes it.

        Args:
            module: any module; it may be a batch norm itself.
            process_group: of torch.distributed, also for modules that are synchronized already; None for all ranks.

        Returns:
            ``module``.
        """
        records.forget(module)
        for name, child in module.named_modules():
            if (target := _SYNCHRONIZED.get(type(child))) is not None:
                if type(child) in _DIMENSIONS:
                    child._dimensions = _DIMENSIONS[type(child)]
                child.__class__ = target
                child.process_group = process_group
            elif isinstance(child, (_BatchNorm, _BatchNormAct, _LazyNormBase)):
                warnings.warn(
                    f"convert_sync_batchnorm: {name or 'module'} is not synchronized: {type(child).__name__} is not a "
                    "class that SyncBatchNorm stands in for",
                    stacklevel=2,
                )
        return module


class SyncBatchNormAct(_Synchronized, _BatchNormAct):
    """y = act(bn(x) + residual) as `fastbn.BatchNormAct2d`, over the batch of all ranks as `fastbn.SyncBatchNorm`.

    Args:
        process_group: of torch.distributed; None for all ranks.
        others: as for `fastbn.BatchNormAct2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str = "relu",
        activation_param: float | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, activation_param=activation_param,
        )  # fmt: skip
        self.process_group = process_group

    def _compute(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return _run(self, input, self.activation, self.activation_param, residual)


_LOCAL = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
_LOCAL_ACT = {1: BatchNormAct1d, 2: BatchNormAct2d, 3: BatchNormAct3d}
_DIMENSIONS = {
    **{getattr(nn, f"BatchNorm{n}d"): n for n in _LOCAL},
    **{cls: n for classes in (_LOCAL, _LOCAL_ACT) for n, cls in classes.items()},
}
_SYNCHRONIZED = {
    cls: SyncBatchNormAct if issubclass(cls, _BatchNormAct) else SyncBatchNorm
    for cls in (*_DIMENSIONS, nn.SyncBatchNorm, SyncBatchNorm, SyncBatchNormAct)
}
# The dimensions of the local batch norm after a layer, where nothing else tells them; otherwise 2.
_DIMENSIONS_AFTER = {nn.Linear: 1, nn.Conv1d: 1, nn.ConvTranspose1d: 1, nn.Conv3d: 3, nn.ConvTranspose3d: 3}


def desynchronize(root: nn.Module) -> None:
    """Make every synchronized batch norm in ``root``, torch's and fastbn's, a local one, in place."""
    before: dict[nn.Module, nn.Module] = {}
    for parent in root.modules():
        before |= {child: previous for previous, child in itertools.pairwise(parent.children())}
    for module in root.modules():
        if type(module) in (nn.SyncBatchNorm, SyncBatchNorm, SyncBatchNormAct):
            previous = before.get(module)
            guess = 2 if previous is None else _DIMENSIONS_AFTER.get(type(previous), 2)
            local = _LOCAL_ACT if isinstance(module, SyncBatchNormAct) else _LOCAL
            become_local(module, local[getattr(module, "_dimensions", None) or guess])


def become_local(module: nn.Module, cls: type) -> None:
    """Change the class of a synchronized batch norm to ``cls``, that of a local one."""
    module.__class__ = cls
    for name in ("process_group", "_dimensions"):
        module.__dict__.pop(name, None)
