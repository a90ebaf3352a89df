"""Forward, backward and statistics against float64, over dtype x layout x shape x mode: no further off than torch."""

import inputs
import pytest
import torch
from reference import check

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# (input, parameters and statistics)
TYPES = {
    "float32": (F32, F32),
    "float64": (F64, F64),
    "float16": (F16, F16),
    "bfloat16": (BF16, BF16),
    "float16 float32": (F16, F32),
    "bfloat16 float32": (BF16, F32),
}
types = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
layouts = pytest.mark.parametrize("layout", inputs.LAYOUTS, ids=lambda layout: layout.__name__)


def name(shape):
    return "x".join(map(str, shape))


# Sizes chosen for what they end on: whole vectors of 4, 8 or 16 items and every kind of tail; 7x7 and 14x14.
SMALL = [
    (2, 1), (5, 3), (3, 64), (33, 65), (7, 1000),
    (2, 3, 1), (3, 5, 2), (4, 17, 31), (2, 64, 49), (3, 5, 1000), (2, 3, 2000),
    (2, 1, 1, 1), (2, 4, 2, 2), (3, 3, 7, 7), (1, 63, 5, 3), (2, 65, 4, 4), (4, 96, 7, 7), (2, 8, 14, 14),
    (1, 3, 1, 33), (5, 1, 16, 16), (2, 7, 28, 28),
    (2, 3, 3, 5, 7), (1, 5, 2, 2, 2), (2, 16, 2, 3, 4),
    (2, 3, 2, 1, 2, 2), (2, 3, 1, 1, 1, 2, 1, 2),
]  # fmt: skip

# ResNet-50's kinds, at a size that keeps the sweep short.
NETWORK = [
    (4, 64, 56, 56),
    (8, 128, 28, 28),
    (8, 256, 14, 14),
    (4, 1024, 14, 14),
    (8, 2048, 7, 7),
    (64, 2048),
]

# One channel below, at and above the sizes that a kernel would pick for chunks and blocks of work.
BORDERS = [
    (2, 2, border + step) for border in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384) for step in (-1, 0, 1)
]


@pytest.mark.sanitize
@training
@types
@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_shapes(device, shape, types, training):
    for layout in (inputs.contiguous, inputs.channels_last):
        check(layout(shape, dtype=types[0], device=device), param_dtype=types[1], training=training)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@types
@layouts
def test_layouts(device, layout, types, training):
    for shape in [(9, 5), (4, 5, 9), (3, 5, 4, 7), (2, 33, 3, 3), (3, 3, 2, 3, 5)]:
        check(layout(shape, dtype=types[0], device=device), param_dtype=types[1], training=training)


@training
@pytest.mark.parametrize("types", [TYPES["float32"], TYPES["bfloat16 float32"]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", NETWORK, ids=name)
def test_network_shapes(device, shape, types, training):
    for layout in (inputs.contiguous, inputs.channels_last):
        check(layout(shape, dtype=types[0], device=device), param_dtype=types[1], training=training)


@training
@pytest.mark.parametrize("shape", BORDERS, ids=name)
def test_chunk_borders_along_rows(device, shape, training):
    check(inputs.contiguous(shape, device=device), training=training)
    check(inputs.offset(shape, device=device, dtype=BF16), training=training)


@training
@pytest.mark.parametrize("border", [16, 32, 64, 128, 256, 1024, 4096])
def test_chunk_borders_along_the_batch(device, border, training):
    for step in (-1, 0, 1):
        check(inputs.contiguous((border + step, 3), device=device), training=training)
        check(inputs.channels_last((border + step, 5, 2, 2), device=device), training=training)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 129])
def test_channel_counts_channels_last(device, channels):
    for dtype in (F32, BF16, F64):
        check(inputs.channels_last((3, channels, 2, 3), dtype=dtype, device=device))
        check(inputs.offset_channels_last((3, channels, 2, 3), dtype=dtype, device=device), training=False)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65])
