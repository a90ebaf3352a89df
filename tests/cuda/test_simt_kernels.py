"""The CUDA kernels, executed on the CPU by tests/simt/driver.cpp without torch, under schedules and sanitizers.

The driver compares with float64. It also has to fail for each defect that is planted in a copy of the kernels."""

from dataclasses import dataclass

import pytest
from ptx.cases import numbers, run_case
from simt.build import CSRC, HERE, backend_sources, build, run
from simt.copies import copy_of_csrc, replaced


def driver(mode, csrc=CSRC, defines=()):
    return build([*backend_sources(csrc), HERE / "driver.cpp"], mode, csrc, defines)


def at_once(mode):
    """Several blocks at a time even with seed 0, or TSan sees one after the other."""
    return {"FASTBN_SIMT_RESIDENT": "3"} if mode == "tsan" else {}


@pytest.mark.simt
@pytest.mark.simt_quick
def test_kernels():
    status, output = run(driver("plain"), 3)
    assert status == 0, output


@pytest.mark.cpu
@pytest.mark.slow
def test_kernels_under_asan(tmp_path):
    """Of one type, because all of them take five minutes to compile: the one with the most elements in a vector."""
    csrc = copy_of_csrc(tmp_path, "bf16")
    status, output = run(driver("asan", csrc, ["-DSIMT_ONE_TYPE=bf16"]), 1)
    assert status == 0, output


# ---- what other programs do to a launch ------------------------------------------------------------------------------

SHAPE = ["layout=first", "N=32", "C=3", "S=1152"]
GROUPS = [*SHAPE, "mps=8"]  # three blocks a channel


@pytest.mark.simt
@pytest.mark.simt_quick
def test_a_cooperative_launch_that_finds_no_room():
    """The kernels of a plan without one run instead, in the same memory: no exception, the same results."""
    said, _ = run_case(*GROUPS)
    assert (said["forward_launches"], said["backward_launches"]) == (1, 1) and said["forward_blocks"] > 3
    crowded, found = run_case(*GROUPS, FASTBN_SIMT_COOPERATIVE_BLOCKS="1")
    alone, right = run_case(*GROUPS, "cooperative=0")
    assert (crowded["forward_launches"], crowded["backward_launches"]) == (2, 2)
    assert crowded["forward_blocks"] == alone["forward_blocks"]
    assert found == right


@pytest.mark.simt
@pytest.mark.simt_quick
def test_the_margin_of_multiprocessors():
    """FASTBN_SM_MARGIN: so many multiprocessors stay free for other kernels."""
    all_of_it, right = run_case(*GROUPS)
    fewer, found = run_case(*GROUPS, FASTBN_SM_MARGIN="4")
    half, _ = run_case(*SHAPE, "mps=4")
    assert half["forward_blocks"] == fewer["forward_blocks"] < all_of_it["forward_blocks"]
    assert numbers("y", found["y"], "bf16") == pytest.approx(numbers("y", right["y"], "bf16"), abs=0.1)
    with pytest.raises(RuntimeError, match="FASTBN_SM_MARGIN should be"):
        run_case(*GROUPS, FASTBN_SM_MARGIN="some")


# ---- planted defects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    name: str
    file: str  # in csrc/cuda
    old: str  # occurs there exactly once
    new: str  # the same, but where PLANTED is true
    mode: str = "plain"  # in which the driver fails
    seeds: int = 1
    only: str = ""  # what is in the names of the cases that show it; by default all that are not large (not with tsan)


END_OF_TILE = "    __syncthreads();  // the scratch is written again for the next channel tile\n"

