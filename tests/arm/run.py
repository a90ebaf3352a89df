"""Build the CPU kernels without torch for 64-bit Arm and for this machine, run tests/arm/driver.cpp with both, compare.

Each build holds its results against float64. Then the bits are compared: with fused multiply-add off, those of Arm are
those of x86-64's baseline, which has vectors of the same width and no such instruction. With --wide also Arm's as they
are shipped and those of AVX2 and AVX-512, which fuse as Arm does, but sum in wider vectors.

Needs g++, Debian's g++-aarch64-linux-gnu and qemu-user-static (or a 64-bit Arm machine). Status 1 if anything differs.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "arm"
KERNELS = ROOT / "csrc" / "cpu"
# Those of setup.py which change what the compiler makes; test_arm.py holds them to be its.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
STANDARD = "-std=c++17"  # what torch compiles extensions with
NOT_CONTRACTED = "-ffp-contract=off"
NOT_FUSED = (NOT_CONTRACTED, "-DFASTBN_NOT_FUSED")  # by the compiler, and where the code asks for it
BASELINE_ONLY = "-DFASTBN_BASELINE"  # no wider instruction sets, which the driver would need to be built with


@dataclass(frozen=True)
class Build:
    """A driver: the compiler, its flags beside FLAGS, and how to start what it makes."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    start: tuple[str, ...] = ()
    capability: str = "baseline"
    kernels: tuple[str, ...] = ("baseline",)


def find(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def builds(wide: bool) -> list[Build]:
    """What to build on this machine; exits with one line if a program is missing."""
    native = find(os.environ.get("CXX", "g++"))
    if native is None:
        sys.exit("tests/arm: no g++: install it, or name a compiler in CXX")
    if platform.machine() == "aarch64":
        return [Build("arm", native, ())]
    cross = find("aarch64-linux-gnu-g++")
    emulator = find("qemu-aarch64-static", "qemu-aarch64")
    if cross is None or emulator is None:
        sys.exit("tests/arm: needs Debian's packages g++-aarch64-linux-gnu and qemu-user-static")
    # Linked statically, so that the emulator needs no libraries of the other architecture.
    found = [
        Build("arm", cross, ("-static",), (emulator,)),
        Build("arm, not fused", cross, ("-static", *NOT_FUSED), (emulator,)),
    ]
    if platform.machine() == "x86_64":
        if wide:
            sets = ("avx2", "avx512", "baseline")
            found += [Build(f"x86-64 {name}", native, (), (), name, sets) for name in sets]
        else:
            found.append(Build("x86-64 baseline", native, (BASELINE_ONLY,)))
    return found


def is_stale(target: Path) -> bool:
    """Whether an object is older than what it may be made from; the kernels include nothing of tests/arm."""
    folders = ["csrc/core", "csrc/cpu"] + ["tests/arm"] * target.name.startswith("driver")
    newest = max(path.stat().st_mtime for folder in folders for path in (ROOT / folder).rglob("*"))
    return not target.exists() or target.stat().st_mtime < newest


def compile_all(chosen: list[Build]) -> dict[Build, Path]:
    """The drivers. Objects are made once for the same compiler and flags, and only when a source is newer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    commands: dict[Path, list[str]] = {}
    objects: dict[Build, list[Path]] = {}
    for build in chosen:
        of_kernels = [flag for flag in build.flags if flag != "-static"]
        of_driver = [NOT_CONTRACTED, *(flag for flag in of_kernels if flag not in NOT_FUSED)]  # or inputs would differ
        sources = [(Path(__file__).parent / "driver.cpp", of_driver), (KERNELS / "backend.cpp", of_driver)]
        sources += [(KERNELS / f"kernels_{name}.cpp", of_kernels) for name in build.kernels]
        for source, flags in sources:
            tag = "-".join([Path(build.compiler).name, *flags]).replace("=", "-")
            target = BUILD / f"{source.stem}.{tag}.o"
            command = [
                build.compiler,
                *FLAGS,
                STANDARD,
                "-Wall",
                "-Wextra",
                *flags,
                f"-I{ROOT / 'csrc'}",
                "-c",
                str(source),
            ]
            commands[target] = [*command, "-o", str(target)]
            objects.setdefault(build, []).append(target)
    stale = [command for target, command in commands.items() if is_stale(target)]
    stale.sort(key=lambda command: "kernels_" not in command[-1])  # the long ones first
    print(f"compiling {len(stale)} of {len(commands)} files", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, stale))
    drivers = {}
    for build in chosen:
        drivers[build] = BUILD / build.name.replace(" ", "_").replace(",", "")
        static = ["-static"] if "-static" in build.flags else []
        run([build.compiler, *static, *map(str, objects[build]), "-o", str(drivers[build])])
    return drivers


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:
        sys.exit(f"{shlex.join(command)}\n{done.stderr[-4000:]}\ntests/arm: this command failed or warned")


def digests(build: Build, driver: Path, part: str) -> dict[str, str]:
    """{case: digest}, after the driver has held all results against float64."""
    start = time.monotonic()
    environment = {**os.environ, "FASTBN_CPU_CAPABILITY": build.capability}
    done = subprocess.run([*build.start, str(driver), part], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    (BUILD / f"{driver.name}.txt").write_text(done.stdout)
    summary = lines[-1] if lines else done.stderr.strip()
    print(f"{build.name}: {summary}, {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode != 0:
        print("\n".join([line for line in lines if line.startswith("FAILED")][:10]))
        sys.exit(f"tests/arm: {build.name} failed (status {done.returncode}), see build/arm/{driver.name}.txt")
    return dict(line.split() for line in lines if not line.startswith("#") and " passed" not in line)


def differing(one: dict[str, str], other: dict[str, str]) -> tuple[list[str], list[str]]:
    """Cases whose bits differ, and all that were compared: not those that call the C library, which is not the same."""
    compared = [case for case in one if not case.endswith("/libm")]
    return [case for case in compared if other[case] != one[case]], compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="compare with AVX2 and AVX-512 too")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    arguments = parser.parse_args()
    drivers = compile_all(builds(arguments.wide))
    found = {build.name: digests(build, driver, arguments.cases) for build, driver in drivers.items()}
    if "x86-64 baseline" not in found:
        return
    different, compared = differing(found["arm, not fused"], found["x86-64 baseline"])
    print(f"bits of Arm and of x86-64 baseline, nothing fused: {len(different)} of {len(compared)} cases differ")
    if different:
        sys.exit("tests/arm: the bits differ in\n" + "\n".join(different[:20]))
    for name in ("x86-64 baseline", "x86-64 avx2", "x86-64 avx512"):
        if name not in found:
            continue
        different, compared = differing(found["arm"], found[name])
        words = []
        for kind in ("train", "eval", "global"):
            number, of = (sum(case.startswith(kind) for case in cases) for cases in (different, compared))
            words.append(f"{kind} {number} of {of}")
        print(f"bits of Arm as shipped and of {name}: cases that differ: {', '.join(words)}")


if __name__ == "__main__":
    main()
