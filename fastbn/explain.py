"""In: an input, or its sizes. Out: which kernel would run on it, and the bytes that it moves."""

import math
from dataclasses import dataclass, fields

import torch

from . import ops


@dataclass(frozen=True)
class Plan:
    """How batch norm would run on one tensor. Bytes are of one pass over the activation; print it as a table.

    Attributes:
        device: where it runs.
        capability: the instruction set of the kernels.
        walk: "runs" (wide maps of contiguous channels) or "columns" (channels_last, (N, C), small maps).
        items: pieces of the channel axis that threads take in turn.
        channels_an_item: channels in each of them.
        segments: pieces of the batch; with 1, the second read of an item comes from the cache.
        forward_bytes, backward_bytes: what passes between memory and caches, if only an item stays in the cache.
        least_forward_bytes, least_backward_bytes: each tensor read or written once.
        workspace_bytes: memory of its own while it runs.
    """

    device: str
    capability: str
    walk: str
    items: int
    channels_an_item: int
    segments: int
    forward_bytes: int
    least_forward_bytes: int
    backward_bytes: int
    least_backward_bytes: int
    workspace_bytes: int

    def __str__(self):
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{f.name:{width}}  {_shown(getattr(self, f.name))}" for f in fields(self))


def _shown(value):
    return f"{value:,}" if isinstance(value, int) else value


def explain(input, *, training=True):
    """The plan for batch norm of `input`, a tensor (N, C, ...) on a device with kernels; nothing is computed.

    training False: the eval forward pass, and a backward pass with constant statistics.

    Raises TypeError, IndexError, RuntimeError or ValueError for what batch norm could not take either.
    """
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"explain(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.device.type not in ("cpu", "meta"):
        raise RuntimeError(f"explain(): input is on {input.device}, and this build has kernels for the CPU only")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{input.dtype}'")
    channels_last = ops.output_format(input) != torch.contiguous_format
    plan = ops._C.plan(list(input.shape), channels_last, input.element_size())
    size = math.prod(input.shape) * input.element_size()
    again = training and plan["segments"] > 1  # x, or x and dy, come from memory twice
    return Plan(
        device=str(input.device),
        capability=ops._C.cpu_capability(),
        forward_bytes=(3 if again else 2) * size,
        least_forward_bytes=2 * size,
        backward_bytes=(5 if again else 3) * size,
        least_backward_bytes=3 * size,
        **plan,
    )
