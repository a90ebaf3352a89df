"""check_resources.py: it parses what ptxas and cuobjdump print, and finds each rule broken in made-up samples."""

import dataclasses

import check_resources as resources
import pytest

pytestmark = pytest.mark.cpu

LOG = """
[1/7] nvcc -c resident.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6fastbn4cuda5statsIfNS0_9RowAccessIfLi4EEELi4EEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN6fastbn4cuda5statsIfNS0_9RowAccessIfLi4EEELi4EEEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 78 registers, used 1 barriers
ptxas info    : Compile time = 38.944 ms
ptxas info    : Compiling entry function '_ZN6fastbn4cuda8residentIfNS0_12ColumnAccessIfLi4EEEEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN6fastbn4cuda8residentIfNS0_12ColumnAccessIfLi4EEEEEvv
    104 bytes stack frame, 132 bytes spill stores, 188 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 104 bytes cumulative stack size, 256 bytes smem, 376 bytes cmem[0]
"""

SASS = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]
	code for sm_80
		Function : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
                                                                               /* 0x000fe40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R11], [R8.64] ;        /* 0x00000000080b7fae */
        /*0020*/              @!P0 STG.E.128 [R2.64], R4 ;                     /* 0x0000000402007986 */
        /*0030*/              @UP1 LDG.E.U16.CONSTANT R4, [R2.64] ;            /* 0x0000000402047981 */
        /*0040*/                   STL.64 [R1], R4 ;                           /* 0x0000000402047981 */
        /*1ff50*/                  STG.E.128 desc[UR4][R2.64], R4 ;            /* 0x0000000402047981 */
Fatbin elf code:
================
arch = sm_90
		Function : first
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0000000402047981 */
"""

GOOD = resources.Kernel(
    "resident<float, RowAccess<float, 4, int>, ForwardEpilogue<float, 4, Relu, true> >",
    "sm_90",
    64,
    0,
    sass={"LDGSTS.E.BYPASS.128": 1, "STG.E.128": 1},
)

MASKED = "backward_resident<Half, RowAccess<Half, 8, int>, BackwardEpilogue<Half, 8, Masked> >"
ANY = "normalize<BFloat16, ColumnAccess<BFloat16, 8, long>, 8, ForwardEpilogue<BFloat16, 8, Any, true> >"


def test_the_log_is_read():
    first, second = resources.parse_log(LOG)
    assert (first.arch, first.registers, first.shared, first.stack, first.spill_stores) == ("sm_90", 78, 0, 0, 0)
    assert (second.arch, second.registers, second.shared) == ("sm_80", 64, 256)
    assert (second.stack, second.spill_stores, second.spill_loads) == (104, 132, 188)
    names = resources.demangle([first.name, second.name])
    assert names == ["stats<float, RowAccess<float, 4>, 4>", "resident<float, ColumnAccess<float, 4> >"]


def test_a_kernel_compiled_again_counts_once():
    assert len(resources.parse_log(LOG + LOG)) == 2


def test_sass_is_read():
    found = resources.parse_sass(SASS.splitlines())
    assert found["first", "sm_80"] == {
        "LDGSTS.E.BYPASS.128": 1,
        "STG.E.128": 2,
        "LDG.E.U16.CONSTANT": 1,
        "STL.64": 1,
    }
    assert found["first", "sm_90"] == {"LDG.E.128": 1}


def test_architectures():
    assert resources.targets("8.0;9.0;10.0+PTX") == {"sm_80", "sm_90", "sm_100"}


def test_the_plans_assumption_is_found():
    assert 32 <= resources.registers_assumed() <= 255


def test_a_good_kernel_passes():
    assert resources.problems_of(GOOD, 64) == []
    reads_other_blocks = dataclasses.replace(GOOD, sass={**GOOD.sass, "LD.E.128": 5})
    assert resources.problems_of(reads_other_blocks, 64) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_stores": 44, "stack": 8}, "spills"),
        ({"spill_stores": 4, "stack": 44}, "spills"),
        ({"stack": 8}, "stack frame"),
        ({"registers": 65}, "registers"),
        ({"sass": {**GOOD.sass, resources.LOCAL_IN_LOOP: 2}}, "2 instructions on local memory"),
        ({"sass": {"LDG.E.128": 8, "STG.E.128": 1, "LD.E.64": 2}}, "has 2 generic accesses"),
        ({"sass": {**GOOD.sass, "LD.E.128": 2, "ST.E.128": 1}}, "has 1 generic accesses"),
        ({"sass": {**GOOD.sass, "LD.E.128": 2}, "arch": "sm_80"}, "has 2 generic accesses"),
        ({"sass": {"LDG.E.64": 8, "STG.E.128": 1}}, "loads no 16 bytes"),
        ({"sass": {"LDG.E.128": 8, "STG.E.U16": 1}}, "stores no 16 bytes"),
        (
            {
                "sass": {},
                "name": "backward_resident<Half, RowAccess<Half, 8, int>, BackwardEpilogue<Half, 8, Masked> >",
            },
            "loads no 16 bytes",
        ),
        (
            {
                "sass": {},
                "name": ANY,
            },
            "stores no 16 bytes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_rule_is_found(change, message):
    assert any(message in problem for problem in resources.problems_of(dataclasses.replace(GOOD, **change), 64))


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("normalize<float, RowAccess<float, 4, long>, 4, ForwardEpilogue<float, 4, Identity, false> >", True),
        ("resident<BFloat16, ColumnAccess<BFloat16, 8, int>, ForwardEpilogue<BFloat16, 8, Any, true> >", True),
        ("normalize<float, RowAccess<float, 1, long>, 1, ForwardEpilogue<float, 1, Any, true> >", False),
        ("update_running", False),
    ],
)
def test_walks_in_whole_vectors_are_known_by_name(name, vectors):
    assert dataclasses.replace(GOOD, name=name).vectors == vectors


def test_a_rule_without_kernels_is_a_broken_rule():
    assert resources.unjudged([GOOD]) == []
    assert len(resources.unjudged([dataclasses.replace(GOOD, name="another<float, Way<float, 4>>")])) == 2


LOOPS = """
		Function : loops
        /*0010*/                   STL [R1], R4 ;
        /*0020*/                   MOV R1, c[0x0][0x28] ;
        /*0030*/                   LDL R4, [R1] ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   LDL R5, [R1] ;
        /*0060*/                   FFMA R4, R5, R6, R4 ;
        /*0070*/              @!P0 BRA P2, 0x40 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/                   LDL R6, [R1] ;
        /*00a0*/               @P0 BRA 0x90 ;
        /*00b0*/                   BRA 0xb0;
