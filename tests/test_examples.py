"""The examples in README and docstrings are executed.
In: README's blocks of Python, each with a model of its own; docstrings with >>>. Out: none of them fails."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbn

pytestmark = pytest.mark.cpu
README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def names_that_blocks_use():
    """What a reader has: a model, its optimizer, batches of images with labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    loader = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"fastbn": fastbn, "torch": torch, "nn": nn, "model": model, "loader": loader, "optimizer": optimizer}


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names_that_blocks_use())


MODULES = [m.name for m in pkgutil.iter_modules(fastbn.__path__) if m.name not in ("__main__", "_C")]


@pytest.mark.parametrize("name", ["fastbn", *(f"fastbn.{m}" for m in MODULES)])
def test_docstrings(name):
    importlib.import_module(name)
    failed, tried = doctest.testmod(sys.modules[name], extraglobs=names_that_blocks_use())
    assert not failed
    if name in ("fastbn", "fastbn.checkpointing"):
        assert tried > 0, "an example is gone, or is not found any more"
