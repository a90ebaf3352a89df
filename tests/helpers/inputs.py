"""Inputs that implementations of batch norm get wrong: memory layouts and distributions of values."""

import torch


def contiguous(shape, **kind):
    return values(shape, **kind)


def channels_last(shape, **kind):
    """Channels innermost for any rank; torch's channels_last formats at ranks 4 and 5."""
    order = [0, *range(2, len(shape)), 1]
    inverse = [order.index(i) for i in range(len(shape))]
    return values([shape[i] for i in order], **kind).permute(inverse)


def sliced(shape, **kind):
    return values([shape[0], 2 * shape[1], *shape[2:]], **kind)[:, 1::2]


def transposed(shape, **kind):
    """Batch and channels swapped in memory: dense, and neither contiguous nor channels_last."""
    return values([shape[1], shape[0], *shape[2:]], **kind).transpose(0, 1)


def cropped(shape, **kind):
    wide = values([*shape[:-1], shape[-1] + 3], **kind)
    return wide[..., 1 : 1 + shape[-1]]


def cropped_channels_last(shape, **kind):
    return channels_last([*shape[:-1], shape[-1] + 3], **kind)[..., 1 : 1 + shape[-1]]


def expanded(shape, **kind):
    return values([1, *shape[1:]], **kind).expand(shape)


def offset(shape, **kind):
    """Contiguous, from an address that is a multiple of the item's size only."""
    count = torch.Size(shape).numel()
    return values([count + 1], **kind)[1:].view(shape)


def offset_channels_last(shape, **kind):
    order = [0, *range(2, len(shape)), 1]
    inverse = [order.index(i) for i in range(len(shape))]
    return offset([shape[i] for i in order], **kind).permute(inverse)


def overlapping(shape, **kind):
    """as_strided with elements that share memory."""
    strides = [2 * len(shape) - 2 * i - 1 for i in range(len(shape))]
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return values([count], **kind).as_strided(shape, strides)


LAYOUTS = (
    contiguous,
    channels_last,
    sliced,
    transposed,
    cropped,
    cropped_channels_last,
    expanded,
    offset,
    offset_channels_last,
    overlapping,
)


def values(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


def around(mean, std):
    return lambda shape, **kind: (torch.randn(shape, dtype=torch.float64) * std + mean).to(**kind)


def constant(value):
    return lambda shape, **kind: torch.full(shape, value, **kind)


def first_element_outlier(shape, **kind):
    """Ruins every algorithm that shifts by the first element."""
    x = torch.randn(shape, dtype=torch.float64)
    x[0].view(shape[1], -1)[:, 0] = 3e4
    return x.to(**kind)


def ascending(shape, **kind):
    """Sorted within each channel: the chunks of a sum have means far apart."""
    x = torch.randn(shape[1], torch.Size(shape).numel() // shape[1], dtype=torch.float64).sort(1).values
    return x.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous().to(**kind)


def bursts(shape, **kind):
    """Mostly zeros, and a few samples a thousand times larger than the rest."""
    x = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) < 0.3)
    x[:: max(2, shape[0] // 2)] *= 1e3
    return x.to(**kind)


def drifting(shape, **kind):
    """Each sample of the batch has its own mean, from -500 to 500."""
    shift = torch.linspace(-500, 500, shape[0], dtype=torch.float64).view([-1] + [1] * (len(shape) - 1))
    return (torch.randn(shape, dtype=torch.float64) + shift).to(**kind)


REGIMES = {
    "normal": around(0, 1),
    "mean 1e3": around(1e3, 1),
    "mean 1e4": around(1e4, 1),
    "mean -1e4": around(-1e4, 1),
    "mean 1e3, std 0.01": around(1e3, 0.01),
    "mean 1, std 1e-3": around(1, 1e-3),
    "std 1e-4": around(0, 1e-4),
    "std 1e6": around(0, 1e6),
    "outlier first": first_element_outlier,
    "ascending": ascending,
    "bursts": bursts,
    "drifting": drifting,
}
