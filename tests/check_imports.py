"""Hold the import rules of fastbn/: print a line for each broken rule, and exit with status 1 if there is one.

Imports point down only. A module or folder directly in fastbn/ is one unit; it imports units of the layers below its
own, and a folder's modules import each other. Imports inside functions count too.

Usage: check_imports.py [fastbn folder]
"""

import ast
import sys
from pathlib import Path

# From the lowest to the highest. __init__ is a unit of its own: nothing but __main__ imports the package by its name.
LAYERS = (
    {"_C"},
    {"ops"},
    {"activations", "arguments", "checkpointing", "explain", "records"},
    {"composed", "interop"},
    {"autograd"},
    {"functional"},
    {"nn"},
    {"graph", "stats"},
    {"self_test", "serialization"},
    {"__init__"},
    {"__main__"},
)
LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}
PACKAGE = "fastbn"


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit that a module belongs to, from the parts of its name below the package; none is the package itself."""
    return parts[0] if parts else "__init__"


def imported(tree: ast.AST, package: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Line and name, below the package, of each module of the package that is imported in a module of `package`.

    `from .ops import name` is an import of ops, and of a module `ops.name` as far as this knows: the unit is the same.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (PACKAGE, *package)[: len(package) + 2 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found += [(node.lineno, name[1:]) for name in names if name[0] == PACKAGE]
    return found


def check(root: Path) -> list[str]:
    """Every broken rule under ``root``, as ``file:line: message``."""
    files = sorted(root.rglob("*.py"))
    if not files:
        return [f"{root}: no sources found"]
    problems = []
    for file in files:
        path = file.relative_to(root)
        unit = path.parts[0].removesuffix(".py")
        if unit not in LAYER_OF:
            problems.append(f"{path}: has no layer in {Path(__file__).name}")
            continue
        known = {p.stem if p.is_file() else p.name for p in root.iterdir() if p.suffix in ("", ".py", ".pyi")}
        for line, name in imported(ast.parse(file.read_text()), path.parts[:-1]):
            # `from fastbn import name`: a module of the package, or something that __init__ defines
            other = unit_of(name) if name and name[0] in known else "__init__"
            if other == unit and len(path.parts) > 1:
                continue
            if LAYER_OF.get(other, len(LAYERS)) >= LAYER_OF[unit]:
                problems.append(f"{path}:{line}: {unit} must not import {other}")
    return problems


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / PACKAGE
    broken = check(Path(folder))
    print("\n".join(broken) or "imports: every rule holds")
    sys.exit(bool(broken))
