"""DTensor, mkldnn, functionalize, make_fx and torch.jit.trace, where torch's batch norm computes the call."""

import copy
import subprocess
import sys

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fastbn

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def of_dtensors(name, placements, training):
    """In a rank: full tensors of the output, the gradients and the statistics, or what was raised."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    function = F.batch_norm if name == "torch" else fastbn.functional.batch_norm
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    place = [Replicate() if placements is None else Shard(placements)]
    of_channels = [Shard(0) if placements == 1 else Replicate()]
    x = distribute_tensor(torch.randn(4, 6, 3, 3), mesh, place).requires_grad_()
    weight, bias = (distribute_tensor(torch.rand(6), mesh, of_channels).requires_grad_() for _ in range(2))
    mean, var = (distribute_tensor(torch.rand(6), mesh, of_channels) for _ in range(2))
    try:
        y = function(x, mean, var, weight, bias, training)
        y.square().sum().backward()
    except Exception as error:
        return type(error).__name__, str(error)
    return [t.full_tensor().detach() for t in (y, x.grad, weight.grad, bias.grad, mean, var)]


@training
@pytest.mark.parametrize("placements", [None, 0, 1], ids=["replicated", "batch", "channels"])
def test_dtensors(two, placements, training):
    """On two ranks, whatever torch makes of them: also a batch that is sharded."""
    results = (two.run(of_dtensors, name, placements, training) for name in ("fastbn", "torch"))
    for ours, theirs in zip(*results, strict=True):
        if isinstance(theirs, tuple):
            assert ours == theirs
        else:
            torch.testing.assert_close(ours, theirs)
            if placements is None or training is False:
                torch.testing.assert_close(ours[:1], expected_output(training))


def expected_output(training):
    torch.manual_seed(0)
    x, weight, bias, mean, var = torch.randn(4, 6, 3, 3), *(torch.rand(6) for _ in range(4))
    return [F.batch_norm(x.double(), mean.double(), var.double(), weight.double(), bias.double(), training).float()]


def modules_of_dtensors(name):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    module = {"torch": nn.BatchNorm2d, "fastbn": fastbn.BatchNorm2d, "act": fastbn.BatchNormAct2d}[name](6)
    module = distribute_module(module, mesh)
    x = distribute_tensor(torch.randn(4, 6, 3, 3), mesh, [Replicate()])
    y = module(x, x) if name == "act" else module(x)
    return [y.full_tensor().detach(), *(b.full_tensor() for b in module.buffers())]


def test_modules_of_dtensors(two):
    ours, theirs, act = (two.run(modules_of_dtensors, name) for name in ("fastbn", "torch", "act"))
    torch.testing.assert_close(ours, theirs)
    torch.manual_seed(0)
    torch.testing.assert_close(act[0][0], torch.relu(theirs[0][0] + torch.randn(4, 6, 3, 3)))
    torch.testing.assert_close(act[0][1:], theirs[0][1:])


def test_dtensors_cost_nothing_at_import():
    code = "import sys, torch; a = 'torch.distributed.tensor' in sys.modules; import fastbn; "
    code += "assert a or 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@training
def test_mkldnn(training):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    x, results = torch.randn(4, 6, 5, 5).to_mkldnn(), []
    for cls in (nn.BatchNorm2d, fastbn.BatchNorm2d):
        bn = cls(6).train(training)
        y = bn(x)
        assert y.is_mkldnn
        results.append([y.to_dense().detach(), *bn.buffers()])
    torch.testing.assert_close(*results)
    act = fastbn.BatchNormAct2d(6).train(training)
    torch.testing.assert_close(act(x, x).to_dense().detach(), torch.relu(results[0][0] + x.to_dense()))


MODULES = {
    "plain": (lambda: nn.BatchNorm2d(3), fastbn.convert),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), fastbn.convert),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), fastbn.convert),
    "no parameters": (lambda: nn.BatchNorm2d(3, affine=False), fastbn.convert),
    "fused": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.SiLU()), lambda m: fastbn.convert(m, fuse=True)),
    "synchronized": (lambda: nn.BatchNorm2d(3), fastbn.SyncBatchNorm.convert_sync_batchnorm),
}
kinds = pytest.mark.parametrize("kind", MODULES)


def a_pass(module, params, buffers, x):
    buffers = {k: v.clone() for k, v in buffers.items()}
    return functional_call(module, (params, buffers), (x,)), [*buffers.values()]


def a_step(module):
    """Forward and backward as a function of tensors."""

    def step(params, buffers, x):
        params = {k: v.detach().requires_grad_() for k, v in params.items()}
        x = x.detach().requires_grad_()
        y, buffers = a_pass(module, params, buffers, x)
        grads = torch.autograd.grad((y * y * y).sum(), [x, *params.values()])
        return [y.detach(), *grads, *buffers]

    return step


def a_step_by_functorch(module):
    def step(params, buffers, x):
        def loss(params, x):
            y, stats = a_pass(module, params, buffers, x)
            return (y * y * y).sum(), [y, *stats]

        (params, dx), rest = torch.func.grad(loss, (0, 1), has_aux=True)(params, x)
        return [dx, *params.values(), *rest]

    return step


def states(kind, training):
    make, convert = MODULES[kind]
    theirs = make().double().train(training)
    ours = convert(copy.deepcopy(theirs))
    return theirs, ours, (dict(ours.named_parameters()), dict(ours.named_buffers()))


def an_input(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


@training
@kinds
def test_functionalize(kind, training):
    theirs, ours, state = states(kind, training)
    x, passes = an_input(4, 3, 5, 5), [lambda *a, m=m: a_pass(m, *a) for m in (theirs, ours)]
    expected = passes[0](*state, x)
    torch.testing.assert_close(functionalize(passes[1])(*state, x), expected)
    if kind == "cumulative" and training:
        return  # torch's reads the value of the counter, which a graph cannot hold
    torch.testing.assert_close(make_fx(functionalize(passes[1]))(*state, x)(*state, x), expected)
    expected = a_step_by_functorch(theirs)(*state, x)
    for transformed in (functionalize(a_step_by_functorch(ours)), make_fx(functionalize(a_step_by_functorch(ours)))):
        found = transformed(*state, x)
        found = found(*state, x) if isinstance(found, torch.fx.GraphModule) else found
        torch.testing.assert_close(found, expected)


@training
@kinds
@pytest.mark.parametrize("tracing_mode", ["real", pytest.param("fake", marks=pytest.mark.slow), "symbolic"])
def test_make_fx_of_a_step(kind, training, tracing_mode):
    theirs, ours, state = states(kind, training)
    x = an_input(4, 3, 5, 5)
    for step in (a_step, a_step_by_functorch):
        graph = make_fx(step(ours), tracing_mode=tracing_mode)(*state, x)
        other = an_input(6, 3, 4, 7) if tracing_mode == "symbolic" else x
        torch.testing.assert_close(graph(*state, other), step(theirs)(*state, other))


@training
@kinds
def test_jit_trace_has_operators_of_torch(kind, training):
    theirs, ours, _ = states(kind, training)
    x = an_input(4, 3, 5, 5)
    graph = torch.jit.trace(copy.deepcopy(ours), x, check_trace=False).inlined_graph
    assert "aten::batch_norm" in str(graph) and "fastbn::" not in str(graph)
    traced = torch.jit.trace(ours, x, check_trace=False)
    theirs(x)  # what the trace has run
    torch.testing.assert_close(traced(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@training
@pytest.mark.parametrize("kind", ["plain", pytest.param("no statistics", marks=pytest.mark.slow), "fused"])
def test_compiled_transforms(kind, training):
    """torch.compile of gradients by torch.func."""
    torch._dynamo.reset()
    theirs, ours, state = states(kind, training)
    x = an_input(4, 3, 5, 5)
    compiled = torch.compile(a_step_by_functorch(ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*state, x), a_step_by_functorch(theirs)(*state, x))
    graphs = []

    def remember(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    torch.compile(ours, backend=remember, fullgraph=True)(x)
    assert "fastbn.batch_norm" in graphs[0], "without a transform the kernels stay"
    torch._dynamo.reset()


def test_compiled_tangents_are_right_or_refused():
    """In a process of its own: a refused compilation leaves torch.func in a state that breaks the next one."""
    code = """
import torch, fastbn
bn, x = fastbn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5)
f = lambda x: torch.func.jvp(bn, (x,), (x.sin(),))[1]
try:
    found = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
except RuntimeError:
    found = f(x)
torch.testing.assert_close(found, f(x))
assert found.abs().max() > 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
