"""Check the registers, spills and memory accesses of the built CUDA kernels against the planner's assumptions.

Reads the log of a build with `ptxas -v` and the built library. Prints a table and a line for each broken rule, and
exits with status 1 if there is one.

Rules, for each kernel and architecture:
1. ten registers at most are spilled, and none of them is read or written in an innermost loop: what is needed once a
   tile may wait in memory, while an array that lives there costs more than all the arithmetic. Kernels that find their
   activation at run time may spill in loops, too: their arithmetic takes longer than that;
2. no more registers than `registers_per_thread` of csrc/cuda/plan.h, for kernels of the resident strategy;
3. kernels that access whole vectors load and store 16 bytes at a time (SASS: LDG.E.128 or LDGSTS...128, STG.E.128),
   and nothing in SASS touches memory by a generic address, but for 16-byte loads by the resident kernels from the
   shared memory of another block of the cluster: SASS has no other instruction for these.
Kernels of float64 are listed and not judged: no default plan is tuned for them.

Usage: check_resources.py BUILD_LOG LIBRARY [--architectures "8.0;9.0"] [--json FILE] [--cuobjdump PROGRAM]
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

PLAN = Path(__file__).parents[1] / "csrc" / "cuda" / "plan.h"
COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
ARCH = re.compile(r"^\s*arch = (sm_\w+)")
FUNCTION = re.compile(r"^\s*Function : (\w+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
# Kernels whose outputs are a few values a channel.
REDUCTIONS = ("stats", "backward_reduce")
# Of SASS, what the rules look at: reads and writes of global and of local memory.
LOADS, STORES, LOCAL = ("LDG", "LDGSTS"), ("STG",), ("LDL", "STL")
ARITHMETIC = ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "DADD", "DMUL", "DFMA")
LOCAL_IN_LOOP = "on local memory in an innermost loop"
SPILL_ALLOWED = 40  # bytes: ten registers
NO_CLUSTERS = ("sm_75", "sm_80", "sm_86", "sm_89")
GENERIC = ("LD", "ST")  # of an address that may be in any memory, which costs more than one that is known to be where


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0  # static
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    sass: dict[str, int] = field(default_factory=dict)  # how often each memory instruction is there

    @property
    def judged(self) -> bool:
        return "double" not in self.name.split("(")[0]

    @property
    def resident(self) -> bool:
        return "resident" in self.name

    @property
    def activation_at_run_time(self) -> bool:
        return re.search(r"\bAny\b", self.name) is not None

    @property
    def vectors(self) -> bool:
        """Whether it is the variant for an access pattern in whole vectors."""
        return (access := re.search(r"Access<\w+, (\d+)\b", self.name)) is not None and int(access[1]) > 1

    def count(self, names: Iterable[str], width: str = "") -> int:
        return sum(n for i, n in self.sass.items() if i.split(".")[0] in names and (not width or width in i.split(".")))


def demangle(names: list[str]) -> list[str]:
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = result.stdout.splitlines()
    short = [re.sub(r"fastbn::|cuda::|\(anonymous namespace\)::|^void ", "", name) for name in plain]
    return [re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", name) for name in short]


def parse_log(text: str) -> list[Kernel]:
    """The kernels in the order ptxas compiled them; names as mangled. A kernel compiled twice is there once."""
    kernels: dict[tuple[str, str], Kernel] = {}
    kernel = None
    for line in text.splitlines():
        if match := COMPILING.search(line):
            kernel = kernels[match[1], match[2]] = Kernel(match[1], match[2])
        elif kernel is None:
            continue
        elif match := STACK.search(line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
        elif match := USED.search(line):
            kernel.registers = int(match[1])
            kernel.shared = int(found[1]) if (found := SHARED.search(line)) else 0
            kernel = None
    return list(kernels.values())


def in_innermost_loops(branches: list[tuple[int, int]], arithmetic: list[int], addresses: list[int]) -> int:
    """How many of the addresses are in a loop that has arithmetic and no other loop in it.

    Branches are given as (address, target). A loop without arithmetic waits for another block.
    """
    ends: dict[int, int] = {}
    for address, target in branches:
        if target < address:
            ends[target] = max(address, ends.get(target, 0))
    loops = list(ends.items())
    innermost = [
        (start, end) for start, end in loops if not any(start < other and last <= end for other, last in loops)
    ]
    innermost = [(start, end) for start, end in innermost if any(start <= a <= end for a in arithmetic)]
    return sum(any(start <= a <= end for start, end in innermost) for a in addresses)


def parse_sass(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction on global or local memory occurs, by mangled name and architecture.

    Those on local memory in innermost loops are counted again, as LOCAL_IN_LOOP.
    """
    found: dict[tuple[str, str], Counter[str]] = {}
    arch, counts = "", Counter()
    branches: list[tuple[int, int]] = []
    arithmetic: list[int] = []
    local: list[int] = []

    def finish() -> None:
        if number := in_innermost_loops(branches, arithmetic, local):
            counts[LOCAL_IN_LOOP] = number
        branches.clear(), arithmetic.clear(), local.clear()

    for line in lines:
        if match := INSTRUCTION.match(line):
            address, name, operands = int(match[1], 16), match[2], match[3]
            kind = name.split(".")[0]
            if kind == "BRA" and (target := TARGET.search(operands)):
                branches.append((address, int(target[1], 16)))
            elif kind in ARITHMETIC:
                arithmetic.append(address)
            elif kind in (*LOADS, *STORES, *LOCAL, *GENERIC):
                counts[name] += 1
                if kind in LOCAL:
                    local.append(address)
        elif match := ARCH.match(line):
            arch = match[1]
        elif match := FUNCTION.match(line):
            finish()
            counts = found.setdefault((match[1], arch), Counter())
    finish()
    return found


