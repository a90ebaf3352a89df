"""Batch norm over a batch that is distributed over the ranks of a process group.

There is one collective a pass, on a small buffer: forward gathers the statistics of every rank, backward sums the
gradients of weight and bias. The passes over memory before and after it are those of the operators.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import activations, arguments, ops
from ..composed import composed_backward
from ..ops import is_compiling

# all_gather_into_tensor, which newer versions of torch deprecate under this name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def all_gather(t: Tensor, group: Any) -> Tensor:
    """Stack the tensors of all ranks in the order of ranks: (ranks, *t.shape)."""
    size = dist.get_world_size(group)
    if is_compiling():  # functional collectives can be captured in a graph
        tensors = torch.ops._c10d_functional.all_gather_into_tensor(t, size, group.group_name)
        tensors = torch.ops._c10d_functional.wait_tensor(tensors)
    else:
        tensors = t.new_empty((size * t.size(0), *t.shape[1:]))
        _all_gather(tensors, t.contiguous(), group)
    return tensors.view(size, *t.shape)


def all_reduce_sum(t: Tensor, group: Any) -> Tensor:
    """The sum of t over all ranks, as a new tensor."""
    if t.is_cpu:  # Gloo's all_gather varies less than its all_reduce: NOTES.md#synchronized-batch-norm
        return all_gather(t.reshape(1, -1), group).sum(0).view_as(t)
    if is_compiling():
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(t, "sum", group.group_name))
    t = t.clone()
    dist.all_reduce(t, group=group)
    return t


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Its derivative is the sum over ranks of the gradients."""

    @staticmethod
    def forward(t: Tensor, group: Any) -> Tensor:
        return all_reduce_sum(t, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


class _Ranks:
    """The reductions that `composed_backward` needs."""

    def __init__(self, group: Any, count: Tensor) -> None:
        self.group, self.count = group, count

    def sum(self, t: Tensor) -> Tensor:
        return _SumOverRanks.apply(t, self.group)


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch norm with given statistics of the batch over all ranks, differentiated as a function of all inputs.

    `apply(input, weight, bias, batch_stats, eps, activation, activation_param, residual, group) -> output`

    Args:
        batch_stats: float64 (3, C), mean, biased variance and count of each channel over all ranks. The gradient of
            input takes into account that they depend on input: it is the gradient of the sum of all ranks' losses.
        group: the process group.
        input, weight, bias, eps, activation, activation_param, residual: as for `fastbn.BatchNormFunction`.

    The gradients of weight and bias are those of this rank's samples, as for torch.nn.SyncBatchNorm: DDP and FSDP
    average them with those of the other parameters. The backward pass can be differentiated again, by float64
    operations and more collectives.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, batch_stats: Tensor, eps: float, activation: str,
        activation_param: float | None, residual: Tensor | None, group: Any,
    ) -> Tensor:  # fmt: skip
        return ops.forward(input, weight, bias, batch_stats, eps, activation, activation_param, residual)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, batch_stats, ctx.eps, ctx.activation, ctx.activation_param, residual, ctx.group = inputs
        if ctx.activation == "identity":
            bias = residual = None  # only needed to recompute the input of an activation
        ctx.save_for_backward(input, weight, bias, batch_stats, residual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, batch_stats, residual = ctx.saved_tensors
        wants_input, wants_weight, wants_bias, *_, wants_residual, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias, grad_residual = _gradients(
            grad_output, input, weight, batch_stats, ctx.eps, (wants_input, wants_weight, wants_bias, wants_residual),
            ctx.activation, ctx.activation_param, bias, residual, ctx.group,
        )  # fmt: skip
        return grad_input, grad_weight, grad_bias, None, None, None, None, grad_residual, None


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, batch_stats: Tensor, eps: float,
    wanted: tuple[bool, bool, bool, bool], activation: str, activation_param: float | None, bias: Tensor | None,
    residual: Tensor | None, group: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of input, weight, bias and residual, None where not wanted; in double backward, differentiable ones."""
    grads: tuple[Tensor, ...]
    if torch.is_grad_enabled():
        grads = composed_backward(
            grad_output, input, weight, bias, None, eps, activation, activation_param, residual,
            _Ranks(group, batch_stats[2, 0]),
        )  # fmt: skip
    else:
        epilogue = (activation, activation_param, bias, residual)
        # Without an activation the gradient of residual is grad_output itself.
        makes_residual = wanted[3] and activation != "identity"
        if wanted[0]:
            own = ops.backward_reduce(grad_output, input, weight, batch_stats, eps, *epilogue)
            grad_input, grad_residual = ops.backward_elemt(
                grad_output, input, weight, batch_stats, all_reduce_sum(own, group), eps, makes_residual, *epilogue
            )
            grads = grad_input, *own.to(ops.param_dtype(input, weight)).unbind(), grad_residual
        else:  # the other gradients need no collective
            mask = (False, True, True, makes_residual)
            grads = ops.backward(grad_output, input, weight, batch_stats[:2], eps, False, mask, *epilogue)
        if not makes_residual:
            grads = *grads[:3], grad_output
    return [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]


def sync_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None, eps: float, group: Any,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Batch norm in training over the batch of all ranks of a process group, each of which has to call it.

    The arguments are those of `autograd.batch_norm`, and the process group. N may differ between ranks and be 0: such a
    rank takes part in the collectives and updates its running statistics too.
    """
    arguments.check_memory(
        input=input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        num_batches_tracked=num_batches_tracked, residual=residual,
    )  # fmt: skip
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    momentum, eps = arguments.check_types(input, weight, bias, running_mean, running_var, True, momentum, eps, residual)
    activations.check(activation, activation_param)
    if not is_compiling():  # there, the operators do it
        ops._C.validate(input, weight, bias, running_mean, running_var, True, eps, residual, whole_batch=False)
    if input.size(1) == 0:
        raise ValueError(f"SyncBatchNorm number of input channels should be non-zero, but input is {input.shape}")
    all_stats = all_gather(ops.stats(input.detach()), group)
    if running_mean is None and is_compiling():  # Inductor cannot compile a mutated argument that is None
        channels = all_stats.size(2)
        running_mean, running_var = all_stats.new_zeros(channels), all_stats.new_zeros(channels)
    batch_stats = ops.gather_stats(all_stats, momentum, running_mean, running_var, num_batches_tracked)
    return SyncBatchNormFunction.apply(
        input, weight, bias, batch_stats, eps, activation, activation_param, residual, group
    )
