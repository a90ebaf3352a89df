"""The CUDA kernels, executed on the CPU by tests/simt/driver.cpp without torch, under schedules and sanitizers.

The driver compares with float64. It also has to fail for each defect that is planted in a copy of the kernels."""

import shutil
from dataclasses import dataclass

import pytest
from simt.build import CSRC, HERE, backend_sources, build, run


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
@pytest.mark.parametrize(("mode", "seeds"), [("plain", 8), ("asan", 1), ("tsan", 1)])
def test_kernels_under(mode, seeds):
    status, output = run(driver(mode), seeds, **at_once(mode))
    assert status == 0, output


# ---- planted defects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    name: str
    file: str  # in csrc/cuda
    old: str  # occurs there exactly once
    new: str  # the same, but where PLANTED is true
    mode: str = "plain"  # in which the driver fails
    seeds: int = 1


END_OF_TILE = "    __syncthreads();  // the scratch is written again for the next channel tile\n"

# fmt: off
DEFECTS = [
    # ---- within a block
    Defect("no barrier before warps' sums are read", "reduce.cuh",
           "  __syncthreads();\n  if (threadIdx.x < 2) {",
           "  if (!PLANTED) __syncthreads();\n  if (threadIdx.x < 2) {"),
    Defect("no barrier between warps that share columns", "reduce.cuh",
           "    __syncthreads();\n  }\n  const auto column",
           "    if (!PLANTED) __syncthreads();\n  }\n  const auto column"),
    Defect("no barrier after pivots", "channel.cuh",
           "would spoil the sums\n  }\n  __syncthreads();",
           "would spoil the sums\n  }\n  if (!PLANTED) __syncthreads();"),
    Defect("no barrier before partial results overwrite sums", "channel.cuh",
           "  __syncthreads();  // the partial results overwrite the sums\n",
           "  if (!PLANTED) __syncthreads();\n"),
    Defect("no barrier at the end of a channel tile, forward", "resident.cu",
           END_OF_TILE, "    if (!PLANTED) __syncthreads();\n", "tsan"),
    Defect("no barrier at the end of a channel tile, backward", "backward_resident.cu",
           END_OF_TILE, "    if (!PLANTED) __syncthreads();\n", "tsan"),
    Defect("half a warp in the mask", "reduce.cuh",
           "__shfl_xor_sync(all_lanes, x, distance)", "__shfl_xor_sync(PLANTED ? 0xffffu : all_lanes, x, distance)"),
    Defect("the last warp's sum is left out", "reduce.cuh",
           "for (int i = 0; i < warps_per_block; ++i)", "for (int i = 0; i < warps_per_block - PLANTED; ++i)"),
    Defect("lanes that own no column write one", "reduce.cuh",
           "if (!holds) continue;", "if (!holds && !PLANTED) continue;"),
    # ---- between blocks
    Defect("no fence before a group's barrier", "reduce.cuh",
           "    fence();\n    const unsigned before", "    if (!PLANTED) fence();\n    const unsigned before", "tsan"),
    Defect("no fence before a ticket", "reduce.cuh",
           "    fence();\n    last =", "    if (!PLANTED) fence();\n    last =", "tsan"),
    Defect("no fence after a ticket", "reduce.cuh",
           "== blocks - 1;\n    fence();", "== blocks - 1;\n    if (!PLANTED) fence();", "tsan"),
    Defect("the group does not wait", "reduce.cuh",
           "return ((load_acquire(counter) ^ before) & flag) != 0;",
           "return PLANTED || ((load_acquire(counter) ^ before) & flag) != 0;"),
    Defect("one arrival too few for the flip", "reduce.cuh",
           "flag - (blocks - 1)", "flag - (blocks - !PLANTED)"),
    Defect("the ticket is not reset", "reduce.cuh",
           "increment_until(counter, blocks - 1)",
           "(PLANTED ? add(counter, 1) : increment_until(counter, blocks - 1))"),
    Defect("not cooperative, forward", "resident.cu",
           "plan.shared_bytes, plan.cooperative,", "plan.shared_bytes, plan.cooperative && !PLANTED,"),
    Defect("not cooperative, backward", "backward_resident.cu",
           "plan.shared_bytes, plan.cooperative,", "plan.shared_bytes, plan.cooperative && !PLANTED,"),
    Defect("one set of partial results, forward", "resident.cu",
           "(2 * group + set)", "(2 * group + (PLANTED ? 0 : set))"),
    Defect("one set of partial results, backward", "backward_resident.cu",
           "(2 * group + set)", "(2 * group + (PLANTED ? 0 : set))"),
    Defect("a tile's count is left out of the merge", "reduce.cuh",
           "{p.n * d, p.m2 + p.n * d * d}", "{(PLANTED ? 1 : p.n) * d, p.m2 + (PLANTED ? 1 : p.n) * d * d}"),
    Defect("workspace for one set of partial results", "plan.cpp",
           "2 * plan.blocks * plan.channels_per_tile", "(2 - PLANTED) * plan.blocks * plan.channels_per_tile"),
    # ---- vectors, their ends, channel_tiles
    Defect("a row begins where its vector begins", "access.cuh",
           "at < 0 ? int(-at) : 0", "at < 0 && !PLANTED ? int(-at) : 0"),
    Defect("elements beside a row are summed", "access.cuh",
           "if (j >= p.first && j < p.last) body(j,", "if (PLANTED || (j >= p.first && j < p.last)) body(j,"),
    Defect("elements beside a row are stored", "access.cuh",
           "if (j >= p.first && j < p.last) store(y", "if (PLANTED || (j >= p.first && j < p.last)) store(y"),
    Defect("a step too far along a row", "access.cuh",
           "if (vector >= Index(g.vectors_per_row))", "if (vector >= Index(g.vectors_per_row) + PLANTED)"),
    Defect("vectors whatever the alignment", "backend.cu",
           "return bits % 16 == 0;", "return PLANTED || bits % 16 == 0;"),
    Defect("the last channel tile is as wide as the others", "access.cuh",
           "int(smaller(g.channels_per_tile, g.channels - first_channel))",
           "int(PLANTED ? g.channels_per_tile : smaller(g.channels_per_tile, g.channels - first_channel))"),
    Defect("one idle lane works", "access.cuh",
           "return lane() >= vectors;", "return lane() >= vectors + PLANTED;"),
    Defect("sums of another tile's channels", "backward_elemt.cu",
           "own ? sums[channel]", "own ? sums[PLANTED ? c : channel]"),
    Defect("scratch without coefficients", "plan.cpp",
           "(3 * 8 + 4 * coefficient)", "(3 * 8 + (PLANTED ? 0 : 4 * coefficient))"),
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
           "shared_store16(slice_dy.at(access, step),",
           "shared_store16((PLANTED ? slice_x : slice_dy).at(access, step),"),
    Defect("z by other operations in the backward pass, resident", "backward_resident.cu",
           "normalized(value[j], z[0][slot], z[1][slot], z[2][slot])",
           "(PLANTED ? (value[j] - z[0][slot]) * z[1][slot] + z[2][slot]"
           " : normalized(value[j], z[0][slot], z[1][slot], z[2][slot]))"),
    Defect("z by other operations in the backward pass, streaming", "backward_elemt.cu",
           "normalized(value[j], z[0][slot], z[2][slot], shift[slot])",
           "(PLANTED ? (value[j] - z[0][slot]) * z[2][slot] + shift[slot]"
           " : normalized(value[j], z[0][slot], z[2][slot], shift[slot]))"),
    Defect("the bias is forgotten in the backward pass", "channel.cuh",
           "read(args.bias, channel, 0)",
           "(PLANTED && std::is_same_v<Args, Backward> ? 0 : read(args.bias, channel, 0))"),
    Defect("bytes of a mask are fetched once only", "resident.cuh",
           "if (step > 0 && step % 4 == 0) fetch", "if (step > 0 && step % 4 == 0 && !PLANTED) fetch"),
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
           "shared + g.slices_offset + g.slice_bytes", "shared + g.slices_offset + (PLANTED ? 0 : g.slice_bytes)"),
]
# fmt: on

