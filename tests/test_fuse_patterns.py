"""fastbn.convert(fuse=True): which operations are fused, and which must not be. In: forwards as people write them. Out:
outputs, gradients and states beside the original's."""

import copy
import operator

import pytest
import torch
from fusing import ADD, ADD_RELU, RELU, RESNET, Of, ResNet, as_tuple, assert_same_steps, conv, fuse, images, simple
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


class Branches(nn.Module):
    """Many small forwards in one capture, by name: {name: (self, x) -> tensor}."""

    def __init__(self, forwards, **children):
        super().__init__()
        self.forwards = forwards
        for name in forwards:
            setattr(self, name, simple(None, **{k: copy.deepcopy(m) for k, m in children.items()}))

    def forward(self, x):
        return tuple(y for name, f in self.forwards.items() for y in as_tuple(f(getattr(self, name), x)))


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


# What must not be fused


LEFT = {
    "used twice": lambda self, x: (lambda z: F.relu(z) + z)(self.bn(self.conv(x))),
    "the sum is used twice": lambda self, x: (lambda z: F.relu(z) * z)(self.bn(self.conv(x)) * 1 + x),
    "used as the residual too": lambda self, x: (lambda z: F.relu(z + z))(self.bn(self.conv(x))),
    "returned too": lambda self, x: (lambda z: (F.relu(z), z))(self.bn(self.conv(x))),
    "a result in place that is not used": lambda self, x: (lambda z: (F.relu_(z), z)[1])(self.bn(self.conv(x))),
    "a number": lambda self, x: F.relu(self.bn(self.conv(x)) + 1.5),
    "alpha": lambda self, x: F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2)),
    "in place on the input": lambda self, x: F.relu(x.add_(self.bn(x + 1))),
    "in place on an alias": lambda self, x: (lambda r: (F.relu(operator.iadd(r, self.bn(x + 1))), x))(x.view_as(x)),
    "in place on what is used": lambda self, x: (lambda r: F.relu(operator.iadd(r, self.bn(x + 1))) + r)(self.conv(x)),
    "approximate gelu": lambda self, x: F.gelu(self.bn(self.conv(x)), approximate="tanh"),
    "another function": lambda self, x: F.softplus(self.bn(self.conv(x))),
    "prelu": lambda self, x: self.prelu(self.bn(self.conv(x))),
    "hardtanh": lambda self, x: self.hardtanh(self.bn(self.conv(x))),
}  # fmt: skip


def test_left_alone():
    forwards = {name.replace(" ", "_"): f for name, f in LEFT.items() if not name.startswith("in place")}
    ours = fuse(Branches(forwards, prelu=nn.PReLU(), hardtanh=nn.Hardtanh(0, 5)), fused={})
    assert fastbn.report(ours).left.keys() == {f"{name}.bn" for name in forwards}


@pytest.mark.parametrize("name", [name for name in LEFT if name.startswith("in place")])
def test_left_alone_in_place(name):
    ours = fuse(simple(LEFT[name]), fused={})
    assert "in place" in fastbn.report(ours).left["bn"]


def test_the_sum_used_twice_is_fused_without_the_activation():
    fuse(simple(lambda self, x: (lambda z: F.relu(z) * z)(self.bn(self.conv(x)) + x)), fused={"bn": ADD})


def test_the_input_changes_between_batch_norm_and_add():
    """Batch norm would run where the add is: too late, in all but the last of these."""

    def views(self, x):
        y = self.conv(x) * 2
        flat = y.view(-1)
        z = self.bn(y)
        flat.mul_(3)
        return F.relu(z + torch.sin(x)), y

    def opaque(self, x):
        y = torch.tanh(x)
        z = self.bn(y)
        return F.relu(z + self.changes(y))

    def opaque_alias(self, x):
        y = self.pick(x)
        z = self.bn(y)
        return F.relu(z + self.changes(x))

    class Changes(nn.Module):
        def forward(self, x):
            return x.mul_(2) if not torch.is_grad_enabled() else x * 3

    with torch.no_grad():
        for forward in (views, opaque, opaque_alias):
            model = simple(forward, changes=Changes(), pick=Of(lambda self, x: x)).double().eval()
            ours = fastbn.convert(copy.deepcopy(model), fuse=True)
            x = images()
            torch.testing.assert_close(ours(x.clone()), model(x.clone()))
            assert "bn" not in fastbn.report(ours).fused
    fuse(simple(lambda self, x: F.relu(self.bn(self.conv(x)) + self.other(x)), other=conv()), fused={"bn": ADD_RELU})


