"""The planner of the CUDA kernels, for GPUs that are not there: plans cover every element once and fit the GPU."""

import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastbn._C import cuda_plan

KB = 1024
COUNTER_BYTES, BARRIER_BYTES = 256 * KB, 32  # cuda/plan.h
REGISTERS_A_THREAD = 64  # cuda/plan.h
LARGEST_GRID = 2**31 - 1
LARGEST_TENSOR = 2**56  # elements; 8 bytes each, five times over, can still be counted


def gpu(multiprocessors, shared, block, bandwidth, threads=2048, cooperative=True, cluster=1):
    return {
        "multiprocessors": multiprocessors,
        "shared_per_multiprocessor": shared,
        "shared_per_block": block,
        "shared_reserved": KB,
        "registers_per_multiprocessor": 64 * KB,
        "threads_per_multiprocessor": threads,
        "cooperative": cooperative,
        "cluster": cluster,
        "bytes_per_microsecond": bandwidth,
    }


GPUS = {
    "H200": gpu(132, 228 * KB, 227 * KB, 4_300_000, cluster=8),
    "H100": gpu(132, 228 * KB, 227 * KB, 3_000_000, cluster=8),
    "A100": gpu(108, 164 * KB, 163 * KB, 1_800_000),
    "L4": gpu(58, 100 * KB, 99 * KB, 270_000, threads=1536),
    "MIG 1g of an H100": gpu(16, 228 * KB, 227 * KB, 400_000, cluster=8),
    "H200 without cooperative launches": gpu(132, 228 * KB, 227 * KB, 4_300_000, cooperative=False, cluster=8),
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
    """Every element belongs to one channel tile, and a tile's blocks, vectors and lanes hold all of it."""
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
        assert p["channel_tiles"] == 1 or width % p["vector"] == 0, "channel tiles meet at borders of vectors"
        assert p["columns"] % p["vector"] == 0, "and so do rows"
        assert p["vectors_per_row"] == ceil_div(width, p["vector"])
        lanes = p["lanes_per_row"]
        if 1 < p["columns_per_channel"] >= p["vector"]:
            assert lanes == p["vectors_per_row"], "no thread is idle but for the rest of the block"
        else:
            assert lanes & (lanes - 1) == 0 and p["vectors_per_row"] <= lanes, "shuffles merge rows"
        assert lanes <= p["threads"]
    assert p["channels_per_tile"] <= p["threads"], "a thread finishes each channel of a channel tile"


def assert_fits(p, device, backward):
    assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 1024
    assert 1 <= p["blocks"] <= LARGEST_GRID
    assert 0 < p["scratch_bytes"] <= p["shared_bytes"] <= device["shared_per_block"]
    if p["strategy"] == "resident":
        slices = (2 if backward else 1) * p["slice_bytes"]
        assert p["scratch_bytes"] + slices == p["shared_bytes"]
        vectors = p["slice_bytes"] // 16 * p["batch_splits"]
        assert vectors >= p["rows"] * p["vectors_per_row"], "the slices of a channel tile hold all of it"
        assert p["blocks"] == p["groups"] * p["batch_splits"]
        assert (p["waves"] - 1) * p["groups"] < p["channel_tiles"] <= p["waves"] * p["groups"]
        assert p["cooperative"] == (p["batch_splits"] > 1) and p["cooperative"] <= device["cooperative"]
    else:
        assert p["blocks"] == p["channel_tiles"] * p["batch_splits"] and not p["cooperative"]
    if p["cooperative"]:
        assert p["blocks"] <= resident_blocks(p, device) * device["multiprocessors"], "or the barrier deadlocks"
        if p["cluster"] > 1:
            assert p["cluster"] <= device["cluster"] and p["cluster"] & (p["cluster"] - 1) == 0
            assert (
                p["batch_splits"] % p["cluster"] == 0
                and p["subgroup"] == p["cluster"]
                and p["access_pattern"] == "columns"
            )
            # in processing clusters of 16 multiprocessors, if there are so many
            in_clusters = device["multiprocessors"] // 16 * 16 or device["multiprocessors"]
            assert p["blocks"] <= resident_blocks(p, device) * in_clusters
        assert p["barriers"] == (0 if p["batch_splits"] == p["cluster"] else p["groups"])
        assert p["tickets"] == (p["groups"] * subgroups(p) if p["subgroup"] > p["cluster"] else 0)
    elif p["batch_splits"] > 1:
        assert p["barriers"] == 0 and p["tickets"] == p["channel_tiles"] * (
            1 + subgroups(p) if p["subgroup"] > 1 else 1
        )
    else:
        assert p["barriers"] == p["tickets"] == 0, "nothing is zeroed for a launch in which no block meets another"
    assert max(p["barriers"], p["tickets"]) * BARRIER_BYTES <= COUNTER_BYTES / 2
    assert 1 <= p["subgroup"] <= p["batch_splits"]


def subgroups(p):
    return ceil_div(p["batch_splits"], p["subgroup"])


def records(p):
    """Of a channel tile: those of its blocks, and of its subgroups if there are any."""
    if p["cluster"] > 1:
        return subgroups(p) * p["channels_per_tile"] if subgroups(p) > 1 else 0
    levels = p["subgroup"] > 1
    return (subgroups(p) * (1 + p["subgroup"]) if levels else p["batch_splits"]) * p["channels_per_tile"]


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
    sums = sizes[1] * 16 + 256 if p["strategy"] == "streaming" else 0
    tiles = 2 * p["groups"] if p["strategy"] == "resident" else p["channel_tiles"]  # two sets of records
    needed = tiles * records(p) * 16 if p["batch_splits"] > 1 else 0
    assert needed <= p["workspace_bytes"] <= needed + sums


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


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch", [32, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_records_are_a_small_part_of_the_traffic(element_bytes, batch, direction):
    """On an H200, at most 2 % or 256 KB, but for the largest rows; on an A100, of channels_last, by subgroups."""
    for channels, side in RESNET50:
        for channels_last in (False, True):
            for name in ("H200", "A100"):
                p = plan_of([batch, channels, side, side], channels_last, element_bytes, direction, name=name)
                if p["batch_splits"] == 1 or p["strategy"] == "streaming":
                    continue
                readers = p["batch_splits"] // p["cluster"]  # of a cluster, each block reads some of the channels
                read = (
                    p["channel_tiles"]
                    * p["channels_per_tile"]
                    * readers
                    * subgroups(p)
                    * 16
                    * (p["cluster"] < p["blocks"])
                )
                limit = max(p["bytes"] / 50, 256 * KB)
                if name == "H200" and p["batch_splits"] < 132:
                    assert read <= limit
                assert read <= 0.2 * p["bytes"]


def test_rows_of_7_and_14_are_whole_sectors():
    """Rows that end within a sector of 32 bytes read it twice."""
    for element_bytes in (2, 4):
        for side in (7, 14):
            p = plan_of([32, 512, side, side], False, element_bytes)
            assert p["channels_per_tile"] * side * side * element_bytes % 32 == 0
            assert p["threads"] // p["lanes_per_row"] * p["lanes_per_row"] >= 0.95 * p["threads"]


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
