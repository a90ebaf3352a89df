"""The emulator of tests/simt reports each mistake in tests/simt/misuse.cu, and nothing in a correct kernel."""

import pytest
from simt.build import HERE, build, run

# mode -> name of the mistake -> (seeds, words of the report). WRONG RESULT: the emulator only made it visible.
MISTAKES = {
    "plain": {
        "divergent_barrier": (1, "divergent __syncthreads"),
        "barrier_for_some": (1, "thread exits while others wait at __syncthreads"),
        "exit_at_barrier": (1, "thread exits while others wait at __syncthreads"),
        "barrier_meets_shuffle": (1, "deadlock"),
        "masks_differ": (1, "warp divergence"),
        "lane_not_in_mask": (1, "the calling lane is not in its own mask"),
        "source_not_in_mask": (1, "which is not in the mask"),
        "exited_lane_in_mask": (1, "lane exits while others wait for it"),
        "no_syncwarp": (1, "WRONG RESULT"),
        "no_syncthreads": (1, "WRONG RESULT"),
        "write_after_read": (40, "WRONG RESULT"),
        "unwritten": (1, "WRONG RESULT"),
        "static_overrun": (1, "written past the end of an array"),
        "dynamic_overrun": (1, "written past the end of an array"),
        "read_overrun": (1, "WRONG RESULT"),
        "too_much_static": (1, "too much shared memory: 40960 bytes dynamic and 16000 bytes static"),
        "too_much_dynamic": (1, "too much shared memory"),
        "misaligned_load": (1, "misaligned address"),
        "misaligned_store": (1, "misaligned address"),
        "misaligned_copy": (1, "misaligned address"),
        "copy_waits_for_too_few": (1, "WRONG RESULT"),
        "copy_read_before_wait": (1, "reads an asynchronous copy of its own before waiting for it"),
        "copy_without_barrier": (1, "WRONG RESULT"),
        "copy_never_waited_for": (1, "asynchronous copies that it never waited for"),
        "copy_too_early": (40, "WRONG RESULT"),
        "shared_as_global": (1, "shared memory accessed as global memory"),
        "global_as_shared": (1, "not an address in the shared memory of this block"),
        "stale_load": (1, "load() of what this launch wrote"),
        "not_cooperative": (1, "deadlock, with 1 of 8 blocks resident"),
        "cooperative_too_large": (1, "cooperative launch too large"),
        "group_no_atomic": (40, "deadlock, with 8 of 8 blocks resident"),
        "group_no_wait": (1, "WRONG RESULT"),
        "stack_overflow": (1, "stack overflow"),
        "throws": (1, "thrown by a kernel"),
        "no_threads": (1, "invalid configuration argument"),
        "too_many_threads": (1, "invalid configuration argument"),
    },
    "asan": {
        "static_overrun": (1, "index 64 out of bounds"),
        "dynamic_overrun": (1, "use-after-poison"),
        "read_overrun": (1, "index 64 out of bounds"),
        "stack_overflow": (1, "stack"),
        "no_syncthreads": (1, "WRONG RESULT"),
        "throws": (1, "thrown by a kernel"),
    },
    "tsan": {
        "no_syncwarp": (1, "data race"),
        "no_syncthreads": (1, "data race"),
        "write_after_read": (1, "data race"),
        "shared_sum": (1, "data race"),
        "copy_without_barrier": (1, "data race"),
        "copy_too_early": (1, "data race"),
        "group_no_fence": (1, "data race"),
        "last_no_fence_before": (3, "data race"),
        "last_no_fence_after": (3, "data race"),
        "throws": (1, "thrown by a kernel"),
    },
}
RIGHT = ["right", "group_sum", "last_block"]


def marked(values):
    """The plain build in the short run with --backend simt; sanitizers among the slow tests."""
    plain = [pytest.mark.simt, pytest.mark.simt_quick]
    slow = [pytest.mark.cpu, pytest.mark.slow]
    return [
        pytest.param(mode, *rest, marks=plain if mode == "plain" else slow, id="-".join([mode, rest[0]]))
        for mode, *rest in values
    ]


def misuse(mode, *arguments):
    return run(build([HERE / "misuse.cu"], mode), *arguments, timeout=100)


@pytest.mark.parametrize(
    ("mode", "name", "seeds", "words"),
    marked((mode, name, *how) for mode, mistakes in MISTAKES.items() for name, how in mistakes.items()),
)
def test_mistake_is_noticed(mode, name, seeds, words):
    status, output = misuse(mode, name, seeds)
    assert status != 0
    assert words in output
    assert "THE NEXT LAUNCH" not in output


@pytest.mark.parametrize(("mode", "name"), marked((mode, name) for mode in MISTAKES for name in RIGHT))
def test_nothing_is_noticed_where_nothing_is_wrong(mode, name):
    seeds = 5 if mode == "tsan" else 40
    assert misuse(mode, name, seeds) == (0, "NOT NOTICED\n")


@pytest.mark.simt
@pytest.mark.simt_quick
def test_every_mistake_is_tested():
    _, output = misuse("plain")
    assert set(output.split()) == {name for mistakes in MISTAKES.values() for name in mistakes} | set(RIGHT)


@pytest.mark.simt
@pytest.mark.simt_quick
def test_environment_sets_the_gpu():
    program = build([HERE / "misuse.cu"], "plain")
    assert run(program, "group_sum", FASTBN_SIMT_THREADS="64", FASTBN_SIMT_MULTIPROCESSORS="8")[0] == 0
    status, output = run(program, "group_sum", FASTBN_SIMT_THREADS="64", FASTBN_SIMT_MULTIPROCESSORS="7")
    assert status == 1
    assert "8 blocks, but 7 fit" in output
    status, output = run(program, "group_sum", FASTBN_SIMT_COOPERATIVE="0")
    assert status == 1
    assert "no cooperative launches" in output
