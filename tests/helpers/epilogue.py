"""y = act(bn(x) + residual) by fastbn and by torch's functions, and how the two are judged by float64."""

import pytest
import torch
from torch import nn

from fastbn import activations
from fastbn.activations import ACTIVATIONS
from fastbn.functional import batch_norm

PARAMS = {"leaky_relu": 0.3, "elu": 0.7}
KINKS = torch.tensor([-3.0, 0, 3, 6], dtype=torch.float64)
MASKED = ("relu", "leaky_relu", "relu6")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def composed(x, mean, var, weight, bias, residual, training, activation, param, eps=1e-5):
    """The same by torch alone."""
    z = nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, eps)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation].forward(z, activations.check(activation, param))


def gradients(f, x, mean, var, weight, bias, residual, dy, *rest):
    """Output, then gradients of x, weight, bias and residual where they are there."""
    leaves = [t.detach().requires_grad_() if t is not None else None for t in (x, weight, bias, residual)]
    wanted = [t for t in leaves if t is not None]
    # a leaf made from a view keeps its strides
    y = f(leaves[0], mean.clone(), var.clone(), *leaves[1:], *rest)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def fused(x, mean, var, weight, bias, residual, training, activation, param):
    return batch_norm(
        x, mean, var, weight, bias, training, activation=activation, activation_param=param, residual=residual
    )


def check(x, activation, residual, training, ulps=None):
    """Ours and torch's composition against the composition in float64."""
    channels, dtype, device = x.size(1), x.dtype, x.device
    weight, bias, mean = torch.randn(3, channels)
    var = torch.rand(channels) + 0.5
    tensors = [x, *(t.to(device, dtype) for t in (mean, var, weight, bias))]
    tensors.append(torch.empty_like(x).copy_(torch.randn(x.shape)) if residual else None)
    dy = torch.empty_like(x).copy_(torch.randn(x.shape))
    tensors.append(dy)
    rest = training, activation, PARAMS.get(activation)
    z = composed(*(None if t is None else t.double() for t in tensors[:-1]), training, "identity", None)
    dy[((z - KINKS.to(device).view(4, *[1] * x.dim())).abs() < 1e-5).any(0)] = (
        0  # on which side of a kink rounding puts them is chance
    )
    ours = gradients(fused, *tensors, *rest)
    torchs = gradients(composed, *tensors, *rest)
    right = gradients(composed, *(None if t is None else t.double() for t in tensors), *rest)
    names = ["output", "grad_input", "grad_weight", "grad_bias", "grad_residual"]
    allowed = ulps or {torch.float64: 400}.get(dtype, 4)
    for name, found, theirs, expected in zip(names, ours, torchs, right, strict=False):
        assert found.dtype == theirs.dtype and found.shape == theirs.shape, name
        scale = expected.abs().max().item()
        if name in ("grad_weight", "grad_bias"):  # sums that cancel
            scale = max(scale, dy.double().abs().transpose(0, 1).flatten(1).sum(1).max().item())
        error, torchs_error = ((t.double() - expected).abs().max().item() for t in (found, theirs))
        assert error <= torchs_error + allowed * torch.finfo(dtype).eps * scale, (name, error, torchs_error, scale)
