"""The cases to measure: shapes, types and layouts, the tensors of each, and the least bytes that it moves."""

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

SHAPES = {
    # So small that call overhead dominates.
    "small": [(2, 4, 2, 2), (64, 10), (1, 1, 64, 32), (8, 64, 7, 7), (32, 16, 14, 14)],
    # Shapes that kernels tuned for ResNet-50 may be slow for.
    "odd": [
        (16, 3, 64, 64),
        (32, 1, 28, 28),
        (2, 3, 224, 224),
        (16, 63, 7, 7),
        (16, 65, 14, 14),
        (4, 1000, 5, 5),
        (7, 13, 33, 31),
        (1, 32, 128, 128),
    ],
    "1d": [(128, 512), (4096, 64), (8192, 1024), (32, 100, 50), (16, 256, 1000)],
    "3d": [(8, 16, 8, 16, 16), (4, 64, 8, 28, 28), (2, 32, 16, 56, 56)],
}
# One more odd one, in the types that the other cases leave out.
ODD_TYPES = [(16, 64, 28, 28)]
# From 1e4 to 1e9 elements, two a decade, with 64 channels as in ResNet-50's first stage: batch, height = width.
SCALING = [
    (2, 9), (6, 9), (8, 14), (24, 14), (20, 28), (60, 28), (50, 56), (150, 56), (125, 112), (375, 112), (1246, 112),
]  # fmt: skip

# Suites of cases, in the order in which they are measured.
SUITES = ["resnet50", "small", "odd", "1d", "3d", "fused", "scaling"]

# Tensors of the activation's size that a pass cannot avoid to read or write: x, y; then x, dy, dx as well. With an add
# its other operand and that one's gradient, too.
PASSES = {"forward": 2, "forward+backward": 5, "eval": 2}
FUSED_PASSES = {"relu": {"forward": 2, "forward+backward": 5}, "add+relu": {"forward": 3, "forward+backward": 7}}
# On a GPU the backward pass is timed by itself: x, dy, dx.
GPU_PASSES = {"forward": 2, "backward": 3, "eval": 2}

# Tensors of the activation's size that exist at once while a case is measured: x, dy, y, dx, the target of copies, one
# that another variant has just freed, and what the check against float64 needs.
HELD = 7

MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Case:
    suite: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str  # "contiguous" or "channels_last"
    count: int = 1  # how often the network has it
    epilogue: str = ""  # what follows batch norm: "", "relu" or "add+relu"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def passes(self) -> dict[str, int]:
        """Names of the passes to time, with the tensors that each must move."""
        return FUSED_PASSES[self.epilogue] if self.epilogue else PASSES

    def fields(self) -> dict[str, object]:
        """What identifies the case in a record."""
        return {
            "suite": self.suite,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "count": self.count,
            "tensor_bytes": self.nbytes,
            **({"epilogue": self.epilogue} if self.epilogue else {}),
        }

    def __str__(self) -> str:
        fields = self.fields()
        return " ".join(filter(None, (self.suite, f"{fields['shape']}", fields["dtype"], self.layout, self.epilogue)))


def cases(suite: str, dtypes: list[torch.dtype], layouts: list[str], batch: int, largest: int = 0) -> Iterator[Case]:
    """Those of a suite. ``batch`` is for ResNet-50's shapes; ``largest`` is the most elements of scaling (0: all)."""
    if suite in ("resnet50", "fused"):
        for channels, side, count in RESNET50:
            for dtype in dtypes:
                for layout in layouts:
                    for epilogue in FUSED_PASSES if suite == "fused" else [""]:
                        yield Case(suite, (batch, channels, side, side), dtype, layout, count, epilogue)
    elif suite == "scaling":
        for dtype in dtypes:
            for images, side in SCALING:
                case = Case(suite, (images, 64, side, side), dtype, layouts[0])
                if not largest or math.prod(case.shape) <= largest:
                    yield case
    else:
        others = [d for d in (torch.float64, torch.float16) if d not in dtypes] if suite == "odd" else []
        for shapes, types in ((SHAPES[suite], dtypes), (ODD_TYPES, others)):
            for shape in shapes:
                for dtype in types:
                    for layout in layouts:
                        # with one channel, or without space, both layouts are the same bytes
                        if layout == "contiguous" or (len(shape) >= 4 and shape[1] > 1):
                            yield Case(suite, shape, dtype, layout)


def gpu_cases(dtypes: list[torch.dtype], layouts: list[str], batches: list[int]) -> Iterator[Case]:
    """The types in the order given and the largest batch first, because time may end before the cases do."""
    for dtype in dtypes:
        for layout in layouts:
            for batch in sorted(batches, reverse=True):
                yield from cases("resnet50", [dtype], [layout], batch)


@dataclass
class Tensors:
    """What a case computes with. ``module`` is torch's batch norm: every variant starts from a copy of it."""

    x: torch.Tensor
    dy: torch.Tensor
    module: nn.Module
    residual: torch.Tensor | None = None


def make_tensors(case: Case, seed: int, device: torch.device | str = "cpu") -> Tensors:
    torch.manual_seed(seed)
    how = {"dtype": case.dtype, "device": device}
    if case.layout == "contiguous":
        x, dy = (torch.randn(case.shape, **how) for _ in range(2))
    else:  # made in place: a temporary copy would change the measurement of memory
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
    residual = None
    if "add" in case.epilogue:
        residual = torch.empty_like(dy).copy_(dy.flip(0)).requires_grad_()
    return Tensors(x.requires_grad_(), dy, module, residual)
