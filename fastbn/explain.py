"""Which kernels would run for a tensor, with which geometry, and how many bytes they move."""

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
    """How batch norm would run on one tensor on the CPU; print it as a table.

    Attributes:
        device: the device of the tensor.
        capability: the instruction set of the kernels: baseline, avx2 or avx512.
        access_pattern: "rows" (a channel is contiguous rows: large maps in contiguous layout) or "columns" (channels
            are adjacent: channels_last, (N, C), small maps).
        channel_tiles: the number of channel tiles, which the threads share.
        channels_per_tile: channels in a tile.
        batch_splits: parts that the batch is split into. With 1, the second read of a tile comes from the cache.
        forward_bytes, backward_bytes: memory traffic of a pass if only one tile at a time stays in the cache.
        least_forward_bytes, least_backward_bytes: memory traffic if each tensor is read or written once.
        workspace_bytes: scratch memory.
    """

    device: str
    capability: str
    access_pattern: str
    channel_tiles: int
    channels_per_tile: int
    batch_splits: int
    forward_bytes: int
    least_forward_bytes: int
    backward_bytes: int
    least_backward_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class CudaPlan(_Table):
    """How batch norm would run on one tensor on a GPU; print it as a table. Pairs are (forward, backward).

    Attributes:
        device: the device of the tensor.
        strategy: "resident" (one kernel, which reads each tensor once and keeps it in shared memory) or "streaming"
            (two kernels; the second reads the input again).
        access_pattern: "rows" (a tile is one channel) or "columns" (a tile is some adjacent channels).
        vector: elements of one memory access: as many as 16 bytes hold, or 1.
        threads: threads in a block.
        channel_tiles: the number of channel tiles.
        channels_per_tile: channels in a tile.
        batch_splits: parts that the batch of a tile is split into, a block each.
        groups: (resident) tiles that are processed at the same time.
        waves: (resident) how often a group takes a new tile.
        blocks: blocks in the grid.
        shared_bytes: shared memory of a block.
        bytes: traffic between the GPU and its memory.
        least_bytes: traffic if each tensor is read or written once.
        workspace_bytes: scratch memory.
    """

    device: str
    strategy: tuple[str, str]
    access_pattern: tuple[str, str]
    vector: tuple[int, int]
    threads: tuple[int, int]
    channel_tiles: tuple[int, int]
    channels_per_tile: tuple[int, int]
    batch_splits: tuple[int, int]
    groups: tuple[int, int]
    waves: tuple[int, int]
    blocks: tuple[int, int]
    shared_bytes: tuple[int, int]
    bytes: tuple[int, int]
    least_bytes: tuple[int, int]
    workspace_bytes: tuple[int, int]


def explain(input: torch.Tensor, *, training: bool = True) -> Plan | CudaPlan:
    """Show how batch norm would run on a tensor. Nothing is computed.

    Args:
        input: (N, C, ...), on a device that fastbn has kernels for.
        training: False for the eval forward pass, and the backward pass with constant statistics.

    Returns:
        A Plan for a tensor on the CPU, a CudaPlan for one on a GPU.

    Raises:
        TypeError, IndexError, RuntimeError, ValueError, NotImplementedError: batch norm does not accept `input` either.
    """
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"explain(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.device.type not in ops.DEVICES:
        ops._C.check_device(input)
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{input.dtype}'")
    sizes, channels_last = list(input.shape), ops._C.output_format(input) != torch.contiguous_format
    if input.is_cuda or (input.is_cpu and ops.SIMULATED):
        return _explain_cuda(input, sizes, channels_last, training)
    plan = ops._C.plan(sizes, channels_last, input.element_size())
    size = math.prod(sizes) * input.element_size()
    reads_twice = training and plan["batch_splits"] > 1  # x, and dy in backward, come from memory again
    return Plan(
        device=str(input.device),
        capability=ops._C.cpu_capability(),
        forward_bytes=(3 if reads_twice else 2) * size,
        least_forward_bytes=2 * size,
        backward_bytes=(5 if reads_twice else 3) * size,
        least_backward_bytes=3 * size,
        **plan,
    )


def _explain_cuda(input: torch.Tensor, sizes: list[int], channels_last: bool, training: bool) -> CudaPlan:
    # A tensor that is neither contiguous nor channels_last is copied first, to memory that is aligned.
    dense = input.is_contiguous(memory_format=ops._C.output_format(input))
    aligned = not dense or input.data_ptr() % 16 == 0
    device = ops._C.cuda_device(input)
    plans = [
        ops._C.cuda_plan(sizes, channels_last, input.element_size(), name, training, aligned, device)
        for name in ("forward", "backward")
    ]
    names = [f.name for f in fields(CudaPlan) if f.name != "device"]
    return CudaPlan(device=str(input.device), **{name: tuple(plan[name] for plan in plans) for name in names})
