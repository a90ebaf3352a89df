"""Batch norm and its gradients composed of torch operations on float64, which torch can differentiate further.

Used for double backward and forward-mode AD, and by tests as a reference.
"""

from typing import Protocol

import torch
from torch import Tensor

from . import activations, arguments, ops
from .activations import ACTIVATIONS


class Ranks(Protocol):
    """Reductions over the ranks of a process group that share a batch."""

    @property
    def count(self) -> Tensor:
        """The number of values in a channel on all ranks."""

    def sum(self, t: Tensor) -> Tensor:
        """The sum of t over all ranks, differentiable."""


def per_channel(t: Tensor, like: Tensor) -> Tensor:
    """A (C,) tensor with the dimensions of `like`, to broadcast over it."""
    return t.reshape(1, -1, *[1] * (like.dim() - 2))


def moments_of(input: Tensor, ranks: Ranks | None = None) -> Tensor:
    """Mean and biased variance of the batch, float64 (2, C), differentiable."""
    axes = [i for i in range(input.dim()) if i != 1]
    wide = input.double()
    if ranks is None:
        return torch.stack([wide.mean(axes), wide.var(axes, correction=0)])
    mean = ranks.sum(wide.sum(axes)) / ranks.count
    centred = wide - per_channel(mean, input)
    return torch.stack([mean, ranks.sum((centred * centred).sum(axes)) / ranks.count])


def _normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    output = (input.double() - per_channel(mean, input)) * per_channel(torch.rsqrt(var + eps), input)
    if weight is not None:
        output = output * per_channel(weight.double(), input)
    if bias is not None:
        output = output + per_channel(bias.double(), input)
    return output


def composed_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None, eps: float,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The output of batch norm, in the dtype of input. moments None: those of the batch; otherwise float64 (2, C)."""
    arguments.check_memory(input=input, weight=weight, bias=bias, moments=moments, residual=residual)
    mean, var = (moments_of(input) if moments is None else moments).unbind()
    z = _normalized(input, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.double()
    param = activations.check(activation, activation_param)
    return ACTIVATIONS[activation].forward(z, param).to(input.dtype)


def composed_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None, eps: float,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight, bias and residual (Ioffe & Szegedy 2015, section 3).

    Args:
        moments: None in training; otherwise the constants that forward normalized with, float64 (2, C).
        ranks: the ranks that the batch is distributed over, None for a batch of one process.
    """
    arguments.check_memory(
        grad_output=grad_output, input=input, weight=weight, bias=bias, moments=moments, residual=residual
    )
    training = moments is None
    mean, var = (moments_of(input, ranks) if moments is None else moments).unbind()
    axes = [i for i in range(input.dim()) if i != 1]
    rstd = per_channel(torch.rsqrt(var + eps), input)
    dz = grad_output.double()
    if activation != "identity":
        z = _normalized(input, weight, bias, mean, var, eps)
        if residual is not None:
            z = z + residual.double()
        param = activations.check(activation, activation_param)
        dz = dz * ACTIVATIONS[activation].derivative(z, param)
    normalized = (input.double() - per_channel(mean, input)) * rstd
    grad_bias = dz.sum(axes)
    grad_weight = (dz * normalized).sum(axes)
    grad_input, sums = dz, torch.stack([grad_weight, grad_bias])
    if weight is not None:
        grad_input, sums = grad_input * per_channel(weight.double(), input), sums * weight.double()
    if training:
        count: int | Tensor = input.numel() // input.size(1)
        if ranks is not None:
            sums, count = ranks.sum(sums), ranks.count
        dot, sum_ = (per_channel(s, input) for s in sums)
        grad_input = grad_input - (sum_ + normalized * dot) / count
    dtype = ops.param_dtype(input, weight)
    return (grad_input * rstd).to(input.dtype), grad_weight.to(dtype), grad_bias.to(dtype), dz.to(input.dtype)
