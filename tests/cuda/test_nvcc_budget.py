"""What the review of the kernels found, as counts of what nvcc compiled.

Those of the kernels before the redesign were above these limits (benchmarks/NOTES.md#kernels-by-counts). Small tensors
on a small GPU: what is counted a vector, a channel or a tile does not depend on their sizes."""

import json

import pytest
from ptx.build import find_nvcc
from ptx.cases import run_case
from ptx.counts import ITEM_BYTES, counted_library, summary

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")]

PASSES = ("forward", "backward")
THREADS = 512  # of a block of the resident kernels
# N, C, S, multiprocessors of an H200
ROWS, ROWS_ALONE = (32, 2, 3136, 4), (32, 8, 784, 4)
MAPS_14, MAPS_7 = (64, 16, 196, 4), (64, 32, 49, 4)
MANY_MAPS_7 = (128, 32, 49, 4)  # what a loop costs once is a small part
COLUMNS = (8, 64, 784, 24)  # 12 blocks or more a channel tile
MANY_COLUMNS = (32, 64, 784, 33)  # 33 blocks or more


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """counts(case, layout, dtype, blocks of a cluster) -> {pass: (summary, launches)}, each case executed once."""
    folder, known = tmp_path_factory.mktemp("counts"), {}

    def counts(case, layout, dtype="bf16", cluster=1):
        if (case, layout, dtype, cluster) not in known:
            path = folder / f"{len(known)}.json"
            n, c, s, multiprocessors = case
            arguments = [f"N={n}", f"C={c}", f"S={s}", f"layout={layout}", f"dtype={dtype}", f"mps={multiprocessors}"]
            said, _ = run_case(*arguments, "shared=228", "block=227", f"cluster={cluster}", library=counted_library(),
                               FASTBN_PTX_COUNTERS=str(path))  # fmt: skip
            launches = [json.loads(line) for line in path.read_text().splitlines()]
            assert (said["forward_launches"], len(launches)) == (1, 2), "one launch a pass"
            known[case, layout, dtype, cluster] = {
                direction: (summary([launch]), launch) for direction, launch in zip(PASSES, launches, strict=True)
            }
        return known[case, layout, dtype, cluster]

    return counts


def vectors(case, dtype):
    """Of the input, in whole warps."""
    n, c, s, _ = case
    return n * c * s * ITEM_BYTES[dtype] / 16 / 32


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize(
    ("case", "layout"),
    [(ROWS, "first"), (ROWS_ALONE, "first"), (MAPS_14, "first"), (MANY_MAPS_7, "first"), (COLUMNS, "last")],
    ids=["rows", "one block", "14x14", "7x7", "channels_last"],
)
def test_instructions_per_vector(counted, case, layout, dtype, direction):
    """Finding 10: rows of whole vectors have no bounds, no lane is idle in maps of 14x14 and 7x7."""
    found, _ = counted(case, layout, dtype)[direction]
    assert found["loop_instructions"] / vectors(case, dtype) <= {"forward": 125, "backward": 190}[direction]
    assert found["tensor_sectors"] <= 1.02 * found["least_sectors"]


@pytest.mark.parametrize("direction", PASSES)
def test_round_trips_of_a_tile(counted, direction):
    """Findings 1, 3 and 8: publish, add, see the barrier, read the records. Parameters are there before."""
    assert counted(ROWS_ALONE, "first")[direction][0]["tile_round_trips"] == 0
    assert counted(ROWS, "first")[direction][0]["tile_round_trips"] <= 4
    assert counted(COLUMNS, "last")[direction][0]["tile_round_trips"] <= 4
    # and for subgroups: ticket, read their records, publish the merged one
    assert counted(MANY_COLUMNS, "last")[direction][0]["tile_round_trips"] <= 7


@pytest.mark.parametrize("direction", PASSES)
def test_clusters_merge_through_shared_memory(counted, direction):
    """A cluster alone moves parameters and results through global memory, several of them records of each other."""
    channels, blocks = MAPS_7[1], 4
    found, _ = counted(MAPS_7, "first", cluster=blocks)[direction]
    assert found["tile_round_trips"] == 0
    assert found["other_sectors"] <= channels * blocks
    found, launch = counted(MANY_COLUMNS, "last", cluster=8)[direction]
    assert found["tile_round_trips"] <= 4
    # Blocks go through one tile of two; with dy beside x all of them through both. Each reads weight and bias, or mean,
    # variance and weight, of 32 channels; each cluster publishes a record a channel and reads those of the others.
    visits = {"forward": 1, "backward": 2}[direction] * launch["blocks"]
    parameters = {"forward": 8, "backward": 20}[direction] * visits
    channels, clusters = MANY_COLUMNS[1], visits / 8 / 2
    counters = 3 * visits
    assert found["other_sectors"] <= 1.3 * (parameters + channels * clusters * (1 + clusters / 2) + counters)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("case", [COLUMNS, MANY_COLUMNS], ids=["at once", "in subgroups"])
def test_records_take_few_sectors(counted, case, direction):
    """Finding 1: neighbouring lanes read neighbouring records, of 16 bytes; with subgroups O(P sqrt(P)) of them."""
    found, launch = counted(case, "last")[direction]
    channels, tile = case[1], 32
    blocks = launch["blocks"] // (channels // tile)
    parts = blocks if blocks <= 32 else round(blocks**0.5 + 0.5)
    read = channels * blocks * parts / 2
    published = 2 * channels * blocks  # a sector each, and parameters
    assert found["other_sectors"] <= 1.3 * (read + published + (channels * blocks / 2 if blocks > 32 else 0))


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    ("case", "layout"), [(ROWS, "first"), (MAPS_7, "first"), (MANY_COLUMNS, "last")], ids=["rows", "7x7", "columns"]
)
def test_all_warps_reduce(counted, case, layout, direction):
    """Finding 2: seven of eight warps are busy up to the barrier of a block's reduction."""
    found, launch = counted(case, layout)[direction]
    assert launch["threads"] == launch["blocks"] * THREADS
    assert found["busy_all"] / found["busy_longest"] >= 7 / 8 * THREADS / 32


def test_the_barrier_of_a_group(counted):
    """Finding 8: no fence but that of the release."""
    _, launch = counted(ROWS, "first")["forward"]
    fences = [site for site in launch["sites"] if "fence" in site["name"] or "membar" in site["name"]]
    assert fences == []
    assert any(site["name"].startswith("red.release.gpu") for site in launch["sites"])
