"""Builds fastbn._C. Everything that is not the extension is in pyproject.toml.

FASTBN_CUDA=0/1 turns the CUDA backend off or on; by default it is built where nvcc is and torch has CUDA.
FASTBN_SANITIZE=1 builds for AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"fastbn: cannot import torch in the build environment ({error}). Install torch first, then run: "
        "pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent


def want_cuda() -> bool:
    """A GPU need not be present: the compiler and a torch built for CUDA decide."""
    choice = os.environ.get("FASTBN_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastbn: FASTBN_CUDA should be 0 or 1, not {choice!r}")
    possible = CUDA_HOME is not None and torch.version.cuda is not None
    if choice == "1" and not possible:
        sys.exit(
            f"fastbn: FASTBN_CUDA=1 needs nvcc (CUDA_HOME is {CUDA_HOME}) and a torch built for CUDA "
            f"(torch {torch.__version__} has CUDA {torch.version.cuda})"
        )
    return possible and choice != "0"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extension():
    cuda_sources = sources("csrc/cuda/*.cu") + sources("csrc/cuda/*.cpp")
    cuda = want_cuda() and bool(cuda_sources)
    if want_cuda() and not cuda_sources:
        message = "fastbn: this version has no CUDA kernels yet"
        if os.environ.get("FASTBN_CUDA") == "1":
            sys.exit(message)
        print(f"{message}; building for the CPU only")
    # OpenMP is compiled in but not linked: its symbols are then those of the runtime that torch brought, and
    # there is one thread pool in the process instead of two.
    flags = ["-O3", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
    link = ["-Wl,--strip-all"]
    if os.environ.get("FASTBN_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags = [*flags, "-O1", "-g1", "-fno-omit-frame-pointer", *sanitize]
        link = sanitize
    flags.append(f'-DFASTBN_TORCH_VERSION="{torch.__version__}"')
    make = CUDAExtension if cuda else CppExtension
    return make(
        "fastbn._C",
        sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp") + (cuda_sources if cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-lineinfo"]} if cuda else flags,
        extra_link_args=link,
        depends=sources("csrc/**/*.h"),
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
