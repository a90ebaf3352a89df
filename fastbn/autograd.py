"""In: tensors from functional.py. Out: batch norm that every kind of differentiation goes through rightly.

Eager calls take one call of the extension, whose autograd node is in C++. Everything else (torch.func, vmap, forward
AD, double backward, torch.compile, fake tensors) takes `BatchNormFunction`, which calls the same two operators.
"""

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import ops


def _per_channel(t, like):
    return t.reshape(1, -1, *[1] * (like.dim() - 2))


def _moments_of(input):
    """Mean and biased variance of the batch, differentiable."""
    axes = [i for i in range(input.dim()) if i != 1]
    wide = input.double()
    return torch.stack([wide.mean(axes), wide.var(axes, correction=0)])


def composed_forward(input, weight, bias, moments, eps):
    """The output of batch norm in torch operations on float64: what is differentiated where no kernel is."""
    mean, var = _moments_of(input) if moments is None else moments
    output = (input.double() - _per_channel(mean, input)) * _per_channel(torch.rsqrt(var + eps), input)
    if weight is not None:
        output = output * _per_channel(weight.double(), input)
    if bias is not None:
        output = output + _per_channel(bias.double(), input)
    return output.to(input.dtype)


def composed_backward(grad_output, input, weight, moments, eps):
    """Gradients of input, weight and bias in torch operations (Ioffe & Szegedy 2015, section 3)."""
    training = moments is None
    mean, var = _moments_of(input) if training else moments
    axes = [i for i in range(input.dim()) if i != 1]
    rstd = _per_channel(torch.rsqrt(var + eps), input)
    dy = grad_output.double()
    normalized = (input.double() - _per_channel(mean, input)) * rstd
    grad_bias = dy.sum(axes)
    grad_weight = (dy * normalized).sum(axes)
    grad_input = dy
    if training:
        count = input.numel() // input.size(1)
        grad_input = dy - (_per_channel(grad_bias, input) + normalized * _per_channel(grad_weight, input)) / count
    if weight is not None:
        grad_input = grad_input * _per_channel(weight.double(), input)
    dtype = ops.param_dtype(input, weight)
    return (grad_input * rstd).to(input.dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def _split(tensors):
    """Which are there, and a function that puts values for those back among the missing ones."""
    present = [t is not None for t in tensors]

    def fill(values):
        rest = iter(values)
        return tuple(next(rest) if p else None for p in present)

    return [t for t in tensors if t is not None], fill


def _fold_batch(t, dim, size, channel_dim):
    """A mapped dimension made a part of the channels: one batch norm of size * C channels is `size` of C."""
    if t is None:
        return None
    t = t.movedim(dim, channel_dim) if dim is not None else t.unsqueeze(channel_dim)
    sizes = list(t.shape)
    sizes[channel_dim] = size
    return t.expand(sizes).flatten(channel_dim, channel_dim + 1)


def _unfold_batch(t, size, channel_dim):
    return None if t is None else t.unflatten(channel_dim, (size, -1))


class BatchNormFunction(torch.autograd.Function):
    """`apply(input, weight, bias, moments, eps) -> (output, moments)`.

    Args:
        input: (N, C, ...), float32, float64, float16 or bfloat16.
        weight, bias: (C,) or None; the input's dtype, or float32 beside a half input.
        moments: None to take those of the batch (training), or float64 (2, C), mean and biased variance (eval).
        eps: added to the variance, inside the root.

    Returns the output, of the input's dtype and sizes, and the moments used, float64 (2, C), not differentiable.
    """

    @staticmethod
    def forward(input, weight, bias, moments, eps):
        return ops.forward(input, weight, bias, moments, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, moments, ctx.eps = inputs
        ctx.training = moments is None
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, weight, output[1])
        ctx.save_for_forward(input, weight, bias, moments)

    @staticmethod
    def backward(ctx, grad_output, _):
        input, weight, moments = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        grads = differentiable_backward(grad_output, input, weight, moments, ctx.eps, ctx.training, mask)
        return (*grads, None, None)

    @staticmethod
    def jvp(ctx, *tangents):
        input, weight, bias, moments = ctx.saved_tensors
        primals, fill = _split((input, weight, bias))
        given = zip((input, weight, bias), tangents[:3], strict=True)
        directions = [torch.zeros_like(p) if t is None else t for p, t in given if p is not None]

        def f(*values):
            return composed_forward(*fill(values), moments, ctx.eps)

        return torch.func.jvp(f, tuple(primals), tuple(directions))[1], None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, moments, eps):
        size = info.batch_size
        folded = [
            _fold_batch(t, d, size, c) for t, d, c in zip((input, weight, bias, moments), in_dims, (1, 0, 0, 1), strict=False)
        ]
        output, used = BatchNormFunction.apply(*folded, eps)
        return (_unfold_batch(output, size, 1), _unfold_batch(used, size, 1)), (1, 1)


