"""Whether reads of what other threads wrote are in order by the rules of PTX (tests/ptx/small.cu)."""

import pytest
from ptx.build import HERE, find_nvcc, library
from simt.build import build, run

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")]

SMALL = HERE / "small.cu"
IN_ORDER = [
    "published",
    "read_after_fence",
    "read_after_syncwarp",
    "read_after_syncthreads",
    "neighbour_after_syncwarp",
]
RACES = ["read_without_acquire", "neighbour_without_barrier"]
seeds = pytest.mark.parametrize("seed", range(4))


def run_small(name, seed, **environment):
    return run(build([SMALL], "plain"), name, FASTBN_SIMT_SEED=str(seed), **environment)


def run_translated(name, seed):
    return run_small(name, seed, FASTBN_SIMT_PTX=str(library(kernels=[SMALL])))


@seeds
@pytest.mark.parametrize("name", IN_ORDER)
def test_what_is_in_order_is_accepted(name, seed):
    status, output = run_translated(name, seed)
    assert status == 0, output
    assert (status, output) == run_small(name, seed)


@seeds
@pytest.mark.parametrize("name", RACES)
def test_a_race_is_an_error_even_where_the_result_is_right(name, seed):
    assert run_small(name, seed)[0] == 0
    status, output = run_translated(name, seed)
    assert status == 1
    assert "with no release, acquire and barrier in between" in output
