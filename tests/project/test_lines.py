"""The check of line limits passes on the tree, and finds what is too long."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "check_lines.py"


def run(*arguments):
    result = subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_the_tree_is_within_the_limits():
    status, output = run()
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
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("\n" * (lines if path == name else 1))
    status, output = run(tmp_path)
    assert (status == 0) == right and (name in output) != right, output


def test_an_empty_folder_is_an_error(tmp_path):
    assert run(tmp_path)[0] == 1
