"""In: an input. Out: which kernels would run on it, how, and the bytes that they move."""

import math
from dataclasses import dataclass, fields

import torch

from . import ops


@dataclass(frozen=True)
class _Table:
    def __str__(self) -> str:
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{f.name:{width}}  {_shown(getattr(self, f.name))}" for f in fields(self))


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "  ".join(f"{_shown(v):>13}" for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Plan(_Table):
    """How batch norm would run on one tensor on the CPU. Bytes are of one pass over it; print it as a table.

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


@dataclass(frozen=True)
class CudaPlan(_Table):
    """How batch norm would run on one tensor on a GPU; print it as a table. Pairs are (forward, backward).

    Attributes:
        device: where it runs.
        strategy: "resident" (one kernel, which reads each tensor once) or "streaming" (two kernels; the second reads
            the input again).
        walk: "rows" (an item is one channel) or "columns" (an item is some neighbouring channels of each row).
        vector: elements in one access: 16 bytes of them, or 1.
        threads: in a block.
        items: pieces of the channel axis.
        channels_an_item: channels in each of them.
        blocks_an_item: blocks that share an item.
        groups: resident: items in work at the same time.
        waves: resident: rounds of groups.
        blocks: in the grid.
        shared_bytes: shared memory of a block.
        bytes: what passes between the chip and its memory.
        least_bytes: each tensor read or written once.
        workspace_bytes: memory of its own while it runs.
    """

    device: str
    strategy: tuple[str, str]
    walk: tuple[str, str]
    vector: tuple[int, int]
    threads: tuple[int, int]
    items: tuple[int, int]
    channels_an_item: tuple[int, int]
    blocks_an_item: tuple[int, int]
    groups: tuple[int, int]
    waves: tuple[int, int]
    blocks: tuple[int, int]
    shared_bytes: tuple[int, int]
    bytes: tuple[int, int]
    least_bytes: tuple[int, int]
    workspace_bytes: tuple[int, int]


def explain(input: torch.Tensor, *, training: bool = True) -> Plan | CudaPlan:
    """The plan for batch norm of `input`, a tensor (N, C, ...) on a device with kernels; nothing is computed.

    training False: the eval forward pass, and a backward pass with constant statistics.

    Returns a Plan, or a CudaPlan for a tensor on a GPU.

    Raises TypeError, IndexError, RuntimeError or ValueError for what batch norm could not take either.
    """
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"explain(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.device.type not in ops.DEVICES:
        ops._C.check_device(input)
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{input.dtype}'")
    sizes, channels_last = list(input.shape), ops.output_format(input) != torch.contiguous_format
    if input.is_cuda or (input.is_cpu and ops.SIMULATED):
        return _explain_cuda(input, sizes, channels_last, training)
    plan = ops._C.plan(sizes, channels_last, input.element_size())
    size = math.prod(sizes) * input.element_size()
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


def _explain_cuda(input: torch.Tensor, sizes: list[int], channels_last: bool, training: bool) -> CudaPlan:
    # a tensor that is in no order that kernels know is copied to fresh, aligned memory
    dense = input.is_contiguous(memory_format=ops.output_format(input))
    aligned = not dense or input.data_ptr() % 16 == 0
    device = ops._C.cuda_device(input)
    plans = [
        ops._C.cuda_plan(sizes, channels_last, input.element_size(), name, training, aligned, device)
        for name in ("forward", "backward")
    ]
    names = [f.name for f in fields(CudaPlan) if f.name != "device"]
    return CudaPlan(device=str(input.device), **{name: tuple(plan[name] for plan in plans) for name in names})