class BatchNormBackward(torch.autograd.Function):
    """The gradients of batch norm by the kernel; their own derivatives by torch operations, of any order."""

    @staticmethod
    def forward(grad_output, input, weight, moments, eps, training, mask):
        grads = ops.backward(grad_output, input, weight, moments, eps, training, mask)
        return tuple(g if m else None for g, m in zip(grads, mask, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, weight, moments, ctx.eps, ctx.training, ctx.mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, moments)
        ctx.save_for_forward(grad_output, input, weight, moments)

    @staticmethod
    def _composed(ctx):
        """The composition as a function of those of (grad_output, input, weight) that are there."""
        grad_output, input, weight, moments = ctx.saved_tensors
        primals, fill = _split((grad_output, input, weight))

        def f(*values):
            grads = composed_backward(*fill(values), None if ctx.training else moments, ctx.eps)
            return tuple(g for g, m in zip(grads, ctx.mask, strict=True) if m)

        return f, primals, fill

    @staticmethod
    def backward(ctx, *cotangents):
        f, primals, fill = BatchNormBackward._composed(ctx)
        outputs, pull = torch.func.vjp(f, *primals)
        wanted = [c for c, m in zip(cotangents, ctx.mask, strict=True) if m]
        grads = pull(tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outputs, wanted, strict=True)))
        return (*fill(grads), None, None, None, None)

    @staticmethod
    def jvp(ctx, *tangents):
        f, primals, _ = BatchNormBackward._composed(ctx)
        given = zip(ctx.saved_tensors[:3], tangents[:3], strict=True)
        directions = [torch.zeros_like(p) if t is None else t for p, t in given if p is not None]
        results = iter(torch.func.jvp(f, tuple(primals), tuple(directions))[1])
        return tuple(next(results) if m else None for m in ctx.mask)

    @staticmethod
    def vmap(info, in_dims, grad_output, input, weight, moments, eps, training, mask):
        size = info.batch_size
        tensors = (grad_output, input, weight, moments)
        folded = [_fold_batch(t, d, size, c) for t, d, c in zip(tensors, in_dims, (1, 1, 0, 1), strict=False)]
        grads = BatchNormBackward.apply(*folded, eps, training, mask)
        channel_dims = [c if m else None for c, m in zip((1, 0, 0), mask, strict=True)]
        return tuple(
            _unfold_batch(g, size, c) for g, c in zip(grads, (1, 0, 0), strict=True)
        ), tuple(channel_dims)


def differentiable_backward(grad_output, input, weight, moments, eps, training, mask):
    """Gradients of input, weight and bias (None where the mask is False) that can be differentiated again."""
    return BatchNormBackward.apply(grad_output, input, weight, moments, eps, training, tuple(mask))


# torch.compile and torch.export see the operator instead of the Function, with the same derivative.
torch.library.register_autograd(
    "fastbn::forward", BatchNormFunction.backward, setup_context=BatchNormFunction.setup_context
)
ops._C.set_differentiable_backward(differentiable_backward)


def batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
    """Batch norm that also counts the batch and updates its running statistics.

    Everything is as in `fastbn.functional.batch_norm`, and num_batches_tracked (int64, 0-d, or None) is incremented.
    momentum None stands for 1 / num_batches_tracked, the cumulative average.
    """
    arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked)
    if not torch.compiler.is_compiling():
        output = ops._C.batch_norm(*arguments, training, momentum, eps)
        if output is not NotImplemented:
            return output
    if has_torch_function_variadic(*arguments):
        return handle_torch_function(batch_norm, arguments, *arguments, training, momentum, eps)
    return _watched_batch_norm(*arguments, training, momentum, eps)


def _watched_batch_norm(
    input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
):
    """The long way, of operators that torch.compile, functorch, modes and fake tensors can see."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    _check_arguments(input, weight, bias, running_mean, running_var, training, eps)
    moments = None if training else torch.stack([running_mean.flatten(), running_var.flatten()]).double()
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        output, used = ops.forward(input, weight, bias, moments, eps)
    else:
        output, used = BatchNormFunction.apply(input, weight, bias, moments, eps)
    if training and running_mean is not None and input.numel() > 0:
        if momentum is None:
            momentum = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
        count = input.numel() // input.size(1)
        with torch.no_grad():
            for running, batch in ((running_mean, used[0]), (running_var, used[1] * (count / (count - 1)))):
                running.copy_((1 - momentum) * running.double() + momentum * batch.view_as(running))
    return output


def _check_arguments(input, weight, bias, running_mean, running_var, training, eps):
    """What check_arguments in ops.cpp does, for sizes that may be symbols."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"batch_norm(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if input.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"fastbn: input is on {input.device}, and this build of fastbn has kernels for the CPU only. Move the "
            "model to the CPU, or use torch.nn's batch norm there."
        )
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{input.dtype}'")
    if input.dim() < 2:
        raise IndexError(f"fastbn: input should have at least 2 dimensions (N, C, ...), not {input.dim()}")
    channels = input.size(1)
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if channels != 0 and input.numel() == channels:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, t in given.items():
        if t is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif t.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
