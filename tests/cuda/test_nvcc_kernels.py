"""The CUDA kernels executed from the PTX that nvcc generates, compared with float64 and with what g++ generates.

With `nvcc -fmad=false` the results equal those of the C++ kernels in the emulator bit by bit: nvcc, g++, the translator
and the emulator agree in every operation. With nvcc's defaults only contraction to fused operations differs."""

import itertools
from functools import cache

import numpy as np
import pytest
from ptx.build import find_nvcc, library
from ptx.cases import entries, numbers, run_case
from simt.build import CSRC, HERE, backend_sources, build, run
from simt.copies import copy_of_csrc

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")]


def run_driver(translated, *arguments, defines=(), **environment):
    program = build([*backend_sources(CSRC), HERE / "driver.cpp"], "plain", CSRC, defines)
    return run(program, *arguments, FASTBN_SIMT_PTX=str(translated), **environment)


@pytest.fixture(scope="module")
def csrc_of(tmp_path_factory):
    """csrc_of(dtype): a copy of csrc with the kernels of that type alone, in a quarter of the time."""
    return cache(lambda dtype: copy_of_csrc(tmp_path_factory.mktemp(dtype), dtype))


def test_kernels_of_float32(csrc_of):
    one = library("sm_90", csrc=csrc_of("f32"), only=entries("f32", scalar=True) + "|update_running|gather_rank_stats")
    status, output = run_driver(one, 1, defines=["-DSIMT_ONE_TYPE=f32"])
    assert status == 0, output


# Of sm_80 only backward_resident.cu is another one, so half of the schedules have to do.
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "seeds"), [("sm_80", 4), ("sm_90", 8)])
def test_kernels(arch, seeds):
    status, output = run_driver(library(arch), seeds)
    assert status == 0, output


@pytest.mark.slow
def test_kernels_with_approximations_that_are_two_units_off():
    status, output = run_driver(library("sm_90"), 1, FASTBN_PTX_APPROX="2")
    assert status == 0, output


# ---- the same bits as the C++ kernels --------------------------------------------------------------------------------

PLANS = {  # layout, sizes and device
    "rows, several blocks": ["layout=first", "N=32", "C=3", "S=1152"],
    "rows, one block": ["layout=first", "N=8", "C=6", "S=196"],
    "columns": ["layout=last", "N=4", "C=64", "S=256"],
    "streaming rows": ["layout=first", "N=32", "C=2", "S=1152", "cooperative=0"],
    "streaming columns": ["layout=last", "N=16", "C=64", "S=256", "cooperative=0"],
}
EPILOGUES = {
    "batch norm": [],
    "relu": ["activation=relu"],
    "add, relu, mask": ["activation=relu", "residual=1", "mask=1"],
}
CASES = {", ".join(names): PLANS[names[0]] + EPILOGUES[names[1]] for names in itertools.product(PLANS, EPILOGUES)}
QUICK = ["f32", "bf16"]
dtypes = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[] if dtype in QUICK else pytest.mark.slow) for dtype in QUICK + ["f16", "f64"]]
)


def cases_of(dtype):
    """float64 has no masks; its kernels with an activation are those for any activation."""
    for name, arguments in CASES.items():
        yield name, [f"dtype={dtype}", *(a for a in arguments if (a, dtype) != ("mask=1", "f64"))]


def library_for(dtype, csrc, flags):
    epilogues = r"\w+" if dtype == "f64" else "Identity|Relu|Masked|Li8EE|Li4EE"
    return library(csrc=csrc, only=entries(dtype, epilogues=epilogues), flags=flags)


@dtypes
def test_without_contraction_the_bits_are_those_of_the_emulator(dtype, csrc_of):
    translated = library_for(dtype, csrc_of(dtype), ["-fmad=false"])
    for name, arguments in cases_of(dtype):
        _, right = run_case(*arguments)
        _, found = run_case(*arguments, library=translated)
        assert [r for r in right if right[r] != found[r]] == [], name


# The largest difference that contraction makes, over the largest value of the result. A sum of products that is fused
# rounds once where the C++ kernel rounds twice: half a unit in the last place of each term. In 16-bit types such a
# difference moves a result by at most one unit in the last place, and seldom at all.
UNIT = {"f32": 2.0**-23, "f64": 2.0**-52, "f16": 2.0**-10, "bf16": 2.0**-7}
ALLOWED = {"y": 4, "dx": 16, "dr": 0}  # in units of the type
ALLOWED_SUMS = {"moments": 1e-7, "dw": 1e-5, "db": 1e-5}
SELDOM = {"f16": 0.01, "bf16": 0.01}


@dtypes
def test_contraction_changes_little(dtype, csrc_of):
    translated = library_for(dtype, csrc_of(dtype), [])
    for name, arguments in cases_of(dtype):
        _, right = run_case(*arguments)
        _, found = run_case(*arguments, library=translated)
        assert found["mask"] == right["mask"], name
        for result in [r for r in right if r != "mask"]:
            a, b = numbers(result, right[result], dtype), numbers(result, found[result], dtype)
            if result == "dr" and "activation=relu" not in arguments:
                continue
            if np.isnan(a).any():
                assert right[result] == found[result], (name, result)  # it was not written
                continue
            allowed = ALLOWED_SUMS.get(result) or (1 if dtype in SELDOM else ALLOWED[result]) * UNIT[dtype]
            differ = a != b
            worst = np.abs(a - b).max() / np.abs(a).max()
            assert worst <= allowed, (name, result, worst / UNIT[dtype])
            if dtype in SELDOM and result in ALLOWED:
                assert differ.mean() <= SELDOM[dtype], (name, result, differ.mean())
