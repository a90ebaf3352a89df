"""Types of arguments, for the slow path: what csrc/torch/arguments.cpp, which judges all else, cannot be given."""

from numbers import Real
from typing import Any

import torch

from . import ops


def check_memory(**tensors: object) -> None:
    """Raise RuntimeError, with its name, for a tensor whose storage was freed or is too small for its sizes.

    The kernels check their arguments themselves. This is for tensors that torch's own operations are about to read:
    most of them do not check, and the process crashes.
    """
    if ops.is_compiling():
        return
    for name, t in tensors.items():
        if isinstance(t, torch.Tensor):
            while torch._C._functorch.is_functorch_wrapped_tensor(t):
                t = torch._C._functorch.get_unwrapped(t)
            ops._C.check_memory(t, name)


def check_module(module: object, caller: str) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"fastbn.{caller}: expected a torch.nn.Module, got {type(module).__name__}")


def check_types(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any,
    residual: Any = None,
) -> tuple[float | None, float]:  # fmt: skip
    """Check that each argument has a type that torch accepts for it.

    Returns:
        momentum and eps as Python numbers.
    """
    _require(isinstance(input, torch.Tensor), "input", 1, "Tensor", input)
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for position, (name, t) in enumerate(tensors.items(), 2):
        _require(t is None or isinstance(t, torch.Tensor), name, position, "Tensor", t)
    _require(isinstance(training, bool), "training", 6, "bool", training)
    if residual is not None and not isinstance(residual, torch.Tensor):
        raise TypeError(f"batch_norm(): argument 'residual' must be Tensor, not {type(residual).__name__}")
    return None if momentum is None else _number(momentum, "momentum", 7), _number(eps, "eps", 8)


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
