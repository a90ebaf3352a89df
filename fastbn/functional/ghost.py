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

register_update_of_each("ghost_update", updated=(5, 6, 7))


def ghost_forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, ctx.virtual_batch_size, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, output[1])


def ghost_forward_backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    # In double backward, each chunk is a batch norm whose gradients can be differentiated.
    gradients = differentiable_backward_of_chunks if torch.is_grad_enabled() else ops.ghost_backward
    input, weight, moments = ctx.saved_tensors
    grads = gradients(grad_output, input, weight, moments, ctx.virtual_batch_size, ctx.eps, wanted)
    return *(g if m else None for g, m in zip(grads, wanted, strict=True)), None, None


torch.library.register_autograd("fastbn::ghost_forward", ghost_forward_backward, setup_context=ghost_forward_setup)


def differentiable_backward_of_chunks(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, virtual_batch_size: int, eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of input, weight and bias that can be differentiated again; each chunk is a batch norm."""
    full = moments.size(0) - 1
    sizes = [virtual_batch_size] * full + [input.size(0) - full * virtual_batch_size]
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
    momentum, eps = arguments.check_types(input, weight, bias, running_mean, running_var, training, momentum, eps)
    if not is_compiling():  # there, the operators do it
        ops._C.validate(input, weight, bias, running_mean, running_var, training, eps)
    if input.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return batch_norm_of_nothing(input, weight, bias)
    if not is_compiling():
        ops._C.validate_chunks(input, virtual_batch_size)
    weight, bias = (t if t is None or t.dim() == 1 else t.flatten() for t in (weight, bias))
    output, moments = ops.ghost_forward(input, weight, bias, virtual_batch_size, eps)
    if running_mean is not None or num_batches_tracked is not None:
        extent = input.size(0), math.prod(input.shape[2:]), virtual_batch_size
        ops.ghost_update(moments, *extent, momentum, running_mean, running_var, num_batches_tracked)
    return output
