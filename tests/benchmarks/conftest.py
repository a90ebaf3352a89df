"""The benchmark's modules, and a console that keeps what is printed."""

import io

import pytest
from benchmark_cases import BENCHMARKS, SHAPES


@pytest.fixture
def bench(monkeypatch, threads):
    """The folder's modules can be imported, and ResNet-50 is small."""
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import suite

    monkeypatch.setattr(suite, "RESNET50", SHAPES)
    return suite


@pytest.fixture
def console():
    from rich.console import Console

    return Console(file=io.StringIO(), width=160, highlight=False)
