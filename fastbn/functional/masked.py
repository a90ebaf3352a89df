"""Batch norm of padded sequences: statistics, outputs and gradients of the valid positions alone.

The valid positions are gathered into a matrix (M, C), which the kernels normalize, and scattered back: this costs two
copies of them.
"""

import torch
from torch import Tensor

from ..arguments import check_memory
from ..autograd import State
from ..autograd import batch_norm as _batch_norm


def valid_positions(input: Tensor, mask: Tensor) -> Tensor:
    """Convert a mask, or lengths of sequences, to booleans with the sizes of input without channels.

    Args:
        input: (N, C, ...); (N, C, L) if mask has lengths.
        mask: bool (N, ...), True where valid, or int64 or int32 (N,), lengths from 0 to L.

    Raises:
        TypeError, ValueError, RuntimeError: mask has another type, size or device, or lengths are out of range.
    """
    check_memory(input=input, mask=mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask should be a tensor of booleans or of lengths, not {type(mask).__name__}")
    if mask.device != input.device:
        raise RuntimeError(f"mask is on device {mask.device}, but input is on device {input.device}")
    positions = (input.size(0), *input.shape[2:])
    if mask.dtype == torch.bool:
        if tuple(mask.shape) != positions:
            raise ValueError(f"mask should have sizes {positions}, input's without channels, not {(*mask.shape,)}")
        return mask
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"mask should be bool, or lengths of int32 or int64, not {mask.dtype}")
    if input.dim() != 3 or mask.shape != (input.size(0),):
        raise ValueError(
            f"lengths should have sizes ({input.size(0)},) beside an input (N, C, L), not {(*mask.shape,)} beside "
            f"{(*input.shape,)}"
        )
    length = input.size(2)
    if mask.numel() and not (mask.min() >= 0 and mask.max() <= length):
        least, most = mask.min().item(), mask.max().item()
        raise ValueError(f"lengths should be from 0 to {length}, but are from {least} to {most}")
    return torch.arange(length, device=input.device) < mask.unsqueeze(1)


def gather(input: Tensor, valid: Tensor) -> Tensor:
    """The values at the valid positions, (M, C)."""
    return input.movedim(1, -1)[valid]


def scatter(rows: Tensor, input: Tensor, valid: Tensor) -> Tensor:
    """The reverse of `gather`: a tensor with the sizes and strides of input, zero at the other positions."""
    output = torch.zeros_like(input).movedim(1, -1)
    return output.index_put((valid,), rows).movedim(-1, 1)


def masked_batch_norm(
    input: Tensor,
    mask: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of the valid positions of a padded batch; the output is zero at the others.

    The values in padding, NaN included, affect neither statistics, outputs nor gradients, and their gradient is zero.
    It can be differentiated any number of times. torch.compile breaks the graph, because the number of valid positions
    depends on data.

    Args:
        input: (N, C, L), or (N, C, ...) with a boolean mask.
        mask: bool (N, L) or (N, ...), True where valid; or int64 or int32 (N,), the lengths of sequences.
        running_mean, running_var, weight, bias, training, momentum, eps: as for `fastbn.functional.batch_norm`.

    Returns:
        A tensor with the sizes and dtype of input. Without valid positions it is zero, and the running statistics stay.

    Raises:
        ValueError, TypeError, RuntimeError: the mask has other sizes, another dtype or device, a length is out of
            range, or there is one valid position in training; and whatever `fastbn.functional.batch_norm` raises.
    """
    return run_masked(input, mask, (weight, bias, running_mean, running_var, None, training), momentum, eps)


def run_masked(input: Tensor, mask: Tensor, state: State, momentum: float | None, eps: float) -> Tensor:
    """Masked batch norm for a module's state."""
    valid = valid_positions(input, mask)
    return scatter(_batch_norm(gather(input, valid), *state, momentum, eps), input, valid)
