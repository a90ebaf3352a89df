"""Ghost batch norm (Hoffer, Hubara, Soudry 2017, algorithm 1): each chunk of a batch has its own statistics.

The result is that of a batch norm called on one chunk after the other, from one call of the kernels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import arguments, ops
from ..autograd import (
    State,
    batch_norm,
    batch_norm_of_nothing,
    differentiable_backward,
    in_forward_mode,
    register_update_of_each,
)
from ..ops import is_compiling

_forward = torch.ops.fastbn.ghost_forward.default
_backward = torch.ops.fastbn.ghost_backward.default
_update = torch.ops.fastbn.ghost_update.default


def chunk_sizes(samples: int, positions: int, virtual_batch_size: int) -> tuple[int, int]:
    """The number of chunks and the samples in the last one, as `ghost_chunks` in csrc/torch/ghost.cpp computes them."""
    count = -(-samples // virtual_batch_size)
    if count > 1 and (samples - (count - 1) * virtual_batch_size) * positions == 1:
        count -= 1
    return count, samples - (count - 1) * virtual_batch_size


@torch.library.register_fake("fastbn::ghost_forward")
def _forward_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, virtual_batch_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    count, _ = chunk_sizes(input.size(0), math.prod(input.shape[2:]), virtual_batch_size)
    output = torch.empty_like(input, memory_format=ops.output_format(input))
    return output, input.new_empty((count, 2, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("fastbn::ghost_backward")
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, virtual_batch_size: int, eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = ops.param_dtype(input, weight)
    dx = ops.grad_input_like(input) if output_mask[0] else input.new_empty(0)
    grad_weight, grad_bias = (input.new_empty(input.size(1) if m else 0, dtype=dtype) for m in output_mask[1:])
    return dx, grad_weight, grad_bias


@torch.library.register_fake("fastbn::ghost_update")
def _update_fake(
    moments: Tensor, values: int, last: int, momentum: float | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None,
) -> None:  # fmt: skip
    pass


register_update_of_each("ghost_update", updated=(4, 5, 6))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, ctx.virtual_batch_size, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, output[1])


def _gradients(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    # In double backward, each chunk is a batch norm whose gradients can be differentiated.
    gradients = differentiable_backward_of_chunks if torch.is_grad_enabled() else _backward
    input, weight, moments = ctx.saved_tensors
    grads = gradients(grad_output, input, weight, moments, ctx.virtual_batch_size, ctx.eps, wanted)
    return *(g if m else None for g, m in zip(grads, wanted, strict=True)), None, None


torch.library.register_autograd("fastbn::ghost_forward", _gradients, setup_context=_setup)


def differentiable_backward_of_chunks(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, virtual_batch_size: int, eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    _, last = chunk_sizes(input.size(0), math.prod(input.shape[2:]), virtual_batch_size)
    sizes = [virtual_batch_size] * (moments.size(0) - 1) + [last]
    parts = [
        differentiable_backward(dy, x, weight, m, eps, True, (*wanted, False))[:3]
        for dy, x, m in zip(grad_output.split(sizes), input.split(sizes), moments, strict=True)
    ]
    dx, *of_parameters = zip(*parts, strict=True)
    grads = [sum(d) if m else None for d, m in zip(of_parameters, wanted[1:], strict=True)]
    return torch.cat(dx) if wanted[0] else None, *grads


def ghost_batch_norm(
    input: Tensor,
    virtual_batch_size: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ghost batch norm: normalize each chunk of virtual_batch_size samples with its own statistics, in one call.

    The chunks are those of ``input.split(virtual_batch_size)``; the last one may be smaller. Only if it has one value
    per channel, which has no variance, is it merged with the chunk before it. The running statistics are updated once
    for each chunk, in order, as by a batch norm that is called on one chunk after the other. In eval the running
    statistics are used, and virtual_batch_size has no effect.

    It can be differentiated any number of times (double backward runs chunk by chunk), but not in forward mode.

    Args:
        input: (N, C) or (N, C, ...), float32, float64, float16 or bfloat16.
        virtual_batch_size: samples in a chunk; if it is more than N, there is one chunk.
        running_mean, running_var, weight, bias, training, momentum, eps: as for `fastbn.functional.batch_norm`.

    Returns:
        A tensor with the sizes and dtype of input.

    Raises:
        TypeError, ValueError: virtual_batch_size is not a positive integer, or chunks have one value per channel.
        NotImplementedError: forward-mode AD in training.
        Exception: whatever `fastbn.functional.batch_norm` raises.
    """
    if momentum is None:
        raise TypeError("ghost_batch_norm(): argument 'momentum' must be float, not NoneType")
    check_virtual_batch_size(virtual_batch_size)
    state = weight, bias, running_mean, running_var, None, training
    return run_ghost(input, virtual_batch_size, state, momentum, eps)


def check_virtual_batch_size(size: object) -> None:
    """Raise TypeError or ValueError unless size is a positive int."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"virtual_batch_size should be an int, not {type(size).__name__}")
    if size < 1:
        raise ValueError(f"virtual_batch_size should be positive, not {size}")


def run_ghost(input: Tensor, virtual_batch_size: int, state: State, momentum: float | None, eps: float) -> Tensor:
    """Ghost batch norm for a module's state; fast path and slow path as in `autograd.batch_norm`."""
    weight, bias, running_mean, running_var, num_batches_tracked, training = state
    if training and not is_compiling():
        output = ops._C.ghost_batch_norm(input, *state[:5], momentum, eps, virtual_batch_size)
        if output is not NotImplemented:
            return output
    if has_torch_function_unary(input):
        return handle_torch_function(run_ghost, (input,), input, virtual_batch_size, state, momentum, eps)
    if not training:
        return batch_norm(input, *state, momentum, eps)
    arguments.check_memory(
        input=input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    if not is_compiling() and in_forward_mode():  # the operator's tangent would be zero
        raise NotImplementedError("ghost batch norm has no derivative in forward mode (jvp)")
    momentum, eps = arguments.check_each(input, weight, bias, running_mean, running_var, training, momentum, eps)
    arguments.check_together(input, weight, bias, running_mean, running_var, training)
    if input.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return batch_norm_of_nothing(input, weight, bias)
    positions = math.prod(input.shape[2:])
    if virtual_batch_size * positions == 1:
        raise ValueError(
            f"virtual_batch_size 1 leaves one value per channel in a chunk of an input of sizes {(*input.shape,)}"
        )
    _, last = chunk_sizes(input.size(0), positions, virtual_batch_size)
    weight, bias = (t if t is None or t.dim() == 1 else t.flatten() for t in (weight, bias))
    output, moments = _forward(input, weight, bias, virtual_batch_size, eps)
    if running_mean is not None or num_batches_tracked is not None:
        values = torch.sym_min(virtual_batch_size, input.size(0)) * positions, last * positions
        _update(moments, *values, momentum, running_mean, running_var, num_batches_tracked)
    return output
