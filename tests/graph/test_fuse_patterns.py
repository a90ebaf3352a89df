"""fastbn.convert(fuse=True): which operations are fused; outputs, gradients and states are the original's."""

import copy
import operator

import pytest
import torch
from fusing import ADD, ADD_RELU, RELU, RESNET, Branches, Of, ResNet, conv, fuse, images, simple
from torch import nn
from torch.nn import functional as F

import fastbn
from fastbn.autograd import batch_norm
from fastbn.graph import matching

pytestmark = pytest.mark.cpu


def test_a_resnet():
    model = fuse(ResNet(), fused=RESNET)
    assert fastbn.report(model).left == {
        "layer1.0.downsample.1": "the sum it goes into is fused with the batch norm of the other operand"
    }


MODULES = {
    "relu": nn.ReLU(), "relu_in_place": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(0.3),
    "relu6": nn.ReLU6(inplace=True), "elu": nn.ELU(0.7), "silu": nn.SiLU(inplace=True), "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
}  # fmt: skip


@pytest.mark.parametrize("add", [False, True])
def test_activation_modules(add):
    def forward(name):
        def run(self, x):
            z = self.bn(self.conv(x))
            return getattr(self, name)(z + x if add else z)

        return run

    pattern = "batch_norm + add + " if add else "batch_norm + "
    fused = {f"{name}.bn": pattern + name.removesuffix("_in_place") for name in MODULES}
    fuse(Branches({name: forward(name) for name in MODULES}, **MODULES), fused=fused)


FUNCTIONS = [
    ("relu", F.relu), ("relu", torch.relu), ("relu", torch.relu_), ("relu", lambda z: z.relu()),
    ("relu", lambda z: z.relu_()), ("relu", lambda z: F.relu(z, True)), ("relu", lambda z: F.relu(z, inplace=True)),
    ("leaky_relu", lambda z: F.leaky_relu(z, 0.2)), ("leaky_relu", lambda z: F.leaky_relu(z, negative_slope=0.4)),
    ("leaky_relu", F.leaky_relu), ("relu6", F.relu6), ("elu", lambda z: F.elu(z, alpha=0.5, inplace=True)),
    ("silu", F.silu), ("hardswish", F.hardswish), ("gelu", F.gelu), ("gelu", lambda z: F.gelu(z, approximate="none")),
    ("relu6", lambda z: F.hardtanh(z, 0, 6)), ("relu6", lambda z: F.hardtanh(z, 0.0, 6.0, inplace=True)),
    ("sigmoid", torch.sigmoid), ("sigmoid", F.sigmoid), ("sigmoid", lambda z: z.sigmoid_()),
    ("tanh", torch.tanh), ("tanh", F.tanh), ("tanh", lambda z: z.tanh()),
]  # fmt: skip


def test_activation_functions():
    forwards = {f"f{i}": lambda self, x, f=f: f(self.bn(self.conv(x))) for i, (_, f) in enumerate(FUNCTIONS)}
    fuse(Branches(forwards), fused={f"f{i}.bn": f"batch_norm + {name}" for i, (name, _) in enumerate(FUNCTIONS)})


ADDITIONS = [
    lambda z, x: z + x, lambda z, x: x + z, torch.add, lambda z, x: torch.add(x, z, alpha=1), lambda z, x: z.add(x),
    lambda z, x: z.add_(x), operator.iadd,
]  # fmt: skip


@pytest.mark.parametrize("act", [True, False])
def test_additions(act):
    def forward(add):
        return lambda self, x: F.relu(add(self.bn(self.conv(x)), x)) if act else add(self.bn(self.conv(x)), x)

    forwards = {f"add{i}": forward(add) for i, add in enumerate(ADDITIONS)}
    fuse(Branches(forwards), fused=dict.fromkeys([f"{name}.bn" for name in forwards], ADD_RELU if act else ADD))


