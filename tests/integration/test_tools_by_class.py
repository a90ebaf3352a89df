"""Tools that find batch norms by torch's classes: opacus' validator, FLOP counters, fuse_modules."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbn

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]
FAQ = Path(__file__).parents[2] / "docs" / "faq.md"


@pytest.fixture
def add_fastbn():
    """The function that docs/faq.md tells people to write."""
    (code,) = re.findall(r"```python\n(THEIRS = .*?)```", FAQ.read_text(), re.DOTALL)
    scope = {"fastbn": fastbn, "nn": nn}
    exec(code, scope)
    return scope["add_fastbn"]


def base():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(72))


MODELS = {
    "convert": lambda: fastbn.convert(base()),
    "fuse": lambda: fastbn.convert(base(), fuse=True),
    "sync": lambda: fastbn.SyncBatchNorm.convert_sync_batchnorm(base()),
}
models = pytest.mark.parametrize("kind", MODELS)


def refused(model, table):
    """Names of the modules that a validator by class refuses, as opacus' does."""
    return [name for name, m in model.named_modules() if (check := table.get(type(m))) and check(m)]


@models
def test_a_validator_by_class(kind, add_fastbn):
    theirs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    table = dict.fromkeys(theirs, lambda module: ["replace it"])
    assert refused(base(), table) == ["1", "4"]
    assert refused(MODELS[kind](), table) == [], "why the page tells what to do"
    assert refused(MODELS[kind](), add_fastbn(table)) == ["1", "4"]
    assert set(add_fastbn({nn.BatchNorm2d: None})) == {nn.BatchNorm2d, fastbn.BatchNorm2d}


@models
def test_what_isinstance_finds(kind):
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert [n for n, m in MODELS[kind]().named_modules() if isinstance(m, norms)] == ["1", "4"]
    assert isinstance(fastbn.BatchNormAct2d(3), nn.modules.batchnorm._NormBase)
    assert not isinstance(fastbn.BatchNormAct2d(3), norms)


def test_fuse_modules_after_revert():
    model, x = MODELS["sync"]().eval(), torch.randn(2, 3, 3, 3)
    expected = model(x)
    fused = torch.ao.quantization.fuse_modules(fastbn.revert(model), [["0", "1", "2"]])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), expected)


@models
def test_opacus(kind, add_fastbn):
    validator = pytest.importorskip("opacus.validators").ModuleValidator
    for table in (validator.VALIDATORS, validator.FIXERS):
        add_fastbn(table)
    assert not validator.is_valid(MODELS[kind]())
    assert type(validator.fix(MODELS[kind]())[1]) is nn.GroupNorm


@models
def test_thop(kind, add_fastbn):
    thop = pytest.importorskip("thop")
    hook = pytest.importorskip("thop.vision.basic_hooks").count_normalization
    x = torch.randn(2, 3, 3, 3)
    theirs = nn.SyncBatchNorm if kind == "sync" else None
    table = add_fastbn({cls: hook for cls in (nn.BatchNorm1d, nn.BatchNorm2d, theirs) if cls})
    counts = [thop.profile(copy.deepcopy(m), (x,), table, verbose=False) for m in (base(), MODELS[kind]())]
    assert counts[0] == counts[1]


@models
def test_fvcore(kind):
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    x = torch.randn(2, 3, 3, 3)
    found, expected = (dict(count(m.eval(), x).by_operator()) for m in (MODELS[kind](), base()))
    assert found == expected and "batch_norm" in found
