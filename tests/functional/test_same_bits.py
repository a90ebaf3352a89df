"""Results have the same bits as when same_bits.txt was written, for each instruction set and in the emulator."""

import platform

import pytest
import same_bits

CPU_COLUMNS = [pytest.param(name, marks=pytest.mark.cpu) for name in same_bits.CAPABILITIES]
SIMT_COLUMN = pytest.param("simt", marks=[pytest.mark.simt, pytest.mark.simt_quick])


@pytest.mark.parametrize("column", [*CPU_COLUMNS, SIMT_COLUMN])
def test_bits_are_those_of_the_file(backend, column):
    if backend.name == "ptx":
        pytest.skip("nvcc fuses other operations than g++")
    if platform.machine() != "x86_64":
        pytest.skip("the digests are of x86-64, and other architectures fuse other operations (make arm)")
    header, digests = same_bits.stored()
    environment = same_bits.environment()
    if environment["compiler"] != header["compiler"]:
        pytest.skip(f"the digests are of {header['compiler']}, and another compiler may fuse other operations")
    if column not in same_bits.columns():
        pytest.skip(f"this processor has no {column}")
    if set(digests[column].values()) == {same_bits.UNKNOWN}:
        pytest.skip(
            f"no digests of {column} since the last change of bits: run same_bits.py --update on this processor"
        )
    found, expected = same_bits.compute(column), digests[column]
    assert list(found) == list(expected), "cases were added or removed: same_bits.py --update"
    same_libc = environment["libc"] == header["libc"]
    changed = [name for name in found if found[name] != expected[name] and (same_libc or "/libm" not in name)]
    assert not changed, f"{len(changed)} of {len(found)} cases with other bits: {changed[:20]}"
    of_threads = {}
    for name, value in found.items():
        if name.startswith("threads/"):
            of_threads.setdefault(name.rsplit("/", 1)[0], set()).add(value)
    assert all(len(values) == 1 for values in of_threads.values()), of_threads


def test_there_are_enough_cases():
    """So that a list which has lost its cases is no success."""
    _, digests = same_bits.stored()
    assert all(len(digests[name]) >= 300 for name in same_bits.CAPABILITIES) and len(digests["simt"]) >= 80