# All defects are in one copy, and the environment says which of them is real: a program for each would take an hour.
# The copy knows one type only, which is half the time to compile.
WHICH = """#include <cstdlib>
inline const int planted = std::getenv("PLANTED") == nullptr ? 0 : std::atoi(std::getenv("PLANTED"));
"""
ONE_TYPE = """namespace fastbn::cuda {
template <class Body>
void dispatch_one(DType, const Body& body) {
  body(Type<float>{});
}
"""


def replaced(path, old, new, times=1):
    text = path.read_text()
    assert text.count(old) == times, f"{path.name} should have {times} of: {old}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    csrc = tmp_path_factory.mktemp("planted") / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(CSRC / part, csrc / part)
    replaced(csrc / "cuda" / "plan.h", "#pragma once\n", "#pragma once\n" + WHICH)
    launch = csrc / "cuda" / "launch.cuh"
    replaced(launch, "dispatch_dtype(dtype, [&](auto type) {", "dispatch_one(dtype, [&](auto type) {", times=2)
    replaced(launch, "namespace fastbn::cuda {\n", ONE_TYPE)
    for number, defect in enumerate(DEFECTS, 1):
        replaced(csrc / "cuda" / defect.file, defect.old, defect.new.replace("PLANTED", f"(planted == {number})"))
    return csrc


def run_copy(csrc, mode, number, seeds):
    program = driver(mode, csrc, ["-DSIMT_ONE_TYPE"])
    return run(program, seeds, PLANTED=str(number), **at_once(mode))


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_copy_without_defect(copy, mode):
    status, output = run_copy(copy, mode, 0, 1)
    assert status == 0, output


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(DEFECTS) + 1), ids=lambda number: DEFECTS[number - 1].name)
def test_defect_is_noticed(copy, number):
    defect = DEFECTS[number - 1]
    status, output = run_copy(copy, defect.mode, number, defect.seeds)
    assert status != 0, output
    assert "FAILED: no plan was" not in output, "the plans changed, nothing else was noticed"