def test_the_residual_changes_between_batch_norm_and_add():
    """The fused operation has to run where the add is, which reads the changed one."""

    def forward(self, x):
        residual = self.other(x)
        z = self.bn(self.conv(x))
        torch.relu_(residual)
        return F.relu(z + residual)

    fuse(simple(forward, other=conv()), fused={"bn": ADD_RELU})


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_residual_changes_after_the_add(act):
    """An add keeps neither operand for backward; the fused operation keeps the residual, unless a bit mask will do."""

    def forward(self, x):
        residual = self.other(x)
        y = getattr(F, act)(self.bn(self.conv(x)) + residual)
        return y, residual.mul_(2)

    fuse(simple(forward, other=conv()), fused={"bn": ADD_RELU if act == "relu" else ADD})


def test_the_same_batch_norm_runs_between_batch_norm_and_add():
    """The order of its two calls decides what the running statistics are."""
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) + torch.sin(self.bn(x * 7))))
    fuse(model, fused={})


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


class Adds(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.bn, self.add = nn.BatchNorm2d(6), add

    def forward(self, x, residual):
        return F.relu(self.add(self.bn(x), residual))


@pytest.mark.parametrize("shape", [(6, 1, 1), (4, 6, 1, 5), (1, 4, 6, 5, 5)], ids=str)
@pytest.mark.parametrize("add", [operator.add, lambda z, x: x + z])
def test_broadcast_residuals(shape, add):
    """A sum that broadcasts or promotes is left; one of the same sizes is fused, in the same model."""
    model = Adds(add).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, images(), torch.randn(shape, dtype=torch.float64))
    assert "of another size" in fastbn.report(ours).left["bn"]
    assert_same_steps(ours, model, images(), images())
    assert fastbn.report(ours).fused == {"bn": ADD_RELU}


def test_type_promotion_of_the_residual():
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) + x.double()))
    ours, x = fastbn.convert(copy.deepcopy(model), fuse=True), images(dtype=torch.float32)
    assert ours(x).dtype == model(x).dtype == torch.float64
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    assert "dtype" in fastbn.report(ours).left["bn"]
    in_place = simple(lambda self, x: F.relu(self.bn(self.conv(x)).add_(x.double())))
    assert fastbn.convert(in_place, fuse=True)(x).dtype == torch.float32


def test_strides_are_those_of_the_original():
    for add in (lambda z, x: z + x, lambda z, x: x + z):
        model = Of(lambda self, x, add=add: F.relu(add(self.bn(x), x.contiguous(memory_format=torch.channels_last))))
        model.bn = nn.BatchNorm2d(6)
        ours, x = fastbn.convert(copy.deepcopy(model), fuse=True), images(dtype=torch.float32)
        assert ours(x).stride() == model(x).stride()
        torch.testing.assert_close(ours(x), model(x))


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


def test_a_mode_that_changes_between():
    """A fused operation in the mode of the batch norm would lose the sum's gradient, or give the activation one."""

    def without(self, x):
        residual = x * 2
        with torch.no_grad():
            z = self.bn(self.conv(x))
        return F.relu(z + residual)

    def with_grad(self, x):
        with torch.enable_grad():
            z = self.bn(self.conv(x))
        return F.relu(z)

    fuse(simple(without), fused={})
    ours = fastbn.convert(simple(with_grad), fuse=True)
    with torch.no_grad():
        assert not ours(images(dtype=torch.float32)).requires_grad
