"""The translator of tests/ptx on small pieces of PTX: what it knows, and that it names what it does not know."""

import re

import pytest
from ptx.flow import Flow
from ptx.parse import Parser, Unknown, normalized, split_operands
from ptx.translate import translate

pytestmark = pytest.mark.cpu

HEAD = """
.version 9.0
.target sm_90
.visible .entry kernel(.param .u64 kernel_param_0)
"""
REGISTERS = "\t.reg .pred %p<4>;\n\t.reg .b32 %r<9>;\n\t.reg .b64 %rd<9>;\n\t.reg .f32 %f<9>;\n"


def entry(body):
    return f"{HEAD}{{\n{REGISTERS}{body}\n\tret;\n}}\n"


def cpp(body):
    sources, chosen, count = translate(entry(body), "small.ptx")
    assert (chosen, count, len(sources)) == (1, 1, 1)
    return sources[0]


@pytest.mark.parametrize(
    ("instruction", "written"),
    [
        ("add.s32 %r1, %r2, -1;", "uint32_t(as<int32_t>(r2)) + uint32_t(int32_t(0xffffffffffffffffull))"),
        ("fma.rn.f32 %f1, %f2, %f3, 0f3F800000;", "f1 = std::fma(f2, f3, float_of(0x3F800000u));"),
        ("@!%p1 bra $L;", "if (!p1) { goto L_L; }"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;", "t.copy_async(r1, rd1, 16u, 16u, 0);"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16, 8;", "t.copy_async(r1, rd1, 16u, uint32_t(0x8ull), 0);"),
        ("cp.async.wait_group 3;", "t.copies_wait(3);"),
        ("ld.acquire.gpu.u32 %r1, [%rd1];", "t.ld_ordered(rd1, order::acquire, 0)"),
        ("ld.relaxed.gpu.u32 %r1, [%rd1];", "t.ld_ordered(rd1, order::relaxed, 0)"),
        ("atom.release.gpu.global.add.u32 %r1, [%rd1], 1;", "t.atomic(rd1, uint32_t(0x1ull), order::release, 0"),
        ("cvt.rz.bf16x2.f32 %r1, %f1, %f2;", "uint32_t(bfloat_rz(f1)) << 16 | uint32_t(bfloat_rz(f2))"),
        ("ld.f32 %f1, [%rd1+4];", "t.ld_generic<float, 1>(rd1 + uint64_t(4ll), way::plain, 0)"),
        ("membar.gl;", "t.fence();"),
        ("{ .reg .b32 %t; mov.b32 %t, %r1; }", "uint32_t t;"),
    ],
)
def test_instructions(instruction, written):
    assert written in cpp(f"$L:\n{instruction}")


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.fence.sync.aligned;",
        "mbarrier.init.shared.b64 [%rd1], 1;",
        "cp.async.bulk.commit_group;",
        "add.rz.f32 %f1, %f2, %f3;",
        "add.ftz.f32 %f1, %f2, %f3;",
        "fma.rz.f32 %f1, %f2, %f3, %f4;",
        "ld.acquire.cta.u32 %r1, [%rd1];",
        "atom.global.cas.b32 %r1, [%rd1], 0, 1;",
        "cvt.rp.f32.f64 %f1, %rd1;",
        "bar.sync 1;",
        "mov.u32 %r1, %smid;",
        "call helper;",
    ],
)
def test_an_unknown_instruction_is_an_error_that_names_it(instruction):
    with pytest.raises(Unknown) as error:
        cpp(instruction)
    assert instruction.rstrip(";") in str(error.value)
    assert "small.ptx:" in str(error.value)


def test_functions_and_constants_are_errors():
    with pytest.raises(Unknown, match=r"\.func helper"):
        translate(".func helper()\n{\n}\n" + entry(""), "small.ptx")


def test_entries_of_unnamed_namespaces_have_the_names_of_gcc():
    nvcc = "_ZN6fastbn46_GLOBAL__N__53bd4d84_11_resident_cu_36b0e0e8_9398kernelEv"
    name = re.sub(r"\d+_GLOBAL__N__", f"{len(nvcc) - len('_ZN6fastbn46') - len('8kernelEv')}_GLOBAL__N__", nvcc)
    assert normalized(name) == "_ZN6fastbn12_GLOBAL__N_18kernelEv"


def test_operands_in_brackets_stay_together():
    assert split_operands(" [%rd1+4], {%r1, %r2}, %p1 ") == ["[%rd1+4]", "{%r1, %r2}", "%p1"]


def test_loops_are_found_with_the_loops_around_them():
    body = """
    mov.u32 %r1, 0;
$outer:
    mov.u32 %r2, 0;
$inner:
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p1, %r2, 4;
    @%p1 bra $inner;
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p2, %r1, 4;
    @%p2 bra $outer;
"""
    flow = Flow(Parser(entry(body), "small.ptx").parse()[0][0])
    assert [len(chain) for chain in flow.chain] == [0, 1, 2, 1, 0]
    assert flow.latches == [[3], [2]]
