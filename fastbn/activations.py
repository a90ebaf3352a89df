"""The activations that batch norm can apply to its output, y = act(z), in torch operations; one row each.

The kernels' versions are in csrc/core/activation.h. Those here are the reference for tests, and are used where batch
norm is composed of torch operations (double backward, forward-mode AD).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import _C


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        forward: (z, param) -> act(z).
        derivative: (z, param) -> act'(z).
    """

    forward: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _hardswish_derivative(z: Tensor, _: float) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))


def _gelu_derivative(z: Tensor, _: float) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


# The default of the parameter of each activation; None if it has none.
DEFAULTS = _C.activations()

# Where act has a kink, the derivative is the one that torch's autograd uses: 0 for relu and relu6.
ACTIVATIONS = {
    "identity": Activation(lambda z, _: z, lambda z, _: torch.ones_like(z)),
    "relu": Activation(lambda z, _: F.relu(z), lambda z, _: torch.where(z <= 0, 0.0, 1.0).to(z.dtype)),
    "leaky_relu": Activation(F.leaky_relu, lambda z, slope: torch.where(z > 0, 1.0, torch.full_like(z, slope))),
    "relu6": Activation(lambda z, _: F.relu6(z), lambda z, _: torch.where((z <= 0) | (z >= 6), 0.0, 1.0).to(z.dtype)),
    "elu": Activation(F.elu, lambda z, alpha: torch.where(z > 0, 1.0, alpha * torch.exp(z.clamp(max=0))).to(z.dtype)),
    "silu": Activation(lambda z, _: F.silu(z), _silu_derivative),
    "hardswish": Activation(lambda z, _: F.hardswish(z), _hardswish_derivative),
    "gelu": Activation(lambda z, _: F.gelu(z), _gelu_derivative),
    "sigmoid": Activation(lambda z, _: torch.sigmoid(z), lambda z, _: torch.sigmoid(z) * torch.sigmoid(-z)),
    "tanh": Activation(lambda z, _: torch.tanh(z), lambda z, _: torch.cosh(z).square().reciprocal()),
}


def check(activation: str, param: float | None) -> float:
    """Check an activation and its parameter.

    Returns:
        The parameter's value, or its default if `param` is None; 0 if the activation has no parameter.

    Raises:
        TypeError: `activation` is not a string, or `param` is not a number.
        ValueError: there is no such activation, or it has no parameter and `param` is given.
    """
    if not isinstance(activation, str):
        raise TypeError(f"batch_norm(): argument 'activation' must be str, not {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm(): activation should be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if param is None:
        return DEFAULTS[activation] or 0.0
    if not isinstance(param, (float, Real)):
        raise TypeError(f"batch_norm(): argument 'activation_param' must be float, not {type(param).__name__}")
    if DEFAULTS[activation] is None:
        raise ValueError(f"batch_norm(): activation_param should be None for {activation}, which has none, not {param}")
    return float(param)
