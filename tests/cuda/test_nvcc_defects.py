"""Defects in what only nvcc compiles, planted in a copy of csrc/cuda: executing the PTX finds each of them.

g++ sees the same text with and without a defect, so the C++ kernels in the emulator cannot notice any."""

import subprocess
from dataclasses import dataclass

import pytest
from ptx.build import HERE, find_nvcc, library
from ptx.cases import entries, run_case
from simt.build import CSRC, build, run
from simt.copies import copy_of_csrc, replaced

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")]

# Both access patterns of the resident forward kernel for bfloat16, without an activation.
ENTRIES = entries("bf16", kernels="resident", epilogues="Identity")
CASES = {
    "rows": ["layout=first", "N=32", "C=2", "S=1152"],
    "columns": ["layout=last", "N=4", "C=64", "S=256"],
}


@dataclass(frozen=True)
class Defect:
    name: str
    edits: tuple[tuple[str, str, str], ...]  # file in csrc/cuda, what occurs there once, what takes its place
    words: str  # of the error, or of the comparison with the C++ kernels
    cases: tuple[str, ...] = ("rows", "columns")


COPY = 'asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"'
WAIT = 'asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");'
STALE = "with no release, acquire and barrier in between"
TOO_EARLY = "reads an asynchronous copy of its own before waiting for it"
PAIR = "const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);\n  uint32_t word;\n  memcpy(&word, &pair, 4);"
SHARED_LOAD = """  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
FASTBN_D void shared_store16"""
GENERIC_LOAD = """  uint4 v;
  asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return {{v.x, v.y, v.z, v.w}};
}
FASTBN_D void shared_store16"""
ROUND_TO_ZERO = """uint32_t word;
  asm("cvt.rz.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));"""
RELEASE = "red.release.gpu.global.add.u32"
ACQUIRE = 'asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");'
ACQUIRE_WITHOUT_CLOBBER = 'asm("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));'


def in_device(old, new):
    return (("device.cuh", old, new),)


DEFECTS = [
    Defect("a copy of 8 bytes", in_device(COPY, COPY.replace("16;", "16, 8;")), "y differs"),
    Defect("a copy from the next 16 bytes",
           in_device('"l"(global)', '"l"(static_cast<const char*>(global) + 16)'), "y differs"),
    Defect("a wait for all copies but one more", in_device(WAIT, WAIT.replace('"n"(n)', '"n"(n + 1)')), TOO_EARLY),
    Defect("a relaxed load where acquire is needed", in_device("ld.acquire", "ld.relaxed"), STALE),
    Defect("a relaxed addition where release is needed",
           in_device(RELEASE, RELEASE.replace("release", "relaxed")), STALE),
    Defect("partial results through the first-level cache", in_device("return __ldcg(p);", "return __ldg(p);"),
           "load() of what this launch wrote"),
    Defect("bfloat16 rounded towards zero", (("vector.cuh", PAIR, ROUND_TO_ZERO),), "y differs"),
    Defect("two halves of a word exchanged",
           (("vector.cuh", "bfloat162_rn(in[0], in[1])", "bfloat162_rn(in[1], in[0])"),), "y differs"),
    Defect("a generic access to shared memory", in_device(SHARED_LOAD, GENERIC_LOAD),
           "generic access to shared memory"),
]  # fmt: skip


def what_is_noticed(csrc, cases):
    """What a run from the PTX of csrc shows: errors, and outputs that are not those of the C++ kernels."""
    translated = library(csrc=csrc, kernels=[csrc / "cuda" / "resident.cu"], only=ENTRIES)
    noticed = []
    for name in cases:
        arguments = [*CASES[name], "backward=0"]
        _, right = run_case(*arguments)
        try:
            _, found = run_case(*arguments, library=translated, timeout=20)
        except RuntimeError as error:
            noticed.append(str(error))
        else:
            noticed += ["y differs"] if found["y"] != right["y"] else []
    return noticed


def copy_with(edits, folder):
    csrc = copy_of_csrc(folder, "bf16", identity=True)
    for file, old, new in edits:
        replaced(csrc / "cuda" / file, old, new)
    return csrc


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A copy without a defect."""
    return copy_with((), tmp_path_factory.mktemp("right"))


def as_gcc_sees_it(csrc):
    """resident.cu after the preprocessor, without line numbers."""
    command = ["g++", "-std=c++20", "-E", "-P", f"-I{csrc}", f"-I{CSRC.parent / 'tests' / 'simt'}", "-x", "c++"]
    return subprocess.run([*command, csrc / "cuda" / "resident.cu"], capture_output=True, text=True, check=True).stdout


def test_nothing_is_noticed_where_nothing_is_wrong(right):
    assert what_is_noticed(right, CASES) == []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_defect_is_noticed(defect, right, tmp_path):
    csrc = copy_with(defect.edits, tmp_path)
    assert as_gcc_sees_it(csrc) == as_gcc_sees_it(right), "the emulator can see it too"
    noticed = what_is_noticed(csrc, defect.cases)
    assert len(noticed) == len(defect.cases), noticed
    for text in noticed:
        assert defect.words in text


def test_a_missing_memory_clobber_is_noticed(right, tmp_path):
    """nvcc then loads once, before the loop that waits for another value, where it finds that worth while: not in the
    kernels of csrc as they are, but in a small one that calls the same function."""
    csrc, kernel = copy_with(in_device(ACQUIRE, ACQUIRE_WITHOUT_CLOBBER), tmp_path), HERE / "small.cu"
    assert as_gcc_sees_it(csrc) == as_gcc_sees_it(right), "the emulator can see it too"
    program = build([kernel], "plain")
    good = library(kernels=[kernel])
    assert run(program, "barriers", timeout=20, FASTBN_SIMT_PTX=str(good)) == run(program, "barriers")
    wrong = library(kernels=[kernel], csrc=csrc)
    with pytest.raises(subprocess.TimeoutExpired):
        run(program, "barriers", timeout=20, FASTBN_SIMT_PTX=str(wrong))