# fmt: off
DEFECTS = [
    # ---- within a block
    Defect("no barrier before warps' sums are read", "reduce.cuh",
           "  __syncthreads();\n  if (warp != 0) return;",
           "  if (!PLANTED) __syncthreads();\n  if (warp != 0) return;"),
    Defect("no barrier between warps that share columns", "reduce.cuh",
           "  __syncthreads();\n  const int share =",
           "  if (!PLANTED) __syncthreads();\n  const int share ="),
    Defect("no barrier between threads that share channels", "reduce.cuh",
           "  __syncthreads();\n  for (int c = warp;",
           "  if (!PLANTED) __syncthreads();\n  for (int c = warp;"),
    Defect("no barrier after pivots", "resident.cu",
           "    __syncthreads();\n#pragma unroll 1\n    for (int attempt",
           "    if (!PLANTED) __syncthreads();\n#pragma unroll 1\n    for (int attempt"),
    Defect("no barrier before coefficients are read", "resident.cu",
           "    __syncthreads();\n\n    Access access",
           "    if (!PLANTED) __syncthreads();\n\n    Access access"),
    Defect("no barrier at the end of a channel tile, forward", "resident.cu",
           END_OF_TILE, "    if (!PLANTED) __syncthreads();\n", "tsan", only="small first 2x64x256"),
    Defect("no barrier at the end of a channel tile, backward", "backward_resident.cu",
           END_OF_TILE, "    if (!PLANTED) __syncthreads();\n", "tsan", only="small first 40x16x49"),
    Defect("half a warp in the mask", "reduce.cuh",
           "x += __shfl_xor_sync(all_lanes, x, distance)",
           "x += __shfl_xor_sync(PLANTED ? 0xffffu : all_lanes, x, distance)"),
    Defect("the last warp's sum is left out", "reduce.cuh",
           "const bool mine = lane < warps;", "const bool mine = lane < warps - PLANTED;"),
    Defect("the wrong half of the values is given away", "reduce.cuh",
           "give = upper ? value[i] : value[i + N / 2];", "give = upper != PLANTED ? value[i] : value[i + N / 2];"),
    Defect("two lanes leave the same sum", "reduce.cuh",
           "mine = mine && (int(threadIdx.x) & d) == 0;", "mine = mine && (PLANTED || (int(threadIdx.x) & d) == 0);",
           "tsan", only="small last 3x5x49"),
    Defect("the second channel of a vector is left out", "reduce.cuh",
           "first[1] += head ? 0 : double(a[j])", "first[1] += head || PLANTED ? 0 : double(a[j])"),
    Defect("the last row of a step is left out", "reduce.cuh",
           "r < int(access.g.step_rows)", "r < int(access.g.step_rows) - PLANTED"),
    # ---- between blocks
    Defect("no release before a group's barrier", "merge.cuh",
           "if (threadIdx.x == 0) add_release(barrier, first ? top_bit - (arrivals - 1) : 1u);",
           "const unsigned by = first ? top_bit - (arrivals - 1) : 1u;\n"
           "    if (threadIdx.x == 0) PLANTED ? void(add(barrier, by)) : add_release(barrier, by);",
           "tsan", only="small last 4x8x196"),
    Defect("a relaxed ticket", "merge.cuh",
           "last = take_ticket(ticket, blocks - 1)",
           "last = (PLANTED ? increment_until(ticket, blocks - 1) : take_ticket(ticket, blocks - 1))",
           "tsan", only="small last 2x64x256"),
    Defect("the group does not wait", "merge.cuh",
           "return ((load_acquire(barrier) ^ before) & top_bit) != 0;",
           "return PLANTED || ((load_acquire(barrier) ^ before) & top_bit) != 0;"),
    Defect("one arrival too few for the flip", "merge.cuh",
           "? top_bit - (arrivals - 1)", "? top_bit - (arrivals - !PLANTED)"),
    Defect("the barrier is not expected to flip back", "merge.cuh",
           "before ^= top_bit;", "before ^= PLANTED ? 0 : top_bit;"),
    Defect("every block of a subgroup merges it", "merge.cuh",
           "return __syncthreads_or(last) != 0;", "return __syncthreads_or(last || PLANTED) != 0;"),
    Defect("no barrier of the block after its subgroup", "merge.cuh",
           "    __syncthreads();\n    return true;", "    if (!PLANTED) __syncthreads();\n    return true;",
           "tsan", only="many last 2x64x256"),
    Defect("members of another subgroup", "merge.cuh",
           "int64_t(part()) * g.subgroup)", "int64_t(part() - (PLANTED && part() > 0)) * g.subgroup)",
           "tsan", only="many last 2x64x256"),
    Defect("the last subgroup is as large as the others", "merge.cuh",
           "last = smaller(first + g.subgroup, g.batch_splits);",
           "last = PLANTED ? first + g.subgroup : smaller(first + g.subgroup, g.batch_splits);"),
    Defect("the second batch of records is left out", "merge.cuh",
           "from < count; from += g.merge_batch", "from < (PLANTED ? 1 : count); from += g.merge_batch",
           only="large: streaming"),
    Defect("not cooperative", "launch.cuh",
           "plan.shared_bytes, plan.cooperative,", "plan.shared_bytes, plan.cooperative && !PLANTED,"),
    Defect("one set of records", "merge.cuh",
           "(2 * group + set)", "(2 * group + (PLANTED ? 0 : set))"),
    Defect("a tile's count is left out of the merge", "merge.cuh",
           "{n * d, r.second + n * d * d}", "{(PLANTED ? 1 : n) * d, r.second + (PLANTED ? 1 : n) * d * d}"),
    Defect("workspace for one set of records", "plan.cpp",
           "2 * plan.groups * merge_bytes(plan)", "(2 - PLANTED) * plan.groups * merge_bytes(plan)"),
    Defect("workspace without the records of subgroups", "plan.cpp",
           "of_blocks = plan.subgroup > 1 ? parts", "of_blocks = plan.subgroup > 1 && !PLANTED ? parts"),
    # ---- within a cluster
    Defect("no barrier of the cluster before records are read", "merge.cuh",
           "    cluster_arrive();\n    cluster_wait();\n    const double n",
           "    if (!PLANTED) cluster_arrive(), cluster_wait();\n    const double n"),
    Defect("no barrier of the cluster before merged records are read", "merge.cuh",
           "    cluster_arrive();\n    cluster_wait();\n    for (int c",
           "    if (!PLANTED) cluster_arrive(), cluster_wait();\n    for (int c"),
    Defect("no barrier of the cluster at the end, forward", "resident.cu",
           "if (has_clusters && g.cluster > 1) cluster_arrive(), cluster_wait();",
           "if (has_clusters && g.cluster > 1 && !PLANTED) cluster_arrive(), cluster_wait();", seeds=4),
    Defect("no barrier of the cluster at the end, backward", "backward_resident.cu",
           "if (has_clusters && g.cluster > 1) cluster_arrive(), cluster_wait();",
           "if (has_clusters && g.cluster > 1 && !PLANTED) cluster_arrive(), cluster_wait();", seeds=4),
    Defect("the merged record of another block", "merge.cuh",
           "unsigned(c % size)", "unsigned(PLANTED ? 0 : c % size)"),
    Defect("a cluster as large as the first", "merge.cuh",
           "const unsigned first = split - unsigned(rank);",
           "const unsigned first = PLANTED ? 0 : split - unsigned(rank);", only="large: clusters"),
    # ---- vectors, their ends, channel_tiles
    Defect("a row begins where its vector begins", "access.cuh",
           "at < 0 ? int(-at) : 0", "at < 0 && !PLANTED ? int(-at) : 0"),
    Defect("elements beside a row are summed", "access.cuh",
           "if (j >= p.first && j < p.last) body(j,", "if (PLANTED || (j >= p.first && j < p.last)) body(j,"),
    Defect("elements beside a row are stored", "access.cuh",
           "if (j >= p.first && j < p.last) store(y", "if (PLANTED || (j >= p.first && j < p.last)) store(y"),
    Defect("a step too far along a row", "access.cuh",
           "if (vector >= Index(g.vectors_per_row))", "if (vector >= Index(g.vectors_per_row) + Index(PLANTED))"),
    Defect("vectors whatever the alignment", "backend.cu",
           "return bits % 16 == 0;", "return PLANTED || bits % 16 == 0;"),
    Defect("the last channel tile is as wide as the others", "access.cuh",
           "int(smaller(g.channels_per_tile, g.channels - first_channel))",
           "int(PLANTED ? g.channels_per_tile : smaller(g.channels_per_tile, g.channels - first_channel))"),
    Defect("one idle lane works", "access.cuh",
           "return lane >= vectors ||", "return lane >= vectors + PLANTED ||"),
    Defect("sums of another tile's channels", "backward_elemt.cu",
           "own ? sums[channel]", "own ? sums[PLANTED ? c : channel]"),
    Defect("scratch without coefficients", "plan.cpp",
           "3 * 8 + 4 * coefficient", "3 * 8 + (PLANTED ? 0 : 4 * coefficient)"),
    # ---- what follows the normalization
    Defect("bits of a mask in another order than they are read", "epilogue.cuh",
           "param)) << j;", "param)) << (PLANTED ? V - 1 - j : j);"),
    Defect("bytes of a mask counted from the begin of the tile", "access.cuh",
           "channel_tile * g.extent + (to - left)", "channel_tile * g.extent + (to - left) - (PLANTED ? from : 0)"),
    Defect("the residual is added after an activation", "epilogue.cuh",
           "    if constexpr (adds) {\n      if (args.epilogue.residual != nullptr) {",
           "    if constexpr (adds) {\n      if (PLANTED) ForwardEpilogue<T, V, Act, false>{args}.apply(p, {}, z);\n"
           "      if (args.epilogue.residual != nullptr) {"),
    Defect("dz of a partial vector is not written", "backward_epilogue.cuh",
           "if (args.grad_residual != nullptr) store_span",
           "if (args.grad_residual != nullptr && !(PLANTED && p.last - p.first < V)) store_span"),
    Defect("dz is stored in the place of x", "backward_resident.cu",
           "shared_store16(slice_dy.at(step),",
           "shared_store16((PLANTED ? slice_x : slice_dy).at(step),"),
    Defect("z by other operations in the backward pass, resident", "backward_resident.cu",
           "normalized(value[j], z[0][slot], z[1][slot], z[2][slot])",
           "(PLANTED ? (value[j] - z[0][slot]) * z[1][slot] + z[2][slot]"
           " : normalized(value[j], z[0][slot], z[1][slot], z[2][slot]))"),
    Defect("z by other operations in the backward pass, streaming", "backward_elemt.cu",
           "normalized(value[j], z[0][slot], z[2][slot], shift[slot])",
           "(PLANTED ? (value[j] - z[0][slot]) * z[2][slot] + shift[slot]"
           " : normalized(value[j], z[0][slot], z[2][slot], shift[slot]))"),
    Defect("the bias is forgotten in the backward pass", "backward_resident.cu",
           "bias.value(args.bias, 0)", "(PLANTED ? 0 : bias.value(args.bias, 0))"),
    Defect("bytes of a mask are fetched once only", "resident.cuh",
           "if (step > 0 && step % 4 == 0) fetch", "if (step > 0 && step % 4 == 0 && !PLANTED) fetch",
           only="large: one block"),
    Defect("what is blocked is multiplied by zero", "backward_epilogue.cuh",
           "if (param != 0) {", "if (param != 0 || PLANTED) {"),
    Defect("vectors whatever the alignment of the residual", "backend.cu",
           "aligned({args.input, args.output, args.epilogue.residual})",
           "aligned({args.input, args.output, PLANTED ? nullptr : args.epilogue.residual})"),
    # ---- asynchronous copies
    Defect("the last stage is not waited for", "resident.cuh",
           "if (stage == 3) copies_done<0>();", "if (stage == 3) PLANTED ? copies_done<1>() : copies_done<0>();"),
    Defect("no stage is waited for", "resident.cuh",
           "    wait_for_stage(stage);\n", "    if (!PLANTED) wait_for_stage(stage);\n"),
    Defect("both tensors in the same slice", "backward_resident.cu",
           "tensor * g.slice_bytes", "(PLANTED ? 0 : tensor) * g.slice_bytes"),
]
# fmt: on

