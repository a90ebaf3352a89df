"""Batch norm under every kind of differentiation.

`batch_norm` has a fast path, one call of the extension, whose autograd node is in C++. Everything else (torch.func,
vmap, forward-mode AD, double backward, torch.compile, fake tensors) takes the slow path through `BatchNormFunction`,
which calls the operators fastbn::forward and fastbn::backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import activations, arguments, interop, ops
from .activations import ACTIVATIONS
from .composed import composed_backward, composed_forward, moments_of
from .ops import is_compiling

# weight, bias, running_mean, running_var, num_batches_tracked, and whether to normalize with the batch's statistics.
State: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]


def merge_batch_dim(t: Any, dim: int | None, size: int, channel_dim: int) -> Any:
    """Merge the dimension that vmap maps into the channels: `size` batch norms of C channels are one of size * C.

    None stays None.
    """
    if t is None:
        return None
    t = t.movedim(dim, channel_dim) if dim is not None else t.unsqueeze(channel_dim)
    sizes = list(t.shape)
    sizes[channel_dim] = size
    return t.expand(sizes).flatten(channel_dim, channel_dim + 1)


def split_batch_dim(t: Tensor | None, size: int, channel_dim: int) -> Tensor | None:
    """The reverse of `merge_batch_dim`: the mapped dimension comes before the channels."""
    return None if t is None else t.unflatten(channel_dim, (size, -1))


def in_forward_mode() -> bool:
    """Whether the caller is within a dual level of torch.autograd.forward_ad or torch.func.jvp.

    Batch norm is composed of torch operations then, whose tangents torch knows under every other transformation.
    """
    return forward_ad._current_level >= 0


class BatchNormFunction(torch.autograd.Function):
    """Batch norm without running statistics, as a torch.autograd.Function.

    `apply(input, weight, bias, moments, eps, activation="identity", activation_param=None, residual=None)`

    Args:
        input: (N, C, ...), float32, float64, float16 or bfloat16.
        weight, bias: (C,) or None, in the dtype of input; float32 is possible for a half-precision input.
        moments: None to use the moments of the batch (training), or float64 (2, C), mean and biased variance (eval).
        eps: added to the variance, under the square root.
        activation, activation_param, residual: as for `fastbn.functional.batch_norm`.

    Returns:
        The output, with the sizes and dtype of input, and the moments that were used, float64 (2, C), which are not
        differentiable.
    """

    @classmethod
    def apply(
        cls, input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None, eps: float,
        activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        epilogue = (activation, activation_param, residual)
        if not in_forward_mode():
            return super().apply(input, weight, bias, moments, eps, *epilogue)
        output = composed_forward(input, weight, bias, moments, eps, *epilogue)
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            return output, moments_of(input) if moments is None else moments.clone()

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None, eps: float, activation: str,
        activation_param: float | None, residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return ops.forward(input, weight, bias, moments, eps, activation, activation_param, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, weight, bias, moments, ctx.eps, *epilogue = inputs
        ctx.activation, ctx.activation_param, residual = epilogue
        ctx.training = moments is None
        ctx.mark_non_differentiable(output[1])
        ctx.has_residual = residual is not None
        if ctx.activation == "identity":
            bias = residual = None  # only needed to recompute the input of an activation
        ctx.save_for_backward(input, weight, bias, output[1], residual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, moments, residual = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3], ctx.has_residual and ctx.needs_input_grad[7]]
        *grads, grad_residual = differentiable_backward(
            grad_output, input, weight, moments, ctx.eps, ctx.training, wanted, ctx.activation, ctx.activation_param,
            bias, residual,
        )  # fmt: skip
        return *grads, None, None, None, None, grad_residual

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor | None, bias: Tensor | None,
        moments: Tensor | None, eps: float, activation: str, activation_param: float | None, residual: Tensor | None,
    ) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:  # fmt: skip
        size = info.batch_size
        input, weight, bias, moments, residual = (
            merge_batch_dim(t, d, size, c)
            for t, d, c in zip(
                (input, weight, bias, moments, residual), (*in_dims[:4], in_dims[7]), (1, 0, 0, 1, 1), strict=True
            )
        )
        output, used = BatchNormFunction.apply(
            input, weight, bias, moments, eps, activation, activation_param, residual
        )
        return (split_batch_dim(output, size, 1), split_batch_dim(used, size, 1)), (1, 1)


class BatchNormBackward(torch.autograd.Function):
    """The gradients of batch norm by the kernels. Their derivatives, of any order, are composed of torch operations."""

    @classmethod
    def apply(
        cls, grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, eps: float, training: bool,
        wanted: Sequence[bool], activation: str, activation_param: float | None, bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        epilogue = (activation, activation_param, bias, residual)
        if not in_forward_mode():
            return super().apply(grad_output, input, weight, moments, eps, training, wanted, *epilogue)
        grads = composed_backward(
            grad_output, input, weight, bias, None if training else moments, eps, activation, activation_param, residual
        )
        return tuple(g if m else None for g, m in zip(grads, wanted, strict=True))

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, eps: float, training: bool,
        wanted: Sequence[bool], activation: str, activation_param: float | None, bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        grads = ops.backward(
            grad_output, input, weight, moments, eps, training, wanted, activation, activation_param, bias, residual
        )
        return tuple(g if m else None for g, m in zip(grads, wanted, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, input, weight, moments, ctx.eps, ctx.training, ctx.wanted, *epilogue = inputs
        ctx.activation, ctx.activation_param, bias, residual = epilogue
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, moments, bias, residual)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight, moments, bias, residual = ctx.saved_tensors
        given = {"grad_output": grad_output, "input": input, "weight": weight, "bias": bias, "residual": residual}
        given = {name: t for name, t in given.items() if t is not None}

        def f(*primals: Tensor) -> tuple[Tensor, ...]:
            tensors: dict[str, Any] = {"weight": None, "bias": None, "residual": None}
            tensors.update(zip(given, primals, strict=True))
            grads = composed_backward(
                **tensors, moments=None if ctx.training else moments, eps=ctx.eps, activation=ctx.activation,
                activation_param=ctx.activation_param,
            )  # fmt: skip
            return tuple(g for g, m in zip(grads, ctx.wanted, strict=True) if m)

        outputs, pull, *_ = torch.func.vjp(f, *given.values())
        wanted = [c for c, m in zip(cotangents, ctx.wanted, strict=True) if m]
        pulled = pull(tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outputs, wanted, strict=True)))
        grads = dict(zip(given, pulled, strict=True))
        return (
            grads["grad_output"], grads["input"], grads.get("weight"), None, None, None, None, None, None,
            grads.get("bias"), grads.get("residual"),
        )  # fmt: skip

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, input: Tensor, weight: Tensor | None,
        moments: Tensor, eps: float, training: bool, wanted: Sequence[bool], activation: str,
        activation_param: float | None, bias: Tensor | None, residual: Tensor | None,
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:  # fmt: skip
        size = info.batch_size
        dims = (*in_dims[:4], *in_dims[9:])
        tensors = (grad_output, input, weight, moments, bias, residual)
        grad_output, input, weight, moments, bias, residual = (
            merge_batch_dim(t, d, size, c) for t, d, c in zip(tensors, dims, (1, 1, 0, 1, 0, 1), strict=True)
        )
        grads = BatchNormBackward.apply(
            grad_output, input, weight, moments, eps, training, wanted, activation, activation_param, bias, residual
        )
        axes = (1, 0, 0, 1)
        split = tuple(split_batch_dim(g, size, c) for g, c in zip(grads, axes, strict=True))
        return split, tuple(c if m else None for c, m in zip(axes, wanted, strict=True))


def differentiable_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, eps: float, training: bool,
    wanted: Sequence[bool], activation: str = "identity", activation_param: float | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of input, weight, bias and residual that can be differentiated again; None where they are not wanted.

    bias and residual have to be given only if there is an activation.
    """
    if activation == "identity":
        # the gradient of residual is grad_output itself
        grads = BatchNormBackward.apply(
            grad_output, input, weight, moments, eps, training, (*wanted[:3], False), activation, None, None, None
        )
        return *grads[:3], grad_output if wanted[3] else None
    return BatchNormBackward.apply(
        grad_output, input, weight, moments, eps, training, tuple(wanted), activation, activation_param, bias, residual
    )


