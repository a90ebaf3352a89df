"""Batch norm of padded sequences: statistics, outputs and gradients of the valid positions alone.

In: (N, C, ...) and which positions are valid. Out: the same sizes, zero where they are not. The valid positions are
gathered into a matrix (M, C), which the kernels normalize as any other, and scattered back: two copies of them.
"""

import torch
from torch import Tensor

from ..arguments import check_memory
from ..autograd import State
from ..autograd import batch_norm as _batch_norm


def valid_positions(input: Tensor, mask: Tensor) -> Tensor:
    """mask as booleans (N, ...), True where valid, from those or from int64/int32 lengths (N,). Raises if it is none.

    Lengths count positions of the last dimension of an input (N, C, L).
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
    """The valid positions of input, (M, C)."""
    return input.movedim(1, -1)[valid]


def scatter(rows: Tensor, input: Tensor, valid: Tensor) -> Tensor:
    """The reverse: of the sizes and strides of input, zero elsewhere."""
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
    """`fastbn.functional.batch_norm` of the valid positions of a padded batch; the others are zero in the output.

    What padding holds (NaN too) changes neither statistics, outputs, running statistics nor gradients, and its own
    gradient is zero. Differentiable as often as batch norm is. torch.compile cannot know how many positions are valid:
    its graph breaks there.

    Args:
        input: (N, C, L), or (N, C, ...) with a mask.
        mask: bool (N, L) or (N, ...), True where valid; or int64 or int32 (N,), the lengths of sequences.
        others: as for `fastbn.functional.batch_norm`.

    Returns:
        A tensor of input's sizes and dtype.

    Raises:
        ValueError, TypeError, RuntimeError: a mask of other sizes, dtype or device, lengths beyond L, one valid
            position in training; and what `fastbn.functional.batch_norm` raises. A batch without valid positions is no
            error: the output is zero, and the running statistics stay.
    """
    return run_masked(input, mask, (weight, bias, running_mean, running_var, None, training), momentum, eps)


def run_masked(input: Tensor, mask: Tensor, state: State, momentum: float | None, eps: float) -> Tensor:
    valid = valid_positions(input, mask)
    return scatter(_batch_norm(gather(input, valid), *state, momentum, eps), input, valid)
