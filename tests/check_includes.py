"""Hold the include rules of csrc/: sources flow in; a line for each broken rule, and exit status 1, flow out.

1. Includes point down only: core <- cpu, cuda <- context <- ops, call, ghost, ranks <- autograd <- operators, plans,
   bindings. cpu and cuda never include each other.
2. Torch is seen by these from context on, and by cpu/parallel.*, alone, so that kernels build and run without it; core/
   and cpu/ see no CUDA header either, and the emulator is seen by cuda/device.cuh alone.

Usage: check_includes.py [csrc folder]
"""

import re
import sys
from pathlib import Path

# One floor: what a call is made of, and the operations made of calls.
OPS = ("ops", "call", "ghost", "ranks")
# The top one: what Python and torch's dispatcher call.
BINDINGS = ("operators", "plans", "bindings")
# For each part, the parts whose headers it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "context": {"core", "cpu", "context"},
    **{part: {"core", "cpu", "cuda", "context", *OPS} for part in OPS},
    "autograd": {"core", "ops", "autograd"},
    "operators": {"ops", "operators"},
    "plans": {"core", "cpu", "cuda", "context", "ops", "plans"},
    "bindings": {"core", "cpu", "ops", "autograd", "operators", "plans", "bindings"},
}
TORCH_PARTS = {"context", *OPS, "autograd", *BINDINGS}
# The emulator of tests/simt, which stands in for the CUDA headers where g++ compiles the kernels.
EMULATOR = ("cuda/device.cuh", '"simt.h"')
SUFFIXES = {".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inc"}
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include(?:_next)?\b[ \t]*(.*)$", re.MULTILINE)
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h$")
CUDA = re.compile(r"(cuda|cub|thrust|nv|cooperative_groups)[^/]*(/|\.h$)")


def part_of(path: Path) -> str:
    """The part a file belongs to: its folder in csrc/, or the name of a file in csrc/ itself."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def may_see_torch(path: Path) -> bool:
    return part_of(path) in TORCH_PARTS or (part_of(path) == "cpu" and path.stem == "parallel")


def problem_with(root: Path, path: Path, target: str) -> str | None:
    """What is wrong with ``#include target`` in ``path`` (relative to ``root``), or None."""
    part = part_of(path)
    name = target[1:-1]
    if not re.fullmatch(r'"[^"]+"|<[^>]+>', target):
        return "cannot be read: name the file"
    if (path.as_posix(), target) == EMULATOR:
        return None
    if TORCH.match(name):
        return None if may_see_torch(path) else f"torch belongs in {', '.join(sorted(TORCH_PARTS))} and cpu/parallel.*"
    if part in {"core", "cpu"} and CUDA.match(name):
        return f"{part}/ knows no CUDA"
    for folder in (path.parent, Path()):
        found = (root / folder / name).resolve()
        if found.is_file() and found.is_relative_to(root):
            other = part_of(found.relative_to(root))
            return None if other in MAY_INCLUDE[part] else f"{part} must not include {other}"
    return "is no file of csrc/" if target.startswith('"') else None


def check(root: Path) -> list[str]:
    """Every broken rule under ``root``, as ``file:line: message``."""
    root = root.resolve()
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        return [f"{root}: no sources found"]
    problems = []
    for file in files:
        path = file.relative_to(root)
        if part_of(path) not in MAY_INCLUDE:
            problems.append(f"{path}: belongs to no part of the house ({', '.join(MAY_INCLUDE)})")
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