# torch.compile and torch.export see the operator instead of the Function, with the same derivative.
torch.library.register_autograd(
    "fastbn::forward", BatchNormFunction.backward, setup_context=BatchNormFunction.setup_context
)


def register_update_of_each(name: str, updated: Sequence[int]) -> None:
    """Register vmap of an operator that updates statistics: it is called once for each element of the mapped dimension.

    Args:
        updated: the positions of the arguments that the operator writes to.
    """

    @torch.library.register_vmap(f"fastbn::{name}")
    def update_each(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[None, None]:
        if any(arguments[k] is not None and in_dims[k] is None for k in updated):
            raise RuntimeError(
                "Batch norm got a batched tensor as input while the running_mean or running_var, which will be updated "
                "in place, were not batched.\nIf you are using a module and do not need eval mode, please set "
                "`track_running_stats` to be False."
            )
        update = getattr(torch.ops.fastbn, name).default
        for i in range(info.batch_size):
            update(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        return None, None


register_update_of_each("update_running_stats", updated=(3, 4))


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `fastbn.functional.batch_norm`; also increments num_batches_tracked (int64, 0-d, or None).

    momentum None stands for 1 / num_batches_tracked: running statistics are cumulative averages.
    """
    if not is_compiling():
        output = ops._C.batch_norm(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, activation,
            activation_param, residual,
        )  # fmt: skip
        if output is not NotImplemented:
            return output
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked)
    epilogue = (activation, activation_param, residual)
    if has_torch_function_variadic(*tensors, residual):
        return handle_torch_function(batch_norm, (*tensors, residual), *tensors, training, momentum, eps, *epilogue)
    return _slow_path(*tensors, training, momentum, eps, *epilogue)


def _slow_path(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float,
    activation: str, activation_param: float | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Validate the call and compute it by operators, which torch.compile, functorch and dispatch modes see."""
    arguments.check_memory(
        input=input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        num_batches_tracked=num_batches_tracked, residual=residual,
    )  # fmt: skip
    try:
        momentum, eps = arguments.check_types(
            input, weight, bias, running_mean, running_var, training, momentum, eps, residual
        )
        param = activations.check(activation, activation_param)
        by_torch = interop.is_torchs(input, weight, bias, running_mean, running_var)
        if not is_compiling():  # there, the operator does it
            ops._C.validate(
                input, weight, bias, running_mean, running_var, training, eps, residual, by_kernels=not by_torch
            )
    except Exception:
        _count_batch(num_batches_tracked)  # torch's modules count a batch before they check it
        raise
    if by_torch:
        _count_batch(num_batches_tracked)
        return interop.batch_norm_of_torch(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, activation,
            param, residual,
        )  # fmt: skip
    rest = (training, momentum, eps, activation, activation_param, residual)
    if is_compiling():  # captured as one node
        return ops.batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, *rest)
    forward = BatchNormFunction.apply
    return _by_operators(forward, input, weight, bias, running_mean, running_var, num_batches_tracked, *rest)


def batch_norm_op(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The operator fastbn::batch_norm: a whole batch norm, which `graph.matching` finds as one node of a graph."""
    ops._C.validate(input, weight, bias, running_mean, running_var, training, eps, residual)
    rest = (training, momentum, eps, activation, activation_param, residual)
    return _by_operators(ops.forward, input, weight, bias, running_mean, running_var, num_batches_tracked, *rest)


ops.implement("batch_norm", batch_norm_op)


def _by_operators(
    forward: Callable[..., tuple[Tensor, Tensor]], input: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool,
    momentum: float | None, eps: float, activation: str, activation_param: float | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """A valid batch norm. forward: the operator fastbn::forward, or `BatchNormFunction.apply`."""
    weight, bias = (t if t is None or t.dim() == 1 else t.flatten() for t in (weight, bias))
    if input.numel() == 0:
        _count_batch(num_batches_tracked)
        z = batch_norm_of_nothing(input, weight, bias)
        param = activations.check(activation, activation_param)
        return ACTIVATIONS[activation].forward(z if residual is None else z + residual, param)
    moments = None
    if not training:
        assert running_mean is not None and running_var is not None  # validated
        moments = torch.stack([running_mean.flatten(), running_var.flatten()]).double()
    output, used = forward(input, weight, bias, moments, eps, activation, activation_param, residual)
    # Both updates stay together, after forward: torch.utils.checkpoint stops a recomputation at the last tensor that is
    # saved for backward, which may be one that forward saves.
    _count_batch(num_batches_tracked)
    if training and running_mean is not None:
        count = input.numel() // input.size(1)
        ops.update_running_stats(used, count, momentum, running_mean, running_var, num_batches_tracked)
    return output


def _count_batch(num_batches_tracked: Tensor | None) -> None:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def batch_norm_of_nothing(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Batch norm of an input without elements, as torch has it.

    Gradients of the parameters are zeros; parameters without elements are an IndexError.
    """
    output = input.clone()
    if weight is not None:
        output = output * weight.select(0, 0)
    if bias is not None:
        output = output + bias.select(0, 0)
    return output
