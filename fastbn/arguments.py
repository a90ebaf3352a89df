"""Checks of arguments, which raise torch's exceptions.

The fast path in the extension accepts a call or returns NotImplemented (is_ordinary in csrc/torch/autograd.cpp); calls
that it does not accept are checked here.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops


def check_memory(**tensors: object) -> None:
    """Raise RuntimeError, with its name, for a tensor whose storage was freed or is too small for its sizes.

    The kernels check their arguments themselves. This is for tensors that torch's own operations are about to read:
    most of them do not check, and the process crashes.
    """
    if is_compiling():
        return
    for name, t in tensors.items():
        if isinstance(t, torch.Tensor):
            while torch._C._functorch.is_functorch_wrapped_tensor(t):
                t = torch._C._functorch.get_unwrapped(t)
            ops._C.check_memory(t, name)


def check_module(module: object, caller: str) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"fastbn.{caller}: expected a torch.nn.Module, got {type(module).__name__}")


def check_each(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any,
    whole: bool = True,
) -> tuple[float | None, float]:  # fmt: skip
    """Check each argument by itself, in torch's order and with torch's messages.

    Args:
        whole: input is the whole batch; False if other ranks have more of it, so that one value is no error.

    Returns:
        momentum and eps as Python numbers.
    """
    _require(isinstance(input, torch.Tensor), "input", 1, "Tensor", input)
    if training:
        count = input.shape[0] * math.prod(input.shape[2:])
        if count == 1 and whole:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for position, (name, t) in enumerate(tensors.items(), 2):
        _require(t is None or isinstance(t, torch.Tensor), name, position, "Tensor", t)
    _require(isinstance(training, bool), "training", 6, "bool", training)
    return None if momentum is None else _number(momentum, "momentum", 7), _number(eps, "eps", 8)


def check_together(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool,
) -> None:  # fmt: skip
    """Check the arguments against each other, once each of them is known to be a tensor or None."""
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    channels = input.size(1) if input.dim() > 1 else 0  # as in torch
    shared = None
    tensors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        if t is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if t.device != input.device:
            raise RuntimeError(f"batch_norm(): {name} is on device {t.device}, but input is on device {input.device}")
        if t.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
        shared = t.dtype if shared is None else shared
        half = input.dtype in (torch.float16, torch.bfloat16) and t.dtype == torch.float32
        if input.is_floating_point() and (t.dtype != shared or not (t.dtype == input.dtype or half)):
            raise RuntimeError(
                f"mixed dtype: parameters and statistics should have the dtype of input, {input.dtype}, or all be "
                f"float32 beside a half input, but {name} is {t.dtype}"
            )
        if t.requires_grad and name.startswith("running"):
            raise RuntimeError(
                "batch_norm is not differentiable with respect to running_mean and running_var: they cannot have "
                "requires_grad True"
            )
    if input.dim() < 2:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    if input.device.type not in ops.DEVICES:  # asked here because Dynamo cannot trace into the extension
        ops._C.check_device(input)


def check_residual(residual: Any, input: Tensor) -> None:
    """Check that residual is None, or a tensor with the sizes, dtype and device of input."""
    if residual is None:
        return
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"batch_norm(): argument 'residual' must be Tensor, not {type(residual).__name__}")
    for name in ("shape", "dtype", "device"):
        found, right = getattr(residual, name), getattr(input, name)
        if found != right:
            raise RuntimeError(f"batch_norm(): residual should have the {name} of input, {right}, not {found}")


def _number(value: Any, name: str, position: int) -> Any:
    """Check and return a value for a float argument of a torch function: a number, or a 0-d tensor without gradient."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.requires_grad:
        return value.item()
    _require(isinstance(value, (Real, torch.SymFloat, torch.SymInt)), name, position, "float", value)
    return value


def _require(right: bool, name: str, position: int, kind: str, value: object) -> None:
    if not right:
        found = "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"batch_norm(): argument '{name}' (position {position}) must be {kind}, not {found}")
