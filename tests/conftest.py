"""What every test shares: the backends under test, markers, seeds, and thread counts that are put back.
In: pytest's hooks. Out: the fixtures `backend`, `device`, `threads`, and a fixed random state."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("reference")


@dataclass(frozen=True)
class Backend:
    """Where the kernels of a test run: a name to print and the torch device that reaches them."""

    name: str
    device: torch.device


BACKENDS = [Backend("cpu", torch.device("cpu"))]

MARKERS = {
    "slow": "takes more than a few seconds, builds something, or needs much memory",
    "sanitize": "small and free of compilers and fuzzing, so that it also runs under AddressSanitizer",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    return request.param


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
