"""The planner of the CUDA kernels, for GPUs that are not there: plans cover every element once and fit the GPU."""

import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastbn._C import cuda_plan

KB = 1024
COUNTER_BYTES, BARRIER_BYTES = 64 * KB, 32  # cuda/plan.h
REGISTERS_A_THREAD = 64  # cuda/plan.h
LARGEST_GRID = 2**31 - 1
LARGEST_TENSOR = 2**56  # elements; 8 bytes each, five times over, can still be counted


def gpu(multiprocessors, shared, block, bandwidth, threads=2048, cooperative=True):
    return {
        "multiprocessors": multiprocessors,
        "shared_per_multiprocessor": shared,
        "shared_per_block": block,
        "shared_reserved": KB,
        "registers_per_multiprocessor": 64 * KB,
        "threads_per_multiprocessor": threads,
        "cooperative": cooperative,
        "bytes_per_microsecond": bandwidth,
    }


GPUS = {
    "H200": gpu(132, 228 * KB, 227 * KB, 4_300_000),
    "H100": gpu(132, 228 * KB, 227 * KB, 3_000_000),
    "A100": gpu(108, 164 * KB, 163 * KB, 1_800_000),
    "L4": gpu(58, 100 * KB, 99 * KB, 270_000, threads=1536),
    "MIG 1g of an H100": gpu(16, 228 * KB, 227 * KB, 400_000),
    "H200 without cooperative launches": gpu(132, 228 * KB, 227 * KB, 4_300_000, cooperative=False),
    "V100, bandwidth unknown": gpu(80, 96 * KB, 96 * KB, 0),
    "one multiprocessor": gpu(1, 64 * KB, 48 * KB, 100_000),
}

# Channels and sides of the twelve batch norm shapes of ResNet-50 at 224 x 224.
RESNET50 = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
    (512, 7), (2048, 7),
]  # fmt: skip

