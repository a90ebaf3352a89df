"""Runs a check script of tests/ (check_imports.py, check_includes.py, check_lines.py) on a tree, broken or not."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run(script: str, *arguments: object) -> tuple[int, str]:
    """Exit status and output of tests/`script`."""
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def assert_one_problem(script: str, root: Path, name: str) -> None:
    """The script finds one broken rule under `root`, in the file `name`."""
    status, output = run(script, root)
    assert status == 1
    assert name in output
    assert len(output.splitlines()) == 1, "one rule was broken, one line is due"


def assert_no_sources(script: str, root: Path) -> None:
    status, output = run(script, root)
    assert status == 1
    assert "no sources found" in output
