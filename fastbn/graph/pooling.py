"""Max pooling as one operator of a graph for Inductor, run by ATen.

Inductor's own code for it on CPUs takes more than twice ATen's time in a training step, and gives the gradient of a
channels_last map in contiguous layout, which the batch norm before it then copies: 4 % of a step of ResNet-18,
NOTES.md#under-torchcompile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_library = torch.library.Library("fastbn", "FRAGMENT")
_tags = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_ARGUMENTS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
_library.define(f"max_pool2d(Tensor input, {_ARGUMENTS}) -> (Tensor, Tensor)", tags=_tags)
_library.define(
    f"max_pool2d_backward(Tensor grad_output, Tensor input, {_ARGUMENTS}, Tensor indices) -> Tensor", tags=_tags
)
_forward = torch.ops.aten.max_pool2d_with_indices.default
_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


for name, function in (("max_pool2d", _forward), ("max_pool2d_backward", _backward)):
    _library.impl(name, function, "CPU")
    torch.library.register_fake(f"fastbn::{name}", function, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.arguments = inputs
    ctx.save_for_backward(input, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_output: Tensor, _: None) -> tuple[Any, ...]:
    input, indices = ctx.saved_tensors
    gradient = torch.ops.fastbn.max_pool2d_backward(grad_output, input, *ctx.arguments, indices)
    return gradient, None, None, None, None, None


torch.library.register_autograd("fastbn::max_pool2d", _differentiate, setup_context=_setup_context, lib=_library)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool2d."""
    if input.dim() != 4:
        pool: Any = F.max_pool2d  # whose annotations allow fewer sequences than it does
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    output, indices = torch.ops.fastbn.max_pool2d(
        input, *(_pair(value) for value in (kernel_size, stride or kernel_size, padding, dilation)), ceil_mode
    )
    return (output, indices) if return_indices else output


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def replace(graph: fx.Graph) -> None:
    """Let every torch.nn.functional.max_pool2d of a graph be one operator."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.max_pool2d:
            node.target = max_pool2d
