"""Calls that torch's own batch norm takes over: tensors and modes for which fastbn's operators have no rule."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .ops import is_compiling

_ORDINARY = (type(None), Tensor, nn.Parameter)


def is_torchs(input: Tensor, *others: Tensor | None) -> bool:
    """Whether torch.nn.functional.batch_norm has to compute a call with these tensors.

    That is so for a DTensor, whose sharding rules are torch's; for an mkldnn tensor, whose layout only torch's kernels
    know; within torch.func.functionalize, which has no rule for autograd.Function; under torch.jit.trace, so that what
    was traced loads where fastbn is not installed and is known to exporters and counters of operations; and where
    torch.compile compiles a transform of torch.func, for which operators with derivatives in Python have no rule.
    """
    tensors = (input, *others)
    if any(type(t) not in _ORDINARY for t in tensors) and any(isinstance(t, _dtensor()) for t in tensors):
        return True
    if is_compiling():
        return _is_transformed()
    return input.is_mkldnn or torch.jit.is_tracing() or _is_functionalized()


def _dtensor() -> Any:
    """The class, if anybody has imported it: its import takes longer than fastbn's."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, without its import of the compiler: torch.compile calls this as it
# compiles, within the transform.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_functionalized() -> bool:
    stack = torch._C._functorch.get_interpreter_stack()
    return bool(stack) and any(level.key() == torch._C._functorch.TransformType.Functionalize for level in stack)


def batch_norm_of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    param: float,
    residual: Tensor | None,
) -> Tensor:
    """fastbn.autograd.batch_norm in torch's functions, but for the count of the batch, which was added before."""
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation].forward(z if residual is None else z + residual, param)
