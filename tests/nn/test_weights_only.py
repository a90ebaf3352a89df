"""Whole models through torch.save and torch.load(weights_only=True), with fastbn.SAFE_GLOBALS."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastbn
from fastbn.graph.fusing import is_fused

pytestmark = pytest.mark.cpu


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.parts = [self.bn]  # a part of the tree in a list as well: one object before, one after

    def forward(self, x, scale=1.0):
        return F.relu(self.parts[0](self.conv(x)) + x) * scale


class Recursive(Block):
    """With a reference to what contains it."""

    def __init__(self):
        super().__init__()
        self.child = Block()
        self.child.parts.append(self)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + self.child(x)


OWN = [Block, Recursive, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
MODELS = {
    "convert": fastbn.convert,
    "fuse": lambda m: fastbn.convert(m, fuse=True),
    "fuse, then unfused by hand": lambda m: fastbn.revert(fastbn.convert(m, fuse=True)),
    "fold": lambda m: fastbn.fold(m.eval()),
    "freeze": fastbn.freeze,
    "sync": fastbn.SyncBatchNorm.convert_sync_batchnorm,
    "act": lambda m: nn.Sequential(m, fastbn.BatchNormAct2d(4, activation="silu")),
    "ghost": lambda m: nn.Sequential(m, fastbn.GhostBatchNorm2d(4, virtual_batch_size=2)),
}


def base():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), Block(), Recursive())


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind):
    model, x = MODELS[kind](base()), torch.randn(4, 3, 5, 5)
    with torch.serialization.safe_globals([*fastbn.SAFE_GLOBALS, *OWN]):
        loaded = torch.load(saved(model), weights_only=True)
    assert [*map(type, loaded.modules())] == [*map(type, model.modules())]
    assert repr(loaded) == repr(model)
    for training in (False, True) if kind != "fold" else (False,):
        torch.testing.assert_close(loaded.train(training)(x), model.train(training)(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    if kind == "fuse":
        assert [is_fused(m) for m in loaded.modules()] == [is_fused(m) for m in model.modules()]
        assert loaded[1].parts[0] is loaded[1].bn and loaded[2].child.parts[1] is loaded[2]
        assert fastbn.report(loaded).fused.keys() == {"0.1", "1.bn", "2.bn", "2.child.bn"}


@pytest.mark.parametrize("kind", MODELS)
def test_what_torch_asks_for_is_listed(kind):
    """torch.serialization.get_unsafe_globals_in_checkpoint tells a user what the list must have."""
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(saved(MODELS[kind](base()))))
    listed = {f"{g.__module__}.{g.__qualname__}" for g in fastbn.SAFE_GLOBALS}
    assert {n for n in names if n.startswith("fastbn.")} <= listed
    assert all(n.startswith(("fastbn.", "torch.nn.modules.", f"{__name__}.")) for n in names)


def test_refused_without_the_list():
    file = saved(fastbn.convert(base(), fuse=True))
    with torch.serialization.safe_globals(OWN), pytest.raises(Exception, match=r"Unsupported global: GLOBAL fastbn\."):
        torch.load(file, weights_only=True)


def test_classes_taken_from_a_fused_model():
    """{type(m) for m in model.modules()} has fused classes under the names of those that they come from."""
    model, x = fastbn.convert(base(), fuse=True), torch.randn(4, 3, 5, 5)
    with torch.serialization.safe_globals([*fastbn.SAFE_GLOBALS, *{type(m) for m in model.modules()}]):
        loaded = torch.load(saved(model), weights_only=True)
    again = copy.deepcopy(loaded)
    for m in (loaded, again):
        assert type(m[1]) is type(model[1])
        torch.testing.assert_close(m(x), model(x), rtol=0, atol=0)
        model.load_state_dict(loaded.state_dict())


def test_state_dicts_need_no_list():
    state = fastbn.convert(base(), fuse=True).state_dict()
    torch.testing.assert_close(dict(torch.load(saved(state), weights_only=True)), dict(state))
