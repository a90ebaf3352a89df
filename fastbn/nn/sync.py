"""In: each rank's part of a batch, and the process group that shares it. Out: batch norm over all parts together.

Per pass one collective, on one small buffer: the moments of every rank are gathered in the forward pass, the gradients
of weight and bias summed in the backward pass. The passes over memory before and after it are those of batch norm.
"""

import copy
import itertools
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from .. import activations, arguments, ops, records
from ..autograd import batch_norm
from ..composed import composed_backward
from ..ops import is_compiling
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    _BatchNormAct,
    _FastBatchNorm,
    leaf_call,
    state_of,
)

# Under the name that this torch does not warn of.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def _gathered(t, group):
    """The tensors of all ranks, in their order: (ranks, *t.shape)."""
    size = dist.get_world_size(group)
    if is_compiling():  # the form of it that a graph can hold
        tensors = torch.ops._c10d_functional.all_gather_into_tensor(t, size, group.group_name)
        tensors = torch.ops._c10d_functional.wait_tensor(tensors)
    else:
        tensors = t.new_empty((size * t.size(0), *t.shape[1:]))
        _all_gather(tensors, t.contiguous(), group)
    return tensors.view(size, *t.shape)


def _summed(t, group):
    """The sum of t over all ranks; t itself stays."""
    if t.is_cpu:  # between 2 Gloo ranks 0.4 to 0.9 ms, where all_reduce takes 0.4 to 1.8
        return _gathered(t.reshape(1, -1), group).sum(0).view_as(t)
    if is_compiling():
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(t, "sum", group.group_name))
    t = t.clone()
    dist.all_reduce(t, group=group)
    return t


