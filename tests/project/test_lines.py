"""The check of line limits passes on the tree, and finds what is too long."""

import pytest
from checks import assert_no_sources, run, write

pytestmark = pytest.mark.cpu

SCRIPT = "check_lines.py"


def test_the_tree_is_within_the_limits():
    status, output = run(SCRIPT)
    assert status == 0, output


@pytest.mark.parametrize(
    ("name", "lines", "right"),
    [
        ("csrc/cpu/kernels.h", 450, True),
        ("csrc/cpu/kernels.h", 451, False),
        ("fastbn/nn/modules.py", 451, False),
        ("tests/nn/test_module.py", 400, True),
        ("tests/nn/test_module.py", 401, False),
        ("tests/simt/machine.h", 1000, True),
        ("tests/helpers/same_bits.txt", 1000, True),
    ],
)
def test_limits(tmp_path, name, lines, right):
    for path in ("csrc/core/moments.h", name):
        write(tmp_path / path, "\n" * (lines if path == name else 1))
    status, output = run(SCRIPT, tmp_path)
    assert (status == 0) == right and (name in output) != right, output


def test_an_empty_folder_is_an_error(tmp_path):
    assert_no_sources(SCRIPT, tmp_path)
