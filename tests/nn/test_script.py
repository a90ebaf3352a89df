"""torch.jit.script of modules and of converted, fused, folded and frozen models: eager results, torch's operators."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastbn
from fastbn.activations import ACTIVATIONS, DEFAULTS
from fastbn.graph.fusing import is_fused

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def scripted(module):
    """Saved and loaded again, with operators that are there without fastbn."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        made = torch.jit.load(file)
    assert "fastbn::" not in str(made.inlined_graph)
    return made


def assert_same(module, *inputs, steps=2):
    """In float64, where two correct results have the same digits."""
    module, inputs = module.double(), [t.double() for t in inputs]
    theirs, ours = scripted(module), copy.deepcopy(module)
    for _ in range(steps):
        results = []
        for m in (theirs, ours):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = m(*leaves)
            grads = torch.autograd.grad(y.square().sum(), [*leaves, *m.parameters()])
            results.append([y.detach(), *grads, *(b.clone() for b in m.buffers())])
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


MODULES = {
    "plain": lambda: fastbn.BatchNorm2d(4),
    "cumulative": lambda: fastbn.BatchNorm2d(4, momentum=None),
    "affine=False": lambda: fastbn.BatchNorm2d(4, affine=False),
    "bias=False": lambda: fastbn.BatchNorm2d(4, bias=False),
    "no statistics": lambda: fastbn.BatchNorm2d(4, track_running_stats=False),
    "act": lambda: fastbn.BatchNormAct2d(4),
    "act, no statistics": lambda: fastbn.BatchNormAct2d(4, track_running_stats=False, affine=False),
    "frozen": lambda: fastbn.FrozenBatchNorm2d(4, trainable=True),
}
EVAL_ONLY = {
    "ghost": lambda: fastbn.GhostBatchNorm2d(4, virtual_batch_size=2),
    "sync": lambda: fastbn.SyncBatchNorm(4),
    "sync act": lambda: fastbn.SyncBatchNormAct(4, activation="silu"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind, training):
    assert_same(MODULES[kind]().train(training), torch.randn(5, 4, 3, 3))


@pytest.mark.parametrize("n", [1, 3])
def test_other_dimensions(n):
    for cls in ("BatchNorm", "BatchNormAct", "FrozenBatchNorm"):
        module = getattr(fastbn, f"{cls}{n}d")(4)
        assert_same(module, torch.randn(5, 4, *[3] * n))
        with pytest.raises(torch.jit.Error, match="expected"):
            scripted(module)(torch.randn(5, 4, 1, 1))


@pytest.mark.parametrize("kind", EVAL_ONLY)
def test_modules_that_only_eval_can_script(kind):
    module = EVAL_ONLY[kind]()
    assert_same(module.eval(), torch.randn(5, 4, 3, 3))
    with pytest.raises(torch.jit.Error, match="does not train in TorchScript"):
        scripted(module.train())(torch.randn(5, 4, 3, 3))


def test_masked_says_that_it_does_not_run():
    with pytest.raises(torch.jit.Error, match="MaskedBatchNorm1d does not run in TorchScript"):
        scripted(fastbn.MaskedBatchNorm1d(4))(torch.randn(2, 4, 3), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    x, residual = torch.randn(2, 5, 4, 3, 3) * 3
    params = (None,) if DEFAULTS[name] is None else (None, 0.3, 2)
    for param in params:
        module = fastbn.BatchNormAct2d(4, activation=name, activation_param=param)
        assert_same(module, x)
        assert_same(module, x, residual)


def doubled(x):
    return x * 2


def block(activation):
    """Its class is in a closure, and its forward has names from the closure and from this file."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(activation(self.bn(self.conv(x)) + x)) + self.branch(x)

    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Block())


TOOLS = {
    "convert": fastbn.convert,
    "fuse": lambda m: fastbn.convert(m, fuse=True),
    "fold": lambda m: fastbn.fold(m.eval()),
    "fold, fused": lambda m: fastbn.fold(fastbn.convert(m, fuse=True).eval()),
    "freeze": fastbn.freeze,
    "revert": lambda m: fastbn.revert(fastbn.convert(m, fuse=True)),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_models(tool):
    model = TOOLS[tool](block(F.relu))
    classes = [type(m) for m in model.modules()]
    assert_same(model, torch.randn(5, 3, 6, 6))
    assert [type(m) for m in model.modules()] == classes, "the eager model stays what it was"
    if tool == "fuse":
        assert is_fused(model[3]) and type(model[3]).__name__ == "Block"