@pytest.mark.parametrize(
    ("bn", "shape"),
    [(nn.BatchNorm1d(6), (5, 6)), (nn.BatchNorm1d(6), (5, 6, 4)), (nn.BatchNorm3d(6), (3, 6, 2, 3, 2))],
    ids=str,
)
def test_other_dimensions(bn, shape):
    fuse(nn.Sequential(bn, nn.ReLU()), torch.randn(shape, dtype=torch.float64), fused={"0": RELU})
    model = fastbn.convert(nn.Sequential(copy.deepcopy(bn), nn.ReLU()).double(), fuse=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected"):
            model(torch.randn(6, dtype=torch.float64))
    model(torch.randn(shape, dtype=torch.float64))
    assert fastbn.report(model).fused == {"0": RELU}, "bad input is no reason to run unfused from then on"


OPTIONS = [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1, "momentum": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_batch_norm(options):
    fuse(nn.Sequential(conv(), nn.BatchNorm2d(6, **options), nn.ReLU()), fused={"1": RELU})


def test_across_the_end_of_submodules():
    """The last batch norm of a body, two levels down, and the add and ReLU of the block around it (pytorchcv)."""

    class ConvBlock(nn.Module):
        def __init__(self, activate):
            super().__init__()
            self.activate, self.conv, self.bn = activate, conv(), nn.BatchNorm2d(6)
            if activate:
                self.activ = nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.bn(self.conv(x))
            return self.activ(x) if self.activate else x

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(ConvBlock(True), ConvBlock(False))
            self.activ = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.activ(self.body(x) + x)

    model = fuse(Unit(), fused={"body.0.bn": RELU, "body.1.bn": ADD_RELU})
    seen, reference = [], fastbn.revert(copy.deepcopy(model))
    model.body[1].register_forward_hook(lambda m, args, y: seen.append(y))
    x = images()
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(
        seen[0], reference.body[1](reference.body[0](x)), msg="a hook inside still sees its tensor"
    )


def test_a_shared_relu_and_a_shared_batch_norm():
    relu, bn = nn.ReLU(), nn.BatchNorm2d(6)
    model = nn.Sequential(conv(), bn, relu, conv(), bn, relu, relu)
    fuse(model, fused={"1": RELU})


def test_both_operands_are_batch_norms():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.other(x))

    model = simple(forward, other=nn.BatchNorm2d(6))
    ours = fuse(model, fused={"bn": ADD_RELU})
    assert list(fastbn.report(ours).left) == ["other"]


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(6)

    def forward(self, x, residual=None, *, scale=1.0, then=()):
        if residual is None:
            residual = x
        y = F.relu(self.bn(self.conv(x)) + residual) * scale
        return then[0](y) if then else y


@pytest.mark.parametrize(
    "residual", [None, torch.ones(6, 1, 1, dtype=torch.float64), images()], ids=["none", "small", "full"]
)
@pytest.mark.parametrize("kwargs", [{}, {"scale": 2.0}, {"then": (torch.exp,)}], ids=["plain", "scaled", "then"])
def test_arguments_that_change_what_a_forward_does(residual, kwargs):
    inputs = (images(),) if residual is None else (images(), residual)
    broadcast = residual is not None and residual.dim() == 3
    fuse(TwoArguments(), *inputs, fused={} if broadcast else {"bn": ADD_RELU}, **kwargs)


def test_how_the_caller_calls():
    fuse(Of(lambda self, x: self.block(x, x * 2), block=TwoArguments()), fused={"block.bn": ADD_RELU})
    fuse(Of(lambda self, x: self.block(self.block(x, x * 2)), block=TwoArguments()), fused={"block.bn": ADD_RELU})


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_list_of_tensors(kind):
    """As in densenet: a layer that takes a tensor or a list."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(6), conv()

        def forward(self, x):
            features = [x] if isinstance(x, torch.Tensor) else x
            return self.conv(F.relu(self.bn(sum(features))))

    model = Of(lambda self, x: self.layer([x, x * 2] if kind == "list" else x), layer=Layer())
    fuse(model, fused={"layer.bn": RELU})
    layer = fastbn.convert(copy.deepcopy(model).double(), fuse=True).layer
    x = images()
    torch.testing.assert_close(layer([x]), layer(x))


def test_the_kernel_gets_the_activation_and_the_residual(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append((args[9], args[11] is not None))
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(matching, "batch_norm", counted)
    model = fastbn.convert(ResNet(), fuse=True)
    model(images(dtype=torch.float32))
    assert sorted(calls) == sorted([("relu", False)] * 5 + [("relu", True)] * 2 + [("identity", False)]), (
        "five with ReLU, two with add and ReLU, and the shortcut's"
    )


class Stem(nn.Module):
    """The residual is itself a fused result, the batch norm is called twice, or both sums are fused."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        for k in (1, 2):
            setattr(self, f"c{k}", conv(kernel=1))
            setattr(self, f"b{k}", nn.BatchNorm2d(6))
            setattr(self, f"s{k}", nn.Sequential(conv(kernel=1), nn.BatchNorm2d(6), nn.ReLU()))

    def forward(self, x):
        return self.function(self, x)


def fused_residual(self, x):
    h = F.relu(self.b1(self.c1(x)))
    return F.relu(self.b2(self.c2(h)) + h)


def two_sums(self, x):
    y = x + self.b1(self.c1(x))
    y = y + self.b2(self.c2(x))
    return F.relu(y)


def called_twice(self, x):
    return F.relu(self.b1(self.c1(x))) + self.b1(x)


def parts_of_a_sequential(self, x):
    return self.s1[2](self.s1[1](self.s1[0](x))) + self.s1[1](x)


@pytest.mark.parametrize(
    ("forward", "fused"),
    [
        (fused_residual, {"b1": RELU, "b2": ADD_RELU}), (two_sums, {"b1": ADD, "b2": ADD_RELU}),
        (called_twice, {"b1": ADD}), (parts_of_a_sequential, {"s1.1": ADD}),
    ],
)  # fmt: skip
def test_matches_that_use_one_another(forward, fused):
    fuse(Stem(forward), fused=fused)