class _SumOverRanks(torch.autograd.Function):
    """Every rank gets the sum, and so every rank's gradient goes to each addend: its derivative is itself."""

    @staticmethod
    def forward(t, group):
        return _summed(t, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.apply(grad, ctx.group), None


class _Ranks(NamedTuple):
    """What `composed_backward` wants to know of them."""

    group: object
    count: Tensor

    def sum(self, t):
        return _SumOverRanks.apply(t, self.group)


class SyncBatchNormFunction(torch.autograd.Function):
    """`apply(input, weight, bias, packet, eps, activation, activation_param, residual, group) -> output`.

    Args:
        packet: float64 (3, C), mean, biased variance and count of each channel over all ranks. They are functions of
            input: the gradient of input is that of the whole, for the sum of what all ranks differentiate.
        group: the process group; the rest is as for `fastbn.BatchNormFunction`.

    Gradients of weight and bias are those of this rank's part, as torch's SyncBatchNorm has them: whoever averages the
    gradients of all parameters (DDP, FSDP) averages these too. The backward pass can be differentiated again, at the
    price of float64 operations and of more collectives.
    """

    @staticmethod
    def forward(input, weight, bias, packet, eps, activation, activation_param, residual, group):
        return ops.forward(input, weight, bias, packet, eps, activation, activation_param, residual)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, packet, ctx.eps, ctx.activation, ctx.activation_param, residual, ctx.group = inputs
        if ctx.activation == "identity":
            bias = residual = None  # nothing to compute z for
        ctx.save_for_backward(input, weight, bias, packet, residual)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, packet, residual = ctx.saved_tensors
        wants_input, wants_weight, wants_bias, *_, wants_residual, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias, grad_residual = _gradients(
            grad_output, input, weight, packet, ctx.eps, (wants_input, wants_weight, wants_bias, wants_residual),
            ctx.activation, ctx.activation_param, bias, residual, ctx.group,
        )  # fmt: skip
        return grad_input, grad_weight, grad_bias, None, None, None, None, grad_residual, None


def _gradients(
    grad_output, input, weight, packet, eps, wanted, activation, activation_param, bias, residual, group
):  # fmt: skip
    """Of input, weight, bias and residual, None where they are not wanted: by the kernels, or differentiable."""
    if torch.is_grad_enabled():
        grads = composed_backward(
            grad_output, input, weight, bias, None, eps, activation, activation_param, residual,
            _Ranks(group, packet[2, 0]),
        )  # fmt: skip
    else:
        ending = (activation, activation_param, bias, residual)
        # Without an activation the residual's gradient is grad_output itself.
        makes_residual = wanted[3] and activation != "identity"
        if wanted[0]:
            own = ops.grad_stats(grad_output, input, weight, packet, eps, *ending)
            grad_input, grad_residual = ops.grad_apply(
                grad_output, input, weight, packet, _summed(own, group), eps, makes_residual, *ending
            )
            grads = grad_input, *own.to(ops.param_dtype(input, weight)).unbind(), grad_residual
        else:  # no other is a matter of other ranks
            mask = (False, True, True, makes_residual)
            grads = ops.backward(grad_output, input, weight, packet[:2], eps, False, mask, *ending)
        if not makes_residual:
            grads = *grads[:3], grad_output
    return [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]


def sync_batch_norm(
    input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group,
    activation="identity", activation_param=None, residual=None,
):  # fmt: skip
    """Batch norm in training over the inputs of all ranks of a process group, each of which calls it.

    Everything is as in `fastbn.functional.batch_norm`, the count for the unbiased running variance too. The number of
    samples may differ from rank to rank and be 0; N = 0 takes part in the collectives, and updates the statistics.
    """
    arguments.check_memory(
        input=input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        num_batches_tracked=num_batches_tracked, residual=residual,
    )  # fmt: skip
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    momentum, eps = arguments.check_each(
        input, weight, bias, running_mean, running_var, True, momentum, eps, whole=False
    )
    activations.check(activation, activation_param)
    arguments.check_residual(residual, input)
    arguments.check_together(input, weight, bias, running_mean, running_var, True)
    if input.size(1) == 0:
        raise ValueError(f"SyncBatchNorm number of input channels should be non-zero, but input is {input.shape}")
    packets = _gathered(ops.stats(input.detach()), group)
    if running_mean is None and is_compiling():  # Inductor has no form for a changed argument that is None
        running_mean, running_var = packets.new_zeros(packets.size(2)), packets.new_zeros(packets.size(2))
    packet = ops.finish(packets, momentum, running_mean, running_var, num_batches_tracked)
    return SyncBatchNormFunction.apply(input, weight, bias, packet, eps, activation, activation_param, residual, group)


def _group_of(module):
    """The process group of a module's pass; None where there is nobody to share a batch with."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if module.process_group is None else module.process_group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"SyncBatchNorm: rank {dist.get_rank()} is not in process_group, and cannot train with it")
    return group if size > 1 else None


def _forward(module, input, *ending):
    if not isinstance(input, fx.Proxy):
        module._check_input_dim(input)
    elif (node := leaf_call(module, input, *(t for t in ending[2:] if t is not None))) is not None:
        return node
    weight, bias, mean, var, counter, training = state_of(module)
    if (group := _group_of(module)) is None:
        return batch_norm(input, weight, bias, mean, var, counter, training, module.momentum, module.eps, *ending)
    return sync_batch_norm(input, weight, bias, mean, var, counter, module.momentum, module.eps, group, *ending)


class _Synchronized:
    """What both modules have beside a `process_group`."""

    # Spatial dimensions of the class that convert_sync_batchnorm swapped, 1 to 3; None where that is not known.
    _dimensions: int | None = None

    def _check_input_dim(self, input):
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _check_scripted(self) -> None:
        if self.training:
            raise RuntimeError(
                "fastbn: synchronized batch norm does not train in TorchScript; script the model in eval mode, or "
                "after fastbn.convert(model, sync=False)"
            )

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # of processes there are no copies
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class SyncBatchNorm(_Synchronized, _FastBatchNorm, nn.BatchNorm2d):
    """Batch norm over the batch of all ranks of a process group, as torch.nn.SyncBatchNorm, on CPUs too.

    On input (N, C, ...) of any rank; N may differ from rank to rank and be 0. In eval, and in training without
    torch.distributed or in a group of one, it is the local batch norm. All ranks must call it equally often, and
    backward too; a rank that has ended makes the others raise when the group's timeout is over, or sooner. A subclass
    of torch.nn.BatchNorm2d, which is how tools find it that list the classes of norm layers, and not of
    torch.nn.SyncBatchNorm, which DDP refuses on CPUs.

    Args:
        process_group: of torch.distributed; None for all ranks. The rest is as for torch.nn.SyncBatchNorm.

    Raises ValueError for an input of fewer than 2 dimensions or with one value per channel in all ranks together (not
    on GPUs, where the count is not known to the host: there y is bias, and the running statistics stay), and for a
    rank that is not in process_group.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            self._check_scripted()
            return self._scripted_batch_norm(input)
        else:
            return _forward(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group=None) -> nn.Module:
        """Make every batch norm in ``module`` synchronized, in place: BatchNorm1d/2d/3d and SyncBatchNorm of torch and
        of fastbn become SyncBatchNorm, BatchNormAct1d/2d/3d become SyncBatchNormAct.

        Modules, parameters, buffers and hooks stay the same objects. Only the exact classes are swapped; a warning
        names what else is a batch norm. What `fastbn.convert(fuse=True)` has fused runs unfused from then on. The way
        back is ``fastbn.convert(module, sync=False)``.

        Args:
            module: any module; it may be a batch norm itself.
            process_group: of torch.distributed, also for what is synchronized already; None for all ranks.

        Returns:
            ``module``.
        """
        records.forget(module)  # what was fused is no longer
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
        process_group: of torch.distributed; None for all ranks. The rest is as for `fastbn.BatchNormAct2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device=None,
        dtype=None,
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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            self._check_scripted()
            return self._scripted(input, residual)
        else:
            return _forward(self, input, self.activation, self.activation_param, residual)


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
# A synchronized batch norm takes inputs of any dimensions; where nothing else is known, the layer before it tells.
_DIMENSIONS_AFTER = {nn.Linear: 1, nn.Conv1d: 1, nn.ConvTranspose1d: 1, nn.Conv3d: 3, nn.ConvTranspose3d: 3}


def desynchronize(root: nn.Module) -> None:
    """Make every synchronized batch norm in ``root``, torch's and fastbn's, that of one process, in place."""
    before = {}
    for parent in root.modules():
        before |= {child: previous for previous, child in itertools.pairwise(parent.children())}
    for module in root.modules():
        if type(module) in (nn.SyncBatchNorm, SyncBatchNorm, SyncBatchNormAct):
            guess = _DIMENSIONS_AFTER.get(type(before.get(module)), 2)
            local = _LOCAL_ACT if isinstance(module, SyncBatchNormAct) else _LOCAL
            become_local(module, local[getattr(module, "_dimensions", None) or guess])


def become_local(module: nn.Module, cls: type) -> None:
    """Give a synchronized batch norm the class ``cls`` of one process."""
    module.__class__ = cls
    for name in ("process_group", "_dimensions"):
        module.__dict__.pop(name, None)