"""


def test_local_memory_in_innermost_loops():
    """What the outer loop does once is no matter, nor what is done while a block waits."""
    counts = resources.parse_sass(["arch = sm_90", *LOOPS.splitlines()])["loops", "sm_90"]
    assert counts == {"STL": 1, "LDL": 3, "LDG.E.128": 1, resources.LOCAL_IN_LOOP: 1}
    without = resources.parse_sass(["arch = sm_90", *LOOPS.replace("LDL R5", "LDS R5").splitlines()])
    assert without["loops", "sm_90"] == {"STL": 1, "LDL": 2, "LDG.E.128": 1}


def test_few_registers_may_be_spilled_outside_of_loops():
    outside = {**GOOD.sass, "LDL": 2, "STL": 2}
    for name, spill, sass, holds in [
        (GOOD.name, 40, outside, True),
        (GOOD.name, 44, outside, False),
        (ANY, 40, {**outside, resources.LOCAL_IN_LOOP: 2}, True),
        (MASKED, 4, {**outside, resources.LOCAL_IN_LOOP: 2}, False),
    ]:
        kernel = dataclasses.replace(GOOD, name=name, spill_stores=spill, spill_loads=2 * spill, stack=8, sass=sass)
        assert (resources.problems_of(kernel, 64) == []) == holds


def test_what_need_not_hold():
    """float64 is not judged; sums alone store nothing wide; single values belong to access patterns of one."""
    double = dataclasses.replace(
        GOOD, name="resident<double, RowAccess<double, 2, int>, ForwardEpilogue<double, 2>>", registers=90, stack=8
    )
    sums = dataclasses.replace(GOOD, name="stats<float, RowAccess<float, 4>, 4>", registers=128, sass={"LDG.E.128": 4})
    single = dataclasses.replace(GOOD, name="normalize<float, RowAccess<float, 1>, 1, Identity>", sass={"LDG.E": 4})
    for kernel in (double, sums, single):
        assert resources.problems_of(kernel, 64) == []
