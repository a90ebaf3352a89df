"""torch._dynamo.compiled_autograd after an eager forward, compared with eager backward passes."""

import copy

import pytest
import torch
from ranks import Ranks
from torch import nn

import fastbn

compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
needs_interface = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="compiled autograd has another interface there"
)
pytestmark = [pytest.mark.cpu, needs_interface]


class Residual(nn.Module):
    """ReLU with a residual: what backward needs is kept as a mask, which only kernels read."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), fastbn.BatchNorm2d(3), fastbn.BatchNormAct2d(3)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)), x)


MODULES = {
    "torch": lambda: nn.BatchNorm2d(3),
    "train": lambda: fastbn.BatchNorm2d(3),
    "eval": lambda: fastbn.BatchNorm2d(3).eval(),
    "no parameters": lambda: fastbn.BatchNorm2d(3, affine=False),
    "bias=False": lambda: fastbn.BatchNorm2d(3, bias=False),
    "relu": lambda: fastbn.BatchNormAct2d(3),
    "elu": lambda: fastbn.BatchNormAct2d(3, activation="elu", activation_param=0.5),
    "frozen": lambda: fastbn.FrozenBatchNorm2d(3),
    "ghost": lambda: fastbn.GhostBatchNorm2d(3, virtual_batch_size=2),
    "fused": lambda: fastbn.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()), fuse=True),
    "residual": Residual,
}


def steps(module, xs, compiler=None):
    """Outputs and gradients of a step for each input."""
    results = []
    for x in xs:
        x = x.clone().requires_grad_()
        module.zero_grad()
        y = module(x)
        loss = (y * y * y).sum()
        if compiler is None:
            loss.backward()
        else:
            with compiled_autograd._enable(compiler):
                loss.backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
    return results


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_with", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("kind", MODULES)
def test_gradients(kind, compile_with):
    module = MODULES[kind]().double()
    xs, graphs = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64), []
    expected = steps(copy.deepcopy(module), xs)

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend=compile_with, fullgraph=kind != "residual")

    torch.testing.assert_close(steps(module, xs, compiler), expected)
    assert len(graphs) == 1, "the second and the third pass are those of the first graph"


@pytest.mark.slow
def test_other_sizes_and_other_numbers_are_other_graphs():
    xs = [torch.randn(n, 3, 4, s, dtype=torch.float64) for n, s in ((4, 5), (6, 5), (3, 7), (5, 8))]
    modules = [fastbn.BatchNorm2d(3, eps=eps).double() for eps in (1e-5, 0.5)]
    for module in (*modules, fastbn.BatchNormAct2d(3, activation="tanh", eps=0.5).double()):
        expected = steps(copy.deepcopy(module), xs)
        compiler = torch.compile(backend="aot_eager", dynamic=True)
        torch.testing.assert_close(steps(module, xs, compiler), expected)


def test_hooks_of_saved_tensors():
    module, x = fastbn.BatchNorm2d(3).double(), torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    expected = steps(copy.deepcopy(module), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        found = steps(module, x, torch.compile(backend="aot_eager"))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_inductor():
    module = MODULES["fused"]().double()
    xs = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    expected = steps(copy.deepcopy(module), xs)
    torch.testing.assert_close(steps(module, xs, torch.compile(backend="inductor")), expected)


def synchronized_step(is_compiled):
    torch.manual_seed(torch.distributed.get_rank())
    module, x = fastbn.SyncBatchNorm(3).double(), torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    return steps(module, x, torch.compile(backend="aot_eager") if is_compiled else None)


@pytest.mark.slow
def test_two_ranks():
    ranks = Ranks(2)
    try:
        torch.testing.assert_close(ranks.run(synchronized_step, True), ranks.run(synchronized_step, False))
    finally:
        ranks.close()
