"""The benchmark's modules, and a console that keeps what is printed."""

import io
import sys

import pytest
import torch
from benchmark_cases import BENCHMARKS, SHAPES


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks/ can be imported."""
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def bench(scripts, monkeypatch, threads):
    """The same, and ResNet-50 is small."""
    threads(1)
    import suite

    monkeypatch.setattr(suite, "RESNET50", SHAPES)
    return suite


@pytest.fixture
def console():
    from rich.console import Console

    return Console(file=io.StringIO(), width=200, highlight=False)


@pytest.fixture(scope="module")
def paper():
    """The modules of benchmarks/paper can be imported, although others of benchmarks/ have the same names."""
    for name in ("matplotlib", "scipy", "sklearn"):
        pytest.importorskip(name)
    names = [path.stem for path in (BENCHMARKS / "paper").glob("*.py")]
    before, path, threads = (
        {name: sys.modules.pop(name, None) for name in names},
        list(sys.path),
        torch.get_num_threads(),
    )
    sys.path.insert(0, str(BENCHMARKS / "paper"))
    yield
    sys.path[:] = path
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    torch.set_num_threads(threads)
