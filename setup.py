"""Builds fastbn._C. Everything that is not the extension is in pyproject.toml.

FASTBN_CUDA=0/1 turns the CUDA backend off or on; by default it is built where nvcc is and torch has CUDA, for the GPUs
in TORCH_CUDA_ARCH_LIST, else those of this machine, else ARCHITECTURES.
FASTBN_PTXAS=1 prints registers and spills of each kernel.
FASTBN_SIMT=1 builds for tests: the CUDA kernels compiled by g++ and executed on the CPU by tests/simt.
FASTBN_SANITIZE=1 builds for AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup


def find_torch() -> None:
    """Make the torch of the environment that is installed into importable, where build isolation hides it.

    pip builds with that environment's interpreter, so its sysconfig still names the folders; uv has an interpreter of
    its own, and leaves VIRTUAL_ENV. Appended: what the build environment has itself comes first.
    """
    places = [{}] + [{"base": env, "platbase": env} for env in (os.environ.get("VIRTUAL_ENV"),) if env]
    for variables in places:
        for name in ("platlib", "purelib"):
            site.addsitedir(sysconfig.get_path(name, vars=variables))


try:
    try:
        import torch
    except ImportError:
        find_torch()
        import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"fastbn: cannot import torch ({error}). It is built for the torch that it is to run with: install torch into "
        "this environment first (pip install torch), then run pip install again"
    )

ROOT = Path(__file__).parent

HEADERS = ("include", "targets/*/include")  # where toolkits keep them


def want_cuda() -> bool:
    """A GPU need not be present: the compiler, its headers and a torch built for CUDA decide."""
    choice = os.environ.get("FASTBN_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastbn: FASTBN_CUDA should be 0 or 1, not {choice!r}")
    possible = CUDA_HOME is not None and torch.version.cuda is not None
    # What lies on PATH as nvcc may be a wrapper, and torch takes the folder above it for the toolkit.
    headers = possible and any(list(Path(CUDA_HOME).glob(f"{folder}/cuda_runtime.h")) for folder in HEADERS)
    found = f"CUDA_HOME is {CUDA_HOME}, torch {torch.__version__} has CUDA {torch.version.cuda}"
    if possible and not headers:
        found += f", but there is no cuda_runtime.h in {CUDA_HOME}/include: set CUDA_HOME to the toolkit's folder"
    if choice == "1" and not headers:
        sys.exit(f"fastbn: FASTBN_CUDA=1 needs nvcc, its headers and a torch built for CUDA: {found}")
    if choice == "" and possible and not headers:
        print(f"fastbn: building without the CUDA backend: {found}", file=sys.stderr)
    return headers and choice != "0"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


# Data center GPUs; the last one as PTX too, which newer ones compile for themselves.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURES_BEFORE_CUDA_12_8 = "8.0;9.0+PTX"


def architectures() -> str:
    """What nvcc compiles for; torch reads it from the environment."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not chosen and torch.cuda.is_available():
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        chosen = ";".join(f"{major}.{minor}" for major, minor in sorted(here))
    if not chosen:
        cuda = tuple(map(int, torch.version.cuda.split(".")[:2]))
        chosen = ARCHITECTURES if cuda >= (12, 8) else ARCHITECTURES_BEFORE_CUDA_12_8
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    return chosen


def as_cpp(kernels: list[str]) -> list[str]:
    """A source that includes each .cu, for a build that knows files by their suffix."""
    folder = Path("build/simt/sources")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    wrapped = []
    for kernel in kernels:
        path, text = folder / f"{Path(kernel).stem}_cu.cpp", f'#include "../../../{kernel}"\n'
        if not (ROOT / path).exists() or (ROOT / path).read_text() != text:
            (ROOT / path).write_text(text)
        wrapped.append(str(path))
    return wrapped


def extension():
    simt = os.environ.get("FASTBN_SIMT") == "1"
    cuda = not simt and want_cuda()
    files = sources("csrc/*/*.cpp")
    kernels = sources("csrc/cuda/*.cu")
    include_dirs = []
    # OpenMP is compiled in but not linked: its symbols are then those of the runtime that torch brought, and
    # there is one thread pool in the process instead of two.
    # Nobody asks whether an operation on floats raised a flag: with a choice in them, loops become vectors so.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
    nvcc = ["-O3", "-lineinfo"]
    link = ["-Wl,--strip-all"]
    if simt:
        files += as_cpp(kernels) + ["tests/simt/bindings.cpp"]
        include_dirs.append(str(ROOT / "tests" / "simt"))
        # Translated PTX is found by the kernels' symbols (tests/simt/translated.h), so they are not stripped.
        link = ["-ldl"]
        # With -O2, GCC 12 does not see that lanes are all set, one after the other.
        flags += ["-O2", "-std=c++20", "-DFASTBN_SIMT", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    if cuda:
        files += kernels
        flags += [
            "-DFASTBN_CUDA",
            f'-DFASTBN_CUDA_VERSION="{torch.version.cuda}"',
            f'-DFASTBN_CUDA_ARCHITECTURES="{architectures()}"',
        ]
        if os.environ.get("FASTBN_PTXAS") == "1":
            nvcc.append("-Xptxas=-v")
    if os.environ.get("FASTBN_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitize]
        link = sanitize
    flags.append(f'-DFASTBN_TORCH_VERSION="{torch.__version__}"')
    make = CUDAExtension if cuda else CppExtension
    return make(
        "fastbn._C",
        files,
        include_dirs=include_dirs,
        extra_compile_args={"cxx": flags, "nvcc": nvcc} if cuda else flags,
        extra_link_args=link,
        depends=[path for pattern in ("csrc/**/*.h", "csrc/**/*.cuh", "tests/simt/*.h") for path in sources(pattern)],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
