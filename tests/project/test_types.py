"""The annotations of the installed package, as a user's type checker reads them (py.typed)."""

import ast
import json
import os
import re
import shutil
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


def pyright(folder, *names):
    """Exit status and output in strict mode, but for types that torch's own functions leave unknown."""
    pytest.importorskip("pyright", reason="make venv installs pyright")
    if shutil.which("node") is None:
        pytest.skip("pyright runs in node, which is not there, and would fetch it")
    settings = {"typeCheckingMode": "strict", "reportUnknownMemberType": False, "include": names}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
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


def test_a_program_passes_pyright_strict(tmp_path):
    shutil.copy(PROGRAM, tmp_path)
    status, output = pyright(tmp_path, PROGRAM.name)
    assert status == 0, output


def test_pyright_finds_the_mistakes(tmp_path):
    (tmp_path / "wrong.py").write_text("\n".join(["import fastbn", *(line for line, _ in WRONG.values()), ""]))
    status, output = pyright(tmp_path, "wrong.py")
    assert status == 1
    assert {int(line) for line in re.findall(r"wrong.py:(\d+):\d+ - error", output)} == set(range(2, 2 + len(WRONG)))
