"""torch.compile(model, backend="fastbn") and "fastbn_eager", for torch's, converted and BatchNormAct models."""

import copy
import subprocess
import sys

import pytest
import torch
from fusing import ADD_RELU, RELU, RESNET, ResNet, assert_same_steps, conv, images, simple
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fastbn
from fastbn.graph import pooling
from fastbn.graph.backends import fastbn_eager

pytestmark = pytest.mark.cpu

compilers = pytest.mark.parametrize("compiler", ["fastbn_eager", pytest.param("fastbn", marks=pytest.mark.slow)])
CONVERSIONS = {"torch": lambda m: m, "converted": fastbn.convert, "fused": lambda m: fastbn.convert(m, fuse=True)}


@pytest.fixture(autouse=True)
def clean_slate():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_names_are_known_without_importing_fastbn():
    code = (
        "import sys, torch\n"
        "model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())\n"
        "assert 'fastbn' not in sys.modules\n"
        "torch.compile(model, backend='fastbn_eager')(torch.randn(2, 3, 4, 4))\n"
        "import fastbn\n"
        "print(fastbn.report(model).fused)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "{'0': 'batch_norm + relu'}\n", done.stderr
    assert {"fastbn", "fastbn_eager"} <= set(torch._dynamo.list_backends())


@compilers
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_resnet(compiler, convert):
    model = ResNet().double()
    ours = CONVERSIONS[convert](copy.deepcopy(model))
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for training in (True, False, True):
        results = []
        for m, owner in ((compiled, ours), (model, model)):
            m.train(training)
            owner.zero_grad()
            x = (images() + training).detach().requires_grad_()
            torch.manual_seed(0)
            x = torch.randn_like(x).requires_grad_()
            for _ in range(2):
                y = m(x)
                y.square().sum().backward()
            results.append([y, x.grad, {n: p.grad for n, p in owner.named_parameters()}, owner.state_dict()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert fastbn.report(ours).fused == RESNET
    assert fastbn.report(compiled).fused == RESNET


@compilers
def test_no_graph_for_each_batch_size(compiler):
    counter = CompileCounterWithBackend(compiler)
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) + x))
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    for n in (4, 7, 9, 5):
        x = images(n, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_batch_norms_alone_and_as_functions():
    """What nothing follows is replaced by fastbn's kernel too; integers and meta tensors are left."""

    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x):
            y = F.batch_norm(x, self.mean, self.var, self.weight, None, self.training, 0.2, eps=1e-3)
            y = y + F.batch_norm(x, None, None, training=True)
            return fastbn.functional.batch_norm(y, None, None, training=True, activation="silu")

    seen = []

    def backend(graph, inputs):
        found = fastbn_eager(graph, inputs)
        seen.extend(node.target for node in graph.graph.nodes)
        return found

    model = Functions().double()
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    for training in (True, False):
        x = images()
        torch.testing.assert_close(compiled.train(training)(x), model.train(training)(x))
        torch.testing.assert_close(compiled._orig_mod.state_dict(), model.state_dict())
    assert F.batch_norm not in seen


def test_options_and_mode_reach_inductor(monkeypatch):
    given = []

    class Wrapper:
        def __init__(self, mode, options, dynamic):
            given.append((mode, options))

        def __call__(self, graph, inputs):
            return graph.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Wrapper)
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    torch.compile(model, backend="fastbn", options={"max_autotune": True})(images(dtype=torch.float32))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="fastbn", mode="reduce-overhead")(images(dtype=torch.float32))
    torch._dynamo.reset()
    torch.compile(model, backend="fastbn", options={"layout_optimization": True})(images(dtype=torch.float32))
    assert given == [
        (None, {"layout_optimization": False, "max_autotune": True}),
        ("reduce-overhead", None),
        (None, {"layout_optimization": True}),
    ]


@compilers
def test_autocast_and_channels_last(compiler):
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) + x.to(torch.bfloat16)))
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend=compiler)
    x = images(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found.dtype == torch.bfloat16 and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert fastbn.report(ours).fused == {"bn": ADD_RELU}


@compilers
def test_modules_with_the_activation_inside(compiler):
    model = nn.Sequential(conv(), fastbn.BatchNormAct2d(6, activation="silu")).double()
    compiled = torch.compile(copy.deepcopy(model), backend=compiler, fullgraph=True)
    x = images()
    torch.testing.assert_close(compiled(x), model(x))


def test_training_alone_in_eval_and_checkpointed():
    """A frozen batch norm in a model that trains, inside torch.utils.checkpoint."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv(), nn.BatchNorm2d(6), nn.ReLU())

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)

    model = Checkpointed().double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, images())
    assert fastbn.report(ours).fused == {"part.1": RELU, "part.4": RELU}
    for m in (ours, model):
        m.train()
        m.part[1].eval()
    x = images()
    torch.testing.assert_close(ours(x), model(x))
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


POOLS = {
    "ints": nn.MaxPool2d(3, 2, 1),
    "pairs": nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "stride_of_the_window": nn.MaxPool2d(2, ceil_mode=True),
    "indices": nn.MaxPool2d(2, return_indices=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_is_one_operator(name, layout):
    """As the backend "fastbn" does before it calls Inductor on a CPU, and so without Inductor's compiler."""

    def forward(self, x):
        y = POOLS[name](F.relu(self.bn(self.conv(x))))
        return torch.cat([t.flatten().double() for t in y]) if isinstance(y, tuple) else y

    def backend(graph, inputs):
        pooling.replace(graph.graph)
        graph.recompile()
        names.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    names = []
    model = simple(forward).double().to(memory_format=layout)
    x = images().to(memory_format=layout)
    results, strides = [], []
    for m in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        y = m(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, model.conv.weight.grad.clone()])
        strides.append([y.stride(), leaf.grad.stride()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert strides[0] == strides[1]
    assert "max_pool2d" in names


def test_max_pooling_without_a_batch_dimension():
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(pooling.max_pool2d(x, 3, 2), F.max_pool2d(x, 3, 2))


ALL_CHANNELS_LAST = {"force_layout_optimization": True}
AS_THEY_ARE = {"layout_optimization": False}


@pytest.mark.parametrize(
    ("layout", "groups", "given", "expected"),
    [
        (torch.contiguous_format, 1, None, AS_THEY_ARE),
        (torch.contiguous_format, 2, None, AS_THEY_ARE),
        (torch.contiguous_format, 1, {"layout_optimization": True}, {"layout_optimization": True}),
        (torch.contiguous_format, 6, None, ALL_CHANNELS_LAST),
        (torch.channels_last, 1, None, ALL_CHANNELS_LAST),
    ],
)
def test_options_for_training_on_a_cpu(layout, groups, given, expected, monkeypatch):
    """A contiguous model without depthwise convolutions keeps its layouts; the options of the user go first."""
    seen = []

    def wrapper(mode, options, dynamic):
        seen.append(options)
        return lambda graph, inputs: graph.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", wrapper)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.ReLU()).to(memory_format=layout)
    x = images(dtype=torch.float32).to(memory_format=layout)
    torch.compile(model, backend="fastbn", options=given)(x)
    assert seen == [expected]
    with torch.no_grad():
        torch.compile(model.eval(), backend="fastbn", options=given)(x)
    assert seen[1] == given
