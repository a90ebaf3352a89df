"""The annotations of the installed package, as a user's type checker reads them (py.typed)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn

pytestmark = pytest.mark.cpu

PROGRAM = Path(__file__).with_name("typed_program.py")
WRONG = {
    "a keyword that is not there": ("fastbn.BatchNorm2d(8, mometum=0.1)", "call-arg"),
    "a string for a number": ("fastbn.BatchNorm2d('8')", "arg-type"),
    "no tensor": ("fastbn.functional.batch_norm([1.0], None, None)", "arg-type"),
    "an attribute that is not there": ("fastbn.report(fastbn.BatchNorm1d(3)).fussed", "attr-defined"),
    "a name that is not there": ("fastbn.BatchNorm4d", "attr-defined"),
}


def mypy(folder, *arguments):
    """Exit status and output of mypy --strict, with no settings but these."""
    pytest.importorskip("mypy", reason="make venv installs mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_the_program_uses_every_public_name():
    tree = ast.parse(PROGRAM.read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    functions = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "F"}
    assert set(fastbn.__all__) <= used
    assert set(fastbn.functional.__all__) <= functions


def test_a_program_passes_mypy_strict(cache):
    status, output = mypy(cache, str(PROGRAM))
    assert status == 0, output


def test_mistakes_are_found(cache):
    lines = [line for line, _ in WRONG.values()]
    (cache / "wrong.py").write_text("\n".join(["import fastbn", *lines, ""]))
    status, output = mypy(cache, "wrong.py")
    assert status == 1
    for number, (name, (_, code)) in enumerate(WRONG.items(), 2):
        assert f"wrong.py:{number}: error" in output and f"[{code}]" in output, (name, output)
