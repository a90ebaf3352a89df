"""The option --backend, markers, and the fixtures `backend`, `device`, `threads` and fixed seeds."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("epilogue", "fusing", "nets", "on_gpu", "reference")
# They need nvcc and not fastbn: make ptx and make ptx-quick run them, without this file.
collect_ignore_glob = ["cuda/test_nvcc_*"]


@dataclass(frozen=True)
class Backend:
    """Where the kernels of a test run: a name to print and the torch device that reaches them."""

    name: str
    device: torch.device


# simt: the CUDA kernels executed on the CPU, by the build that FASTBN_SIMT=1 makes (make simt).
# ptx: the same build executes what nvcc compiled, from the library that FASTBN_SIMT_PTX names (make ptx).
BACKENDS = {
    "cpu": Backend("cpu", torch.device("cpu")),
    "simt": Backend("simt", torch.device("cpu")),
    "ptx": Backend("ptx", torch.device("cpu")),
    "cuda": Backend("cuda", torch.device("cuda")),
}

MARKERS = {
    "slow": "takes more than a few seconds, builds something, or needs much memory",
    "sanitize": "small and free of compilers and fuzzing, so that it also runs under AddressSanitizer",
    "cpu": "about the CPU backend, or about no backend at all: skipped with --backend simt, ptx and cuda",
    "simt": "about the emulator of tests/simt: needs --backend simt or ptx",
    "cuda": "needs a GPU: skipped without --backend cuda",
    "simt_quick": "part of the short run with --backend simt or ptx, where all that has no such mark counts as slow",
}


def pytest_addoption(parser):
    parser.addoption("--backend", choices=tuple(BACKENDS), default="cpu", help="whose kernels the tests run")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    complaint = unavailable(config.getoption("--backend"))
    if complaint:
        raise pytest.UsageError(complaint)
    if (backend := config.getoption("--backend")) != "cpu":
        import reference  # not before its assertions are rewritten

        reference.OTHER_PRODUCTS = (torch.float16,) if backend == "simt" else reference.HALF_TYPES


def unavailable(backend):
    """Why the fastbn that is imported cannot test this backend, or None. Asked for and absent is an error, no skip."""
    from fastbn import _C

    backends = _C.build_info().get("backends", ["a version before this one"])
    translated = os.environ.get("FASTBN_SIMT_PTX", "")
    if backend == "ptx" and not Path(translated).is_file():
        return f"--backend ptx: FASTBN_SIMT_PTX should name a library of tests/ptx/build.py, not {translated!r}"
    if backend == "simt" and translated:
        return f"--backend simt: FASTBN_SIMT_PTX is {translated}, which is for --backend ptx"
    if ("simt" if backend == "ptx" else backend) not in backends:
        return f"--backend {backend}: the fastbn in {_C.__file__} has {', '.join(backends)}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "--backend cuda: torch sees no GPU"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    backend = config.getoption("--backend")
    emulated = backend in ("simt", "ptx")
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        for name in ("cpu", "simt", "cuda"):
            if name in marks and name != ("simt" if emulated else backend):
                item.add_marker(pytest.mark.skip(reason=f"for --backend {name}"))
        if emulated and "slow" in marks:
            item.add_marker(pytest.mark.skip(reason="slow on a processor, and a thousand times that in the emulator"))
        if emulated and not marks & {"slow", "simt_quick"}:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = BACKENDS[metafunc.config.getoption("--backend")]
        metafunc.parametrize("backend", [chosen], ids=[chosen.name])


@pytest.fixture
def device(backend):
    return backend.device


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(20150211)
    np.random.seed(20150211)
    torch.manual_seed(20150211)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
