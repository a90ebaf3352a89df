"""The cases to measure: shapes, types and layouts flow out, and the tensors of each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# The 53 batch norms of ResNet-50 (v1.5, 224 x 224 images): channels, height = width, how many.
RESNET50 = [
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
]

# Shapes that a kernel tuned on ResNet-50 may be slow on.
ODD = [
    (2, 4, 2, 2),  # the time of a call and nothing else
    (64, 10),
    (128, 512),
    (4096, 64),
    (1, 1, 64, 32),
    (16, 3, 64, 64),
    (32, 1, 28, 28),
    (2, 3, 224, 224),
    (16, 63, 7, 7),
    (16, 65, 14, 14),
    (4, 1000, 5, 5),
    (7, 13, 33, 31),
    (1, 32, 128, 128),
    (32, 100, 50),
    (8, 16, 8, 16, 16),
]
# One more, in the types that the ResNet-50 cases leave out.
ODD_TYPES = [(16, 64, 28, 28)]

# Tensors of the activation's size that a pass cannot avoid to read or write: x, y; then x, dy, dx as well.
PASSES = {"forward": 2, "forward+backward": 5, "eval": 2}
# On a GPU the backward pass is timed by itself: x, dy, dx.
GPU_PASSES = {"forward": 2, "backward": 3, "eval": 2}

MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Case:
    suite: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str  # "contiguous" or "channels_last"
    count: int = 1  # how often the network has it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def fields(self) -> dict[str, object]:
        """What identifies the case in a record."""
        return {
            "suite": self.suite,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "count": self.count,
            "tensor_bytes": self.nbytes,
        }

    def __str__(self) -> str:
        fields = self.fields()
        return f"{fields['shape']} {fields['dtype']} {fields['layout']}"


def cases(suites: list[str], dtypes: list[torch.dtype], layouts: list[str], batch: int) -> Iterator[Case]:
    if "resnet50" in suites:
        for channels, side, count in RESNET50:
            for dtype in dtypes:
                for layout in layouts:
                    yield Case("resnet50", (batch, channels, side, side), dtype, layout, count)
    if "fused" in suites:
        for channels, side, count in RESNET50:
            for dtype in dtypes:
                for layout in layouts:
                    yield Case("fused", (batch, channels, side, side), dtype, layout, count)
    if "odd" in suites:
        others = [d for d in (torch.float64, torch.float16) if d not in dtypes]
        for shapes, types in ((ODD, dtypes), (ODD_TYPES, others)):
            for shape in shapes:
                for dtype in types:
                    for layout in layouts:
                        # with one channel, or without space, both layouts are the same bytes
                        if layout == "contiguous" or (len(shape) >= 4 and shape[1] > 1):
                            yield Case("odd", shape, dtype, layout)


def gpu_cases(dtypes: list[torch.dtype], layouts: list[str], batches: list[int]) -> Iterator[Case]:
    """The types in the order given and the largest batch first, because time may end before the cases do."""
    for dtype in dtypes:
        for layout in layouts:
            for batch in sorted(batches, reverse=True):
                yield from cases(["resnet50"], [dtype], [layout], batch)


@dataclass
class Tensors:
    """What a case computes with. ``module`` is torch's batch norm: every variant starts from a copy of it."""

    x: torch.Tensor
    dy: torch.Tensor
    module: nn.Module


def make_tensors(case: Case, seed: int, device: torch.device | str = "cpu") -> Tensors:
    torch.manual_seed(seed)
    how = {"dtype": case.dtype, "device": device}
    if case.layout == "contiguous":
        x, dy = (torch.randn(case.shape, **how) for _ in range(2))
    else:  # made in place: a copy on the way would hide what the measurement of memory looks for
        batch, channels, *space = case.shape
        x, dy = (torch.randn(batch, *space, channels, **how).movedim(-1, 1) for _ in range(2))

    # parameters of half types stay in float32, as autocast trains
    parameter_type = torch.float64 if case.dtype == torch.float64 else torch.float32
    module = MODULES[len(case.shape)](case.shape[1], dtype=parameter_type, device=device)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
        module.bias.normal_()
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return Tensors(x.requires_grad_(), dy, module)