def test_row_lengths(device, size):
    for dtype in (F32, BF16, F64):
        check(inputs.contiguous((3, 5, size), dtype=dtype, device=device))
        check(inputs.offset((2, 3, size), dtype=dtype, device=device), training=False)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("stats", [True, False], ids=["stats", "no stats"])
def test_optional_arguments(device, affine, stats, training):
    for dtype in (F32, BF16):
        check(inputs.contiguous((4, 6, 5, 5), dtype=dtype, device=device), affine=affine, stats=stats,
              training=training)  # fmt: skip


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@pytest.mark.parametrize("only", ["weight", "bias"])
def test_one_parameter(device, only, training):
    parameter = {only: torch.randn(6, device=device)}
    for layout in (inputs.contiguous, inputs.channels_last):
        check(layout((4, 6, 5, 5), device=device), affine=False, training=training, **parameter)


@pytest.mark.simt_quick
@pytest.mark.parametrize("momentum", [0.0, 1.0, -1.0, 2.0, 0.1, 0.999])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_momentum_and_eps(device, momentum, eps):
    check(inputs.contiguous((4, 6, 5, 5), device=device), momentum=momentum, eps=eps)


def regime_shapes():
    return [(8, 4, 14, 14), (3, 5, 7, 7), (2, 2, 5000), (257, 6)]


@training
@pytest.mark.parametrize("regime", inputs.REGIMES.values(), ids=inputs.REGIMES.keys())
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_regimes(device, regime, dtype, training):
    for shape in regime_shapes():
        x = regime(shape, dtype=dtype, device=device)
        check(x, training=training)
        if x.dim() == 4:
            check(x.contiguous(memory_format=torch.channels_last), training=training)


@training
@pytest.mark.parametrize("regime", ["normal", "mean 1e3", "std 1e-4", "outlier first", "ascending", "drifting"])
@pytest.mark.parametrize("types", [TYPES["float16 float32"], TYPES["bfloat16"]], ids=["float16", "bfloat16"])
def test_regimes_in_half(device, regime, types, training):
    for shape in regime_shapes():
        x = inputs.REGIMES[regime](shape, dtype=types[0], device=device)
        check(x, param_dtype=types[1], training=training)
        if x.dim() == 4:
            check(x.contiguous(memory_format=torch.channels_last), param_dtype=types[1], training=training)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_never_further_than_torch_over_many_draws(device, mean):
    """One draw can flatter; two hundred small ones show a kernel that is worse one time in ten."""
    for draw in range(200):
        torch.manual_seed(draw)
        shape = [(4, 3, 5, 5), (2, 2, 130), (19, 4), (2, 3, 7, 7)][draw % 4]
        x = inputs.around(mean, 1)(shape, dtype=F32, device=device)
        check(inputs.channels_last(shape, device=device) + mean if draw % 3 == 0 else x)


# The long sweep: every type and layout on shapes that a tensor of a real network could have.
@pytest.mark.slow
@training
@types
@layouts
def test_sweep(device, layout, types, training):
    for shape in [(6, 63, 14, 14), (16, 65, 7, 7), (3, 1000, 3, 3), (4, 3, 56, 56), (257, 1000), (5, 96, 50),
                  (2, 12, 4, 14, 14), (1, 1, 300, 301), (300, 1, 1, 1)]:  # fmt: skip
        check(layout(shape, dtype=types[0], device=device), param_dtype=types[1], training=training)


@pytest.mark.slow
@training
@pytest.mark.parametrize("regime", inputs.REGIMES.values(), ids=inputs.REGIMES.keys())
def test_regimes_at_size(device, regime, training):
    for shape in [(32, 64, 28, 28), (32, 16, 56, 56), (32, 128, 7, 7), (20000, 8), (2, 2, 140000)]:
        x = regime(shape, dtype=F32, device=device)
        check(x, training=training)
        if x.dim() == 4:
            check(x.contiguous(memory_format=torch.channels_last), training=training)
