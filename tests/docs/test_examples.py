"""The examples in docstrings run. (test_docs.py runs those of README and docs/.)"""

import doctest
import importlib
import pkgutil
import sys

import pytest
import torch
from torch import nn

import fastbn

pytestmark = pytest.mark.cpu


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


NAMES = [m.name for m in pkgutil.walk_packages(fastbn.__path__, "fastbn.")]
MODULES = [name for name in NAMES if name not in ("fastbn.__main__", "fastbn._C")]


@pytest.mark.parametrize("name", ["fastbn", *MODULES])
def test_docstrings(name):
    importlib.import_module(name)
    failed, tried = doctest.testmod(sys.modules[name], extraglobs=names_that_blocks_use())
    assert not failed
    if name in ("fastbn", "fastbn.checkpointing"):
        assert tried > 0, "an example is gone, or is not found any more"
