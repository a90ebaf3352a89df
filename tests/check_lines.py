"""Hold the line limits: print a line for each file that is too long, and exit with status 1 if there is one.

450 lines in csrc/, fastbn/ and tests/, 400 in a file of tests.

Usage: check_lines.py [repository]
"""

import sys
from pathlib import Path

FOLDERS = ("csrc", "fastbn", "tests")
SUFFIXES = {".py", ".pyi", ".h", ".cuh", ".cpp", ".cu"}
LIMIT, LIMIT_OF_TESTS = 450, 400
EXCEPTIONS = {
    "tests/simt/machine.h": "one machine: its parts (fibers, barriers, memory, schedules) share all of their state",
}


def check(root: Path) -> list[str]:
    """A message for each file under `root` that is longer than its limit."""
    problems, found = [], 0
    for file in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES):
        name, found = file.relative_to(root).as_posix(), found + 1
        limit = LIMIT_OF_TESTS if file.name.startswith("test_") else LIMIT
        lines = len(file.read_text().splitlines())
        if lines > limit and name not in EXCEPTIONS:
            problems.append(f"{name}: has {lines} lines, of at most {limit}")
    return problems if found else [f"{root}: no sources found"]


if __name__ == "__main__":
    broken = check(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]))
    print("\n".join(broken) or "lines: every file is within its limit")
    sys.exit(bool(broken))