bounded = settings(deadline=None, derandomize=True, max_examples=400, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


def ceil_div(a, b):
    return -(-a // b)


@st.composite
def cases(draw):
    """Arguments of cuda_plan: mostly sizes as networks have them, some at the borders of 32 and of 64 bits."""
    batch = draw(st.one_of(st.integers(1, 512), st.sampled_from([65535, 65536, 131072, 2**31 - 1, 2**33])))
    channels = draw(st.one_of(st.integers(1, 2100), st.sampled_from([3, 63, 65, 1000, 4096, 70000, 2**20])))
    side = draw(st.one_of(st.sampled_from([1, 2, 7, 14, 28, 56, 112]), st.integers(1, 130)))
    sizes = [batch, channels, *([side] * draw(st.integers(0, 2)))]
    while math.prod(sizes) > LARGEST_TENSOR:
        sizes[0] //= 2
    return (
        sizes,
        draw(st.booleans()),
        draw(st.sampled_from([2, 4, 8])),
        draw(st.sampled_from(["forward", "backward"])),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.sampled_from(list(GPUS))),
    )


def plan_of(sizes, channels_last=False, element_bytes=2, direction="forward", training=True, aligned=True, name="H200"):
    return cuda_plan(sizes, channels_last, element_bytes, direction, training, aligned, GPUS[name])


def assert_covers(p, sizes, element_bytes):
    """Every element belongs to one item, and an item's blocks, vectors and lanes hold all of it."""
    batch, channels, positions = sizes[0], sizes[1], math.prod(sizes[2:])
    assert p["rows"] * p["columns"] == batch * channels * positions
    assert p["columns_per_channel"] in (1, positions) and p["columns"] == channels * p["columns_per_channel"]
    assert (p["channel_tiles"] - 1) * p["channels_per_tile"] < channels <= p["channel_tiles"] * p["channels_per_tile"]
    assert p["vector"] in (1, 16 // element_bytes)
    width = p["channels_per_tile"] * p["columns_per_channel"]
    if p["access_pattern"] == "rows":
        assert p["channels_per_tile"] == 1
        # what a row touches if it begins at the last element of a vector
        assert (p["vectors_per_row"] - 1) * p["vector"] + 1 >= width or width % p["vector"] == 0
        assert p["vectors_per_row"] * p["vector"] >= width
    else:
        assert p["channel_tiles"] == 1 or width % p["vector"] == 0, "items meet at borders of vectors"
        assert p["columns"] % p["vector"] == 0, "and so do rows"
        assert p["vectors_per_row"] == ceil_div(width, p["vector"])
        lanes = p["lanes_per_row"]
        assert lanes & (lanes - 1) == 0 and p["vectors_per_row"] <= lanes <= p["threads"]
    assert p["channels_per_tile"] <= p["threads"], "a thread finishes each channel of an item"


def assert_fits(p, device, backward):
    assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 1024
    assert 1 <= p["blocks"] <= LARGEST_GRID
    assert 0 < p["scratch_bytes"] <= p["shared_bytes"] <= device["shared_per_block"]
    if p["strategy"] == "resident":
        slices = (2 if backward else 1) * p["slice_bytes"]
        assert p["scratch_bytes"] + slices == p["shared_bytes"]
        vectors = p["slice_bytes"] // 16 * p["batch_splits"]
        assert vectors >= p["rows"] * p["vectors_per_row"], "the slices of an item hold all of it"
        assert p["blocks"] == p["groups"] * p["batch_splits"]
        assert (p["waves"] - 1) * p["groups"] < p["channel_tiles"] <= p["waves"] * p["groups"]
        assert p["cooperative"] == (p["batch_splits"] > 1) and p["cooperative"] <= device["cooperative"]
    else:
        assert p["blocks"] == p["channel_tiles"] * p["batch_splits"] and not p["cooperative"]
    if p["cooperative"]:
        assert p["blocks"] <= resident_blocks(p, device) * device["multiprocessors"], "or the barrier deadlocks"
        assert p["groups"] * BARRIER_BYTES <= COUNTER_BYTES
    elif p["batch_splits"] > 1:
        assert p["channel_tiles"] * 4 <= COUNTER_BYTES, "a ticket counter an item"


def resident_blocks(p, device):
    return min(
        device["shared_per_multiprocessor"] // (p["shared_bytes"] + device["shared_reserved"]),
        device["threads_per_multiprocessor"] // p["threads"],
        device["registers_per_multiprocessor"] // (REGISTERS_A_THREAD * p["threads"]),
    )


def assert_moves(p, sizes, element_bytes, backward, training):
    tensor = math.prod(sizes) * element_bytes
    assert p["least_bytes"] == (3 if backward else 2) * tensor
    again = p["strategy"] == "streaming" and training
    assert p["bytes"] == p["least_bytes"] + again * (2 if backward else 1) * tensor
    partial = 16 if backward else 24  # sum and dot; count, mean and m2
    if p["batch_splits"] > 1:
        assert p["workspace_bytes"] >= p["blocks"] * p["channels_per_tile"] * partial
    assert 0 <= p["workspace_bytes"] <= 2 * p["blocks"] * p["channels_per_tile"] * partial + sizes[1] * 16 + 256


@bounded
@given(case=cases())
@example(case=([2**32, 70000, 14, 14], True, 2, "backward", True, True, "L4"))
@example(case=([1, 2**20, 1], False, 8, "backward", True, False, "one multiprocessor"))
def test_every_plan(case):
    sizes, _, element_bytes, direction, training, aligned, name = case
    p = plan_of(*case)
    backward = direction == "backward"
    assert_covers(p, sizes, element_bytes)
    assert_fits(p, GPUS[name], backward)
    assert_moves(p, sizes, element_bytes, backward, training)
    if not training:
        assert p["strategy"] == "streaming", "nothing is read twice in eval"
    if not aligned:
        assert p["vector"] == 1 and p["strategy"] == "streaming"
    assert all(value >= 0 for value in p.values() if isinstance(value, int)), "an overflow"
    assert plan_of(*case) == p, "and the same the next time"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch", [32, 128, 256])
@pytest.mark.parametrize("name", ["H200", "H100"])
@pytest.mark.parametrize("channels, side", RESNET50, ids=lambda v: str(v))
def test_resnet50_is_resident_on_large_gpus(channels, side, name, batch, direction):
    for channels_last in (False, True):
        p = plan_of([batch, channels, side, side], channels_last, 2, direction, name=name)
        if channels_last and p["strategy"] == "streaming":
            # a strip of 64 bytes of every row, twice in backward, is more than the whole chip holds
            needed = batch * side * side * 64 * (2 if direction == "backward" else 1)
            assert needed > 0.8 * GPUS[name]["multiprocessors"] * GPUS[name]["shared_per_multiprocessor"]
            continue
        assert p["strategy"] == "resident" and p["bytes"] == p["least_bytes"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("channels, side", RESNET50, ids=lambda v: str(v))
def test_the_waves_of_resnet50_are_even(channels, side, direction):
    """Places that stand empty in the last of several waves are time lost."""
    p = plan_of([256, channels, side, side], False, 2, direction)
    assert p["channel_tiles"] >= 0.85 * p["waves"] * p["groups"], p


@pytest.mark.parametrize("name", GPUS)
def test_more_than_32_bits(name):
    for sizes in ([64, 3, 3500, 3500], [33000, 65, 32, 32], [2**31 + 8, 8], [2, 70000, 128, 128], [70000, 2**16]):
        for channels_last in (False, True):
            for direction in ("forward", "backward"):
                case = (sizes, channels_last, 2, direction, True, True, name)
                p = plan_of(*case)
                assert math.prod(sizes) > 2**30
                assert_covers(p, sizes, 2)
                assert_fits(p, GPUS[name], direction == "backward")
                assert_moves(p, sizes, 2, direction == "backward", True)


def test_without_cooperative_launches_no_block_waits_for_another():
    for channels, side in RESNET50:
        for batch in (8, 256):
            p = plan_of([batch, channels, side, side], name="H200 without cooperative launches")
            assert p["strategy"] == "streaming" or p["batch_splits"] == 1


def test_small_tensors_take_one_launch():
    """Where every launch counts: a channel, or a strip, in the shared memory of a block."""
    for sizes in ([32, 64], [8, 16, 14, 14], [2, 32, 28, 28], [128, 256]):
        for direction in ("forward", "backward"):
            p = plan_of(sizes, False, 4, direction)
            assert p["strategy"] == "resident", sizes


def test_streaming_fills_the_machine():
    """One block a channel leaves most multiprocessors idle where channels are few."""
    p = plan_of([256, 3, 225, 225], False, 2, aligned=False)
    assert p["strategy"] == "streaming" and p["blocks"] >= 132


GOOD = ([4, 8, 6, 6], False, 4, "forward", True, True, GPUS["H200"])


@pytest.mark.parametrize(
    "position, value, error, word",
    [
        (0, [4], IndexError, "sizes"),
        (0, [4, 0, 3], ValueError, "sizes"),
        (0, [2**40, 2**30], ValueError, "sizes"),
        (2, 3, ValueError, "element_bytes"),
        (3, "sideways", ValueError, "direction"),
        (6, {}, ValueError, "multiprocessors"),
        (6, {**GPUS["H200"], "multiprocessors": 0}, ValueError, "multiprocessors"),
        (6, {**GPUS["H200"], "shared_per_block": -1}, ValueError, "shared_per_block"),
        (6, {k: v for k, v in GPUS["H200"].items() if k != "cooperative"}, ValueError, "cooperative"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(position, value, error, word):
    arguments = list(GOOD)
    arguments[position] = value
    with pytest.raises(error, match=word):
        cuda_plan(*arguments)
