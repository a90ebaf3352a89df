"""Builds fastbn._C. Everything that is not the extension is in pyproject.toml.

FASTBN_CUDA=0/1 turns the CUDA backend off or on; by default it is built where nvcc is and torch has CUDA, for the GPUs
in TORCH_CUDA_ARCH_LIST, else those of this machine, else ARCHITECTURES.
FASTBN_PTXAS=1 prints registers and spills of each kernel.
FASTBN_LOCAL_VERSION=1 names torch and CUDA in the version, as wheels should: VERSION+torch2.13.cpu.
FASTBN_BASELINE=1 leaves out the CPU kernels for AVX2 and AVX-512: a shorter build, to test something else.
FASTBN_SIMT=1 builds for tests: the CUDA kernels compiled by g++ and executed on the CPU by tests/simt; baseline alone.
FASTBN_SANITIZE=1 builds for AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import importlib.util
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

OLDEST_TORCH = (2, 6)  # as in pyproject.toml's dependencies


def environments() -> Iterator[str]:
    """Folders of the environments that the build may be for, the likeliest first.

    uv builds with an interpreter of its own and points VIRTUAL_ENV at it, but leaves the programs of an activated
    environment in PATH; without one it takes the folder .venv that is in the current folder or above it.
    """
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if name in os.environ:
            yield os.environ[name]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if Path(folder).parent.joinpath("pyvenv.cfg").is_file():
            yield str(Path(folder).parent)
    here = Path(os.environ.get("PWD", "."))
    for folder in (here, *here.parents):
        if (folder / ".venv" / "pyvenv.cfg").is_file():
            yield str(folder / ".venv")
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text():
        yield sys.base_prefix


def find_torch() -> None:
    """Make the torch of the environment that is installed into importable, where build isolation hides it.

    pip builds with that environment's interpreter, so its sysconfig still names the folders. Appended: what the build
    environment has itself comes first.
    """
    # Not this interpreter's own scheme: Debian's has other folders outside of environments. Python 3.10 has no "venv".
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix"
    folders = [sysconfig.get_path(name) for name in ("platlib", "purelib")]
    for folder in environments():
        variables = {"base": folder, "platbase": folder}
        folders += [sysconfig.get_path(name, scheme, variables) for name in ("platlib", "purelib")]
    for folder in folders:
        site.addsitedir(folder)
        if importlib.util.find_spec("torch") is not None:
            return


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
        "this environment first (pip install torch), then run pip install again; with uv, activate the environment"
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(
        f"fastbn: needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, and this environment has "
        f"{torch.__version__}: run pip install --upgrade torch, then pip install again"
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
    if simt or os.environ.get("FASTBN_BASELINE") == "1":
        flags.append("-DFASTBN_BASELINE")
    if os.environ.get("FASTBN_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += ["-O0", "-g1", "-fno-omit-frame-pointer", *sanitize]  # NOTES.md#compile-time
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


def check_compiler() -> None:
    """Exit with one line where compiling cannot begin: no compiler, one without C++17, or no headers of Python."""
    command = shlex.split(os.environ.get("CXX", "c++"))  # torch's choice
    remedy = "install g++ 9 or later (apt-get install g++), or name a compiler in CXX"
    if shutil.which(command[0]) is None:
        sys.exit(f"fastbn: there is no C++ compiler {command[0]}: {remedy}")
    program = (
        "#include <optional>\nstd::optional<int> x;\ntemplate <class T> int f() { if constexpr (true) return 0; }\n"
    )
    options = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run([*command, *options], input=program, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        sys.exit(f"fastbn: {shlex.join(command)} does not compile C++17: {remedy}")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        sys.exit(f"fastbn: there is no Python.h in {include}: install Python's headers (apt-get install python3-dev)")


class Build(BuildExtension):
    """torch's, whose failures end in a line that says what to do."""

    def build_extensions(self) -> None:
        check_compiler()
        try:
            super().build_extensions()
        except Exception as error:  # of ninja, distutils or torch, which has its own checks of compilers
            print(error, file=sys.stderr)
            sys.exit(
                "fastbn: it did not compile, see the first error above. If a compiler was killed, memory was short: "
                "try again with MAX_JOBS=1. If nvcc failed, FASTBN_CUDA=0 builds for the CPU alone"
            )


class Version(egg_info):
    """Names in the version what this build is for: +torch2.13.cpu, or +torch2.11.cu130 with CUDA."""

    def finalize_options(self) -> None:
        if os.environ.get("FASTBN_LOCAL_VERSION") == "1":  # here, because the setup.cfg of an sdist has an empty tag
            cuda = "cu" + torch.version.cuda.replace(".", "") if want_cuda() else "cpu"
            self.tag_build = f"+torch{'.'.join(torch.__version__.split('.')[:2])}.{cuda}"
        super().finalize_options()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build, "egg_info": Version})
