"""Check the include rules of csrc/, one rule a folder: a line for each broken rule, and exit status 1 if there are any.

Usage: check_includes.py [csrc folder]
"""

import re
import sys
from pathlib import Path

# For each folder, which is a layer, the folders whose headers its files may include.
MAY_INCLUDE = {
    "core": {"core"},
    "runtime": {"core", "runtime"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "runtime", "cpu", "cuda", "torch"},
}
# Kernels build and run without torch, and nvcc never sees its headers.
MAY_INCLUDE_TORCH = {"torch"}
MAY_INCLUDE_CUDA = {"cuda", "torch"}
# The emulator of tests/simt, which stands in for the CUDA headers where g++ compiles the kernels.
EMULATOR = ("cuda/device.cuh", '"simt.h"')
SUFFIXES = {".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inc"}
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include(?:_next)?\b[ \t]*(.*)$", re.MULTILINE)
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h$")
CUDA = re.compile(r"(cuda|cub|thrust|nv|cooperative_groups)[^/]*(/|\.h$)")


def problem_with(root: Path, path: Path, target: str) -> str | None:
    """What is wrong with ``#include target`` in ``path`` (relative to ``root``), or None."""
    folder, name = path.parts[0], target[1:-1]
    if not re.fullmatch(r'"[^"]+"|<[^>]+>', target):
        return "cannot be read: name the file"
    if (path.as_posix(), target) == EMULATOR:
        return None
    if TORCH.match(name):
        return None if folder in MAY_INCLUDE_TORCH else f"{folder}/ must not include torch"
    if CUDA.match(name):
        return None if folder in MAY_INCLUDE_CUDA else f"{folder}/ must not include CUDA"
    if target.startswith("<"):
        return None
    found = (root / path.parent / name).resolve()
    if not found.is_file() or not found.is_relative_to(root):
        return "is no file of csrc/, by its path from here"
    other = found.relative_to(root).parts[0]
    return None if other in MAY_INCLUDE[folder] else f"{folder}/ must not include {other}/"


def check(root: Path) -> list[str]:
    """Every broken rule under ``root``, as ``file:line: message``."""
    root = root.resolve()
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        return [f"{root}: no sources found"]
    problems = []
    for file in files:
        path = file.relative_to(root)
        if path.parts[0] not in MAY_INCLUDE:
            problems.append(f"{path}: is in none of the folders {', '.join(MAY_INCLUDE)}")
            continue
        text = file.read_text()
        for match in INCLUDE.finditer(text):
            target = re.sub(r"\s*(//|/\*).*$", "", match[1]).strip()
            if problem := problem_with(root, path, target):
                line = text.count("\n", 0, match.start()) + 1
                problems.append(f"{path}:{line}: #include {target}: {problem}")
    return problems


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "csrc"
    found = check(Path(folder))
    print("\n".join(found) or "includes: every rule holds")
    sys.exit(bool(found))