def disassemble(program: str, library: str) -> dict[tuple[str, str], Counter[str]]:
    with subprocess.Popen(
        [program, "-sass", library], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        found = parse_sass(process.stdout)
    if process.returncode != 0 or not found:
        raise SystemExit(f"check_resources: {program} -sass {library} found no code (status {process.returncode})")
    return found


def find_cuobjdump() -> str:
    """The toolkit's, or the one that triton (and so torch with CUDA) brings."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    if (triton := importlib.util.find_spec("triton")) is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = shutil.which("cuobjdump") or next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise SystemExit("check_resources: no cuobjdump in PATH, in CUDA_HOME, or with triton")
    return found


def targets(architectures: str) -> set[str]:
    """Those that torch compiles machine code for, given a TORCH_CUDA_ARCH_LIST."""
    return {"sm_" + name.removesuffix("+PTX").replace(".", "") for name in architectures.split(";")}


def registers_assumed(plan: Path = PLAN) -> int:
    return int(re.search(r"registers_per_thread\s*=\s*(\d+)", plan.read_text())[1])


def problems_of(kernel: Kernel, registers: int) -> list[str]:
    if not kernel.judged:
        return []
    problems = []
    if max(kernel.spill_stores, kernel.stack) > SPILL_ALLOWED:
        problems.append(f"spills {kernel.spill_stores} bytes to memory, of {kernel.stack} of its stack")
    if kernel.stack and not kernel.spill_stores:
        problems.append(f"has a stack frame of {kernel.stack} bytes")
    local = kernel.sass.get(LOCAL_IN_LOOP, 0)
    if local and not kernel.activation_at_run_time:
        problems.append(f"has {local} instructions on local memory in an innermost loop")
    if kernel.resident and kernel.registers > registers:
        problems.append(f"uses {kernel.registers} registers, the plan counts on {registers}")
    generic = kernel.count(GENERIC)
    if kernel.resident and kernel.arch not in NO_CLUSTERS:
        generic -= kernel.count(["LD"], "128")
    if generic:
        problems.append(f"has {generic} generic accesses to memory")
    if kernel.vectors and not kernel.count(LOADS, "128"):
        problems.append("loads no 16 bytes at a time")
    if kernel.vectors and kernel.name.split("<")[0] not in REDUCTIONS and not kernel.count(STORES, "128"):
        problems.append("stores no 16 bytes at a time")
    return problems


def unjudged(kernels: list[Kernel]) -> list[str]:
    """A rule that no kernel falls under has lost them, by a change of names."""
    judged = [kernel for kernel in kernels if kernel.judged]
    kinds = {"of the resident strategy": "resident", "that access whole vectors": "vectors"}
    return [f"no kernels {words}: have names changed?" for words, kind in kinds.items()
            if not any(getattr(kernel, kind) for kernel in judged)]  # fmt: skip


def table(kernels: list[Kernel]) -> str:
    lines = [f"{'arch':<7}{'regs':>5}{'static':>8}{'stack':>6}{'spill':>6}{'ld16':>6}{'st16':>6}  kernel"]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        spill = k.spill_stores + k.spill_loads
        wide = f"{k.count(LOADS, '128'):>6}{k.count(STORES, '128'):>6}"
        lines.append(f"{k.arch:<7}{k.registers:>5}{k.shared:>8}{k.stack:>6}{spill:>6}{wide}  {k.name}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and 16-byte accesses of the CUDA kernels.")
    parser.add_argument("log", type=Path)
    parser.add_argument("library")
    parser.add_argument("--architectures", help="as in TORCH_CUDA_ARCH_LIST: those that the library must have")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cuobjdump")
    arguments = parser.parse_args()

    kernels = parse_log(arguments.log.read_text())
    if not kernels:
        raise SystemExit(f"check_resources: {arguments.log} has no output of ptxas -v")
    sass = disassemble(arguments.cuobjdump or find_cuobjdump(), arguments.library)
    unseen = []
    if arguments.architectures and (missing := targets(arguments.architectures) - {arch for _, arch in sass}):
        unseen.append(f"no code for {', '.join(sorted(missing))}")
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        if (kernel.name, kernel.arch) not in sass:
            unseen.append(f"{kernel.arch} {name}: compiled, and not in the library")
        kernel.sass = dict(sass.get((kernel.name, kernel.arch), {}))
        kernel.name = name
    registers = registers_assumed()
    problems = [f"{k.arch} {k.name}: {problem}" for k in kernels for problem in problems_of(k, registers)]
    problems += unseen + unjudged(kernels)
    print(table(kernels))
    if arguments.json:
        report = {"registers_assumed": registers, "problems": problems, "kernels": [asdict(k) for k in kernels]}
        arguments.json.write_text(json.dumps(report, indent=1))
    architectures = sorted({k.arch for k in kernels})
    print(f"{len(kernels)} kernels for {', '.join(architectures)}; at most {registers} registers assumed")
    print("\n".join(problems) or "resources: every rule holds")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
