"""The build for 64-bit Arm: tests/arm compiles as setup.py does, which passes no option of one architecture alone."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def flags_of_setup():
    text = re.search(r"^    flags = (\[.*?\])$", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)[1]
    return ast.literal_eval(text)


def test_the_driver_is_compiled_with_the_flags_of_setup():
    spec = importlib.util.spec_from_file_location("arm_run", ROOT / "tests" / "arm" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    assert [*run.FLAGS, "-fopenmp"] == sorted(flags_of_setup(), key=[*run.FLAGS, "-fopenmp"].index)


def test_no_flag_is_of_one_architecture():
    """Such options begin with -m. Wider instruction sets are chosen in the sources, with #if."""
    assert not [flag for flag in re.findall(r'"(-[^"]*)"', (ROOT / "setup.py").read_text()) if flag.startswith("-m")]
