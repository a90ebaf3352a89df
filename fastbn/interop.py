"""Calls that torch's own batch norm computes: tensors and modes for which fastbn's operators have no rule."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .ops import is_compiling

_EXACT_TYPES = (type(None), Tensor, nn.Parameter)


def is_torchs(input: Tensor, *others: Tensor | None) -> bool:
    """Whether torch.nn.functional.batch_norm has to compute a call with these tensors.

    It does for

    - a DTensor: the sharding rules are torch's;
    - an mkldnn tensor: only torch's kernels know its layout;
    - torch.func.functionalize: it has no rule for autograd.Function;
    - torch.jit.trace: the traced model then loads without fastbn, and exporters and FLOP counters know its operators;
    - a transform of torch.func that torch.compile compiles: it has no rule for operators with derivatives in Python.
    """
    tensors = (input, *others)
    if any(type(t) not in _EXACT_TYPES for t in tensors) and any(isinstance(t, _dtensor()) for t in tensors):
        return True
    if is_compiling():
        return _is_transformed()
    return input.is_mkldnn or torch.jit.is_tracing() or _is_functionalized()


def _dtensor() -> Any:
    """The class DTensor if it is imported already (importing it takes longer than importing fastbn), else ()."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# As torch.compiler.assume_constant_result does, without importing the compiler: Dynamo calls the function while it
# traces, within the transform, and takes the result for a constant.
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
    """fastbn.autograd.batch_norm by torch.nn.functional; num_batches_tracked has been incremented already."""
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation].forward(z if residual is None else z + residual, param)
