"""Builds a library of translated PTX, which the emulator's programs and extension execute (FASTBN_SIMT_PTX).

    build.py [--arch sm_90] [--only REGEX] [--counted] [--no-contraction]      prints the path of the library

nvcc -ptx compiles the kernels of csrc/cuda, translate.py makes C++ of it, g++ compiles that. Whatever exists already is
kept in build/simt_tests by a hash of all texts that went into it; entries that are the same for two architectures are
compiled once.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from filelock import FileLock  # torch needs it too

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ptx.translate import translate  # noqa: E402
from simt.build import CSRC, JOBS, KEPT, atomically, included, key_of  # noqa: E402

# What is fused and how numbers are rounded is decided by nvcc, so g++ must not contract anything.
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-variable", "-Wno-unused-but-set-variable",
         "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]  # fmt: skip
if platform.machine() == "x86_64":
    FLAGS += ["-mfma", "-mf16c"]
NVCC_FLAGS = ["-ptx", "-std=c++17", "-O3", "-lineinfo"]
RUNTIME = ("launch.cpp", "thread.cpp", "counting.cpp")


@cache
def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def ptx_of(kernel, arch, csrc, flags):
    """The text of the PTX that nvcc makes of a .cu file."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    command = [nvcc, *NVCC_FLAGS, *flags, f"-arch={arch}", f"-I{csrc}"]
    texts = [path.read_bytes() for path in sorted(included(kernel, csrc))]
    target = KEPT / f"{kernel.stem}-{key_of(version, *command[1:-1], *texts)}.ptx"
    if not target.exists():
        atomically([*command, kernel, "-o"], target)
    target.touch()
    return target.read_text()


def compiled(name, text, includes="thread.h"):
    headers = [path.read_bytes() for path in sorted(included(HERE / includes, CSRC))]
    target = KEPT / f"{name}-{key_of(*FLAGS, text, *headers)}.o"
    if not target.exists():
        source = target.with_suffix(".cpp")
        source.write_text(text)
        folders = [f"-I{HERE}", f"-I{HERE.parent / 'simt'}", f"-I{CSRC}"]
        atomically(["g++", *FLAGS, *folders, "-c", source, "-o"], target)
        source.unlink()
    target.touch()
    return target


def library(arch="sm_90", *, csrc=CSRC, kernels=None, only=None, flags=(), counted=False):
    """The path of the library with the entries of `kernels` (by default all of csrc/cuda) whose names match `only`."""
    if kernels is None:
        kernels = [k for k in sorted(csrc.glob("cuda/*.cu")) if "__global__" in k.read_text()]
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / "lock"):
        return library_alone(arch, csrc, kernels, only, flags, counted)


def library_alone(arch, csrc, kernels, only, flags, counted):
    with ThreadPoolExecutor(JOBS) as pool:
        texts = list(pool.map(lambda kernel: ptx_of(kernel, arch, csrc, flags), kernels))
        sources, chosen = [], 0
        for kernel, text in zip(kernels, texts, strict=True):
            made, count, _ = translate(text, f"{kernel.stem}.ptx", only, counted)
            sources += [(f"{kernel.stem}_{i}", source) for i, source in enumerate(made)]
            chosen += count
        if chosen == 0:
            raise RuntimeError(f"no entry matches {only}")
        sources += [(Path(name).stem, (HERE / name).read_text(), name) for name in RUNTIME]
        objects = list(pool.map(lambda source: compiled(*source), sources))
    target = KEPT / f"ptx-{arch}-{key_of(*map(str, objects))}.so"
    if not target.exists():
        atomically(["g++", "-shared", *objects, "-ldl", "-o"], target)
    target.touch()
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--only", help="entries whose mangled names match")
    parser.add_argument("--counted", action="store_true", help="with counters")
    parser.add_argument("--no-contraction", action="store_true", help="nvcc -fmad=false")
    a = parser.parse_args()
    if a.only is not None:
        re.compile(a.only)
    flags = ["-fmad=false"] if a.no_contraction else []
    print(library(a.arch, only=a.only, flags=flags, counted=a.counted))


if __name__ == "__main__":
    main()