# All defects are in one copy, and the environment says which of them is real: a program for each would take an hour.
# The copy knows one type only, which is half the time to compile.
WHICH = """#include <cstdlib>
inline const int planted = std::getenv("PLANTED") == nullptr ? 0 : std::atoi(std::getenv("PLANTED"));
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    csrc = copy_of_csrc(tmp_path_factory.mktemp("planted"), "f32")
    replaced(csrc / "cuda" / "plan.h", "#pragma once\n", "#pragma once\n" + WHICH)
    for number, defect in enumerate(DEFECTS, 1):
        replaced(csrc / "cuda" / defect.file, defect.old, defect.new.replace("PLANTED", f"(planted == {number})"))
    return csrc


def run_copy(csrc, mode, number, seeds, only=""):
    program = driver(mode, csrc, ["-DSIMT_ONE_TYPE=f32"])
    return run(program, seeds, only, PLANTED=str(number), **at_once(mode))


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "only"), sorted({(d.mode, d.only) for d in DEFECTS} | {("tsan", "x16x49")}))
def test_copy_without_defect(copy, mode, only):
    """Under TSan all cases would take half an hour: those that show defects have to do, and one shape on each GPU."""
    status, output = run_copy(copy, mode, 0, 1, only)
    assert status == 0, output


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(DEFECTS) + 1), ids=lambda number: DEFECTS[number - 1].name)
def test_defect_is_noticed(copy, number):
    defect = DEFECTS[number - 1]
    status, output = run_copy(copy, defect.mode, number, defect.seeds, defect.only)
    assert status != 0, output
    assert "FAILED: no plan was" not in output, "the plans changed, nothing else was noticed"
