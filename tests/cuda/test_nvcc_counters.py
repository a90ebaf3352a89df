"""What is counted while PTX is executed, for kernels whose costs are known by hand (tests/ptx/small.cu)."""

import json

import pytest
from ptx.build import HERE, find_nvcc, library
from simt.build import build, run

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")]

SMALL = HERE / "small.cu"
WARPS = 4  # 2 blocks of 64 threads


def run_small(name, translated=None, **environment):
    if translated is not None:
        environment["FASTBN_SIMT_PTX"] = str(translated)
    status, output = run(build([SMALL], "plain"), name, **environment)
    assert status == 0, output
    return output


@pytest.fixture
def counted(tmp_path):
    def count(name):
        path = tmp_path / "counters.json"
        translated = library(kernels=[SMALL], counted=True)
        assert run_small(name, translated, FASTBN_PTX_COUNTERS=str(path)) == run_small(name)
        (line,) = path.read_text().splitlines()
        return json.loads(line)

    return count


def site(counters, start):
    """The accesses of the only instruction whose name begins so."""
    (found,) = [s for s in counters["sites"] if s["name"].startswith(start)]
    return found


def numbers_of(accesses, *names):
    return tuple(accesses[name] for name in names)


def test_sectors_of_coalesced_accesses(counted):
    counters = counted("coalesced")
    for name, tensor in [("ld.global", "x"), ("st.global", "y")]:
        of = site(counters, name)
        assert numbers_of(of, "requests", "lanes", "sectors", "least_sectors") == (4, 128, 64, 64)
        assert of["sectors_of"] == {tensor: 64}
    assert counters["instructions"]["global"] == 2 * WARPS
    assert numbers_of(counters, "blocks", "threads", "warps", "block_barriers") == (2, 128, WARPS, 0)


def test_sectors_of_strided_accesses(counted):
    counters = counted("strided")
    for name in ("ld.global", "st.global"):
        assert numbers_of(site(counters, name), "requests", "sectors", "least_sectors") == (4, 128, 16)


def test_sectors_of_a_broadcast(counted):
    counters = counted("broadcast")
    assert numbers_of(site(counters, "ld.global"), "requests", "sectors", "least_sectors") == (4, 4, 4)
    assert numbers_of(site(counters, "st.global"), "requests", "sectors", "least_sectors") == (4, 16, 16)


@pytest.mark.parametrize(("name", "cycles"), [("no_conflict", 1), ("conflict_of_2", 2), ("conflict_of_32", 32)])
def test_bank_conflicts(counted, name, cycles):
    counters = counted(name)
    assert numbers_of(site(counters, "st.shared"), "requests", "cycles", "least_cycles") == (4, 4 * cycles, 4)
    assert numbers_of(site(counters, "ld.shared"), "requests", "cycles", "least_cycles") == (4, 4, 4)
    assert counters["instructions"]["shared"] == 2 * WARPS
    assert counters["block_barriers"] == 2 and counters["instructions"]["barrier"] == WARPS


@pytest.mark.parametrize(("name", "turns", "lanes"), [("ten_turns", 10, 320), ("divergent_turns", 11, 320)])
def test_turns_of_loops(counted, name, turns, lanes):
    counters = counted(name)
    (loop,) = counters["loops"]
    assert (loop["turns"], loop["lanes"]) == (turns * WARPS, lanes * WARPS)
    assert loop["instructions"]["fp32"] == turns * WARPS == counters["instructions"]["fp32"]


def test_round_trips(counted):
    counters = counted("five_round_trips")
    assert numbers_of(counters, "round_trips", "tile_round_trips") == (6, 5)
    assert numbers_of(counted("coalesced"), "round_trips", "tile_round_trips") == (1, 0)


def test_barriers_of_blocks_and_groups(counted):
    counters = counted("barriers")
    assert counters["block_barriers"] == 3 * 2
    assert counters["group_barriers"] == 2
    # the addition, and the load that sees it
    assert counters["round_trips"] == 2


def test_asynchronous_copies(counted):
    counters = counted("copies")
    of = [s for s in counters["sites"] if s["name"].startswith("cp.async")]
    assert sum(s["requests"] for s in of) == 4 * WARPS
    # 16 of every 64 bytes: a sector a lane in each request
    assert sum(s["sectors"] for s in of) == 4 * WARPS * 32
    assert counters["instructions"]["copy"] == (4 + 2 + 1) * WARPS
    loads = site(counters, "ld.shared")
    # lanes 64 bytes apart: 8 lanes at a time have 8 of 32 banks, 4 words in each of them
    assert numbers_of(loads, "requests", "cycles", "least_cycles") == (4, 4 * 16, 4 * 4)


def test_classes_add_up(counted):
    counters = counted("ten_turns")
    in_loop = sum(counters["loops"][0]["instructions"].values())
    assert 0 < in_loop < sum(counters["instructions"].values()) <= in_loop + 40 * WARPS


def test_the_file_names_each_launch(tmp_path):
    """A library that was not translated with counters counts nothing, and says so by an empty file."""
    path = tmp_path / "counters.json"
    run_small("coalesced", library(kernels=[SMALL]), FASTBN_PTX_COUNTERS=str(path))
    assert path.read_text() == ""
    run_small("coalesced", library(kernels=[SMALL], counted=True), FASTBN_PTX_COUNTERS=str(path))
    assert json.loads(path.read_text())["kernel"] == "coalesced"
