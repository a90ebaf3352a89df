"""fastbn.convert(fuse=True): what is fused computes what it did before, and what could go wrong is left alone.
In: small models of every shape that people write. Out: outputs, gradients and states beside the original's."""

import copy
import io
import operator
import pickle
import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fastbn
from fastbn import patterns
from fastbn.modules import BatchNorm2d

pytestmark = pytest.mark.cpu

RELU, ADD_RELU, ADD = "batch_norm + relu", "batch_norm + add + relu", "batch_norm + add"


@pytest.fixture
def calls(monkeypatch):
    """How often a Site ran fused, and how often one operation after the other."""
    counts = {"fused": 0, "one by one": 0}

    def count(owner, name, kind):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[kind] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(patterns, "batch_norm", "fused")
    count(patterns.Site, "_one_by_one", "one by one")
    return counts


def images(n=4, c=6, size=5, dtype=torch.float64):
    return torch.randn(n, c, size, size, dtype=dtype)


def conv(groups=1, kernel=3):
    return nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=groups)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def assert_same_steps(ours, original, *inputs, steps=3, **kwargs):
    """Outputs, gradients, changed inputs and states of the two, in training, in eval and in training again."""
    for training in (True, False, True):
        results = []
        for model in (ours, original):
            model.train(training)
            torch.manual_seed(3)
            for _ in range(steps):
                model.zero_grad()
                leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
                used = [x * 1 if x.is_floating_point() else x for x in leaves]  # so that in-place operations may
                y = as_tuple(model(*used, **kwargs))
                sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in y).backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append([y, used, [x.grad for x in leaves], grads, model.state_dict()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def fuse(model, *inputs, fused, **kwargs):
    """Convert a copy, compare it with the model, and return it. fused: the patterns expected, by name."""
    model = model.double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    found = {name: what.split(" in ")[0] for name, what in fastbn.report(ours).fused.items()}
    assert found == fused
    assert_same_steps(ours, model, *(inputs or (images(),)), **kwargs)
    return ours


class Of(nn.Module):
    """A module with the forward that a test gives it: (self, x)."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def simple(forward, **children):
    return Of(forward, conv=conv(), bn=nn.BatchNorm2d(6), **children)


class Bottleneck(nn.Module):
    """As in torchvision: one ReLU module for all, in place, and an add in place."""

    def __init__(self, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = conv(kernel=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = conv(kernel=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(kernel=1), nn.BatchNorm2d(6)) if downsample else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(True), Bottleneck())
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x):
        return self.layer1(self.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


RESNET = {
    "bn1": RELU,
    **{f"layer1.{i}.bn{k}": ADD_RELU if k == 3 else RELU for i in (0, 1) for k in (1, 2, 3)},
}


# What is fused


def test_a_resnet(calls):
    model = fuse(ResNet(), fused=RESNET)
    assert fastbn.report(model).left == {
        "layer1.0.downsample.1": "the sum it goes into is fused with the batch norm of the other operand"
    }
    calls.update({"fused": 0, "one by one": 0})
    model(images())
    assert calls == {"fused": 7, "one by one": 0}


MODULES = {
    "relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(0.3),
    "relu6": nn.ReLU6(inplace=True), "elu": nn.ELU(0.7), "silu": nn.SiLU(inplace=True), "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_activation_modules(calls, name):
    kind = name.split(" ")[0]
    fuse(nn.Sequential(conv(), nn.BatchNorm2d(6), MODULES[name]), fused={"1": f"batch_norm + {kind}"})
    assert calls["fused"] and not calls["one by one"]
    calls["fused"] = 0
    fuse(
        simple(lambda self, x: self.act(self.bn(self.conv(x)) + x), act=MODULES[name]),
        fused={"bn": f"batch_norm + add + {kind}"},
    )
    assert calls["fused"] and not calls["one by one"]


FUNCTIONS = [
    ("relu", F.relu), ("relu", torch.relu), ("relu", torch.relu_), ("relu", lambda z: z.relu()),
    ("relu", lambda z: z.relu_()), ("relu", lambda z: F.relu(z, True)), ("relu", lambda z: F.relu(z, inplace=True)),
    ("leaky_relu", lambda z: F.leaky_relu(z, 0.2)), ("leaky_relu", lambda z: F.leaky_relu(z, negative_slope=0.4)),
    ("leaky_relu", F.leaky_relu), ("relu6", F.relu6), ("elu", lambda z: F.elu(z, alpha=0.5, inplace=True)),
    ("silu", F.silu), ("hardswish", F.hardswish), ("gelu", F.gelu), ("gelu", lambda z: F.gelu(z, approximate="none")),
    ("sigmoid", torch.sigmoid), ("sigmoid", F.sigmoid), ("sigmoid", lambda z: z.sigmoid_()),
    ("tanh", torch.tanh), ("tanh", F.tanh), ("tanh", lambda z: z.tanh()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_activation_functions(calls, name, function):
    fuse(simple(lambda self, x: function(self.bn(self.conv(x)))), fused={"bn": f"batch_norm + {name}"})
    assert calls["fused"] and not calls["one by one"]


ADDITIONS = [
    lambda z, x: z + x, lambda z, x: x + z, torch.add, lambda z, x: torch.add(x, z, alpha=1), lambda z, x: z.add(x),
    lambda z, x: z.add_(x), operator.iadd,
]  # fmt: skip


@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("act", [True, False])
def test_additions(calls, add, act):
    model = simple(lambda self, x: F.relu(add(self.bn(self.conv(x)), x)) if act else add(self.bn(self.conv(x)), x))
    fuse(model, fused={"bn": ADD_RELU if act else ADD})
    assert calls["fused"] and not calls["one by one"]


@pytest.mark.parametrize(
    ("bn", "shape"),
    [(nn.BatchNorm1d(6), (5, 6)), (nn.BatchNorm1d(6), (5, 6, 4)), (nn.BatchNorm3d(6), (3, 6, 2, 3, 2))],
    ids=str,
)
def test_other_dimensions(calls, bn, shape):
    fuse(nn.Sequential(bn, nn.ReLU()), torch.randn(shape, dtype=torch.float64), fused={"0": RELU})
    assert calls["fused"] and not calls["one by one"]
    with pytest.raises(ValueError, match="expected"):
        fastbn.convert(nn.Sequential(bn, nn.ReLU()), fuse=True)(torch.randn(6))


OPTIONS = [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1, "momentum": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_batch_norm(options):
    fuse(nn.Sequential(conv(), nn.BatchNorm2d(6, **options), nn.ReLU()), fused={"1": RELU})


def test_across_the_end_of_submodules(calls):
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
    calls["fused"] = 0
    model(images())
    assert calls == {"fused": 2, "one by one": 0}
    seen, reference = [], fastbn.revert(copy.deepcopy(model))
    model.body[1].register_forward_hook(lambda m, args, y: seen.append(y))
    x = images()
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(
        seen[0], reference.body[1](reference.body[0](x)), msg="a hook inside still sees its tensor"
    )


def test_a_shared_relu_and_a_shared_batch_norm(calls):
    relu, bn = nn.ReLU(), nn.BatchNorm2d(6)
    model = nn.Sequential(conv(), bn, relu, conv(), bn, relu, relu)
    fuse(model, fused={"1": RELU})
    calls["fused"] = 0
    fastbn.convert(model, fuse=True)(images())
    assert calls["fused"] == 2, "each call of the shared batch norm is fused"


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
    "relu6 by another name": lambda self, x: self.hardtanh(self.bn(self.conv(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    model = simple(LEFT[name], prelu=nn.PReLU(), hardtanh=nn.Hardtanh(0, 6))
    ours = fuse(model, fused={})
    assert fastbn.report(ours).left["bn"]


def test_the_sum_used_twice_is_fused_without_the_activation():
    fuse(simple(lambda self, x: (lambda z: F.relu(z) * z)(self.bn(self.conv(x)) + x)), fused={"bn": ADD})


def test_the_input_changes_between_batch_norm_and_add():
    """Batch norm would run where the add is: too late, in all but the last of these."""

    def views(self, x):
        y = self.conv(x) * 2
        flat = y.view(-1)
        z = self.bn(y)
        flat.mul_(3)
        return F.relu(z + x), y

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
    fuse(TwoArguments(), *inputs, fused={"bn": ADD_RELU}, **kwargs)


def test_how_the_caller_calls(calls):
    model = Of(lambda self, x: self.block(x, x * 2), block=TwoArguments())
    fuse(model, fused={"block.bn": ADD_RELU})
    assert calls["fused"] and not calls["one by one"]
    calls["fused"] = 0
    several = Of(lambda self, x: self.block(self.block(x, x * 2)), block=TwoArguments())
    ours = fuse(several, fused={})
    assert "different ways" in fastbn.report(ours).left["block.bn"]


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_list_of_tensors(calls, kind):
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
    assert calls["fused"] and not calls["one by one"]
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
@pytest.mark.parametrize("add", [operator.add, lambda z, x: x + z, torch.add])
def test_broadcast_residuals(calls, shape, add):
    model = Adds(add).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert "bn" in fastbn.report(ours).fused
    for dtype in (torch.float64, torch.float32):
        calls.update({"fused": 0, "one by one": 0})
        assert_same_steps(ours, model, images(), torch.randn(shape, dtype=dtype))
        assert calls["one by one"] and not calls["fused"]
    assert_same_steps(ours, model, images(), images())
    assert calls["fused"]


def test_type_promotion_of_the_residual():
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) + x.double()))
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert "bn" in fastbn.report(ours).fused
    x = images(dtype=torch.float32)
    assert ours(x).dtype == model(x).dtype == torch.float64
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    in_place = simple(lambda self, x: F.relu(self.bn(self.conv(x)).add_(x.double())))
    assert fastbn.convert(in_place, fuse=True)(x).dtype == torch.float32


def test_strides_are_those_of_the_original():
    for add in (lambda z, x: z + x, lambda z, x: x + z):
        model = Of(lambda self, x, add=add: F.relu(add(self.bn(x), x.contiguous(memory_format=torch.channels_last))))
        model.bn = nn.BatchNorm2d(6)
        ours, x = fastbn.convert(copy.deepcopy(model), fuse=True), images(dtype=torch.float32)
        assert "bn" in fastbn.report(ours).fused
        assert ours(x).stride() == model(x).stride()


# Hooks


def seen_by_hooks(model, register):
    x, seen = images(), []
    register(model, lambda *args: seen.append([t.detach().clone() for t in as_tuple(args[-1]) if t is not None]))
    model(x.requires_grad_()).sum().backward()
    return seen


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "pre": lambda m, f: m.register_forward_pre_hook(f),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["bn", "act", "conv", ""])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_hooks_see_what_they_saw(kind, where, late):
    """A hook on the batch norm or the activation ends the fusing of the two, whenever it is registered."""
    model = simple(lambda self, x: self.act(self.bn(self.conv(x))), act=nn.ReLU()).double()

    def register(model, f):
        HOOKS[kind](model.get_submodule(where), f)

    torch.manual_seed(0)
    expected = seen_by_hooks(copy.deepcopy(model), register)
    assert expected
    torch.manual_seed(0)
    ours = copy.deepcopy(model)
    if late:
        seen = seen_by_hooks(fastbn.convert(ours, fuse=True), register)
    else:
        seen = []
        seen = seen_by_hooks(ours, lambda m, f: (register(m, f), fastbn.convert(m, fuse=True)))
        assert ("bn" in fastbn.report(ours).left) == (where in ("bn", "act"))
    torch.testing.assert_close(seen, expected)


def test_global_hooks_see_all_modules():
    model, names = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), fuse=True), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, y: names.append(type(m).__name__))
    try:
        model(images(dtype=torch.float32))
    finally:
        hook.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]


def test_a_hook_that_changes_the_output():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for m in (ours, model):
        m[1].register_forward_hook(lambda module, args, y: y - 1)
    assert_same_steps(ours, model, images())


# Python that a trace freezes


class Decides(nn.Module):
    """Its forward looks at attributes of its own, of a child and of a config, and at the length of a list."""

    def __init__(self):
        super().__init__()
        self.scale, self.pads, self.config = 1.0, [1, 1], {"twice": False}
        self.conv, self.bn = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.more = nn.ModuleList([nn.Conv2d(6, 6, 1)])
        self.last = None

    def forward(self, x):
        x = F.pad(x, [*self.pads, *self.pads]) * self.scale
        x = F.relu(self.bn(self.conv(x)))
        x = F.dropout(x, self.drop.p, self.drop.training)
        for layer in self.more:
            x = layer(x)
        if self.config["twice"]:
            x = x * 2
        if self.last is not None:
            x = self.last(x)
        return x + 1 if hasattr(self, "extra") else x


CHANGES = {
    "a number": lambda m: setattr(m, "scale", 3.0),
    "a list": lambda m: m.pads.append(0) or m.pads.remove(1),
    "a dict": lambda m: m.config.update(twice=True),
    "a child's number": lambda m: setattr(m.drop, "p", 0.9),
    "a child's mode": lambda m: m.drop.eval(),
    "a longer list of modules": lambda m: m.more.append(nn.Conv2d(6, 6, 1).double()),
    "a module in the place of None": lambda m: setattr(m, "last", nn.Tanh()),
    "a new attribute": lambda m: setattr(m, "extra", True),
    "another activation": lambda m: setattr(m, "bn", nn.Identity()),
    "another batch norm": lambda m: setattr(m, "bn", nn.BatchNorm2d(6, eps=0.3).double()),
    "no running statistics": lambda m: (setattr(m.bn, "running_mean", None), setattr(m.bn, "running_var", None)),
    "a hook": lambda m: m.bn.register_forward_hook(lambda module, args, y: y * 2),
    "a forward of its own": lambda m: setattr(m.bn, "forward", torch.tanh),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_changes_after_the_fact(calls, name, carry):
    model = Decides().double()
    ours = carry(fastbn.convert(copy.deepcopy(model), fuse=True))
    ours(images())
    assert calls == {"fused": 1, "one by one": 0}
    results, x = [], images()
    for m in (ours, model):
        m.bn.reset_running_stats()
        torch.manual_seed(1)
        CHANGES[name](m)
        results.append([m(x), m.state_dict(), m.eval()(x)])
    torch.testing.assert_close(*results)


def test_attributes_that_torch_reads_for_a_subclass_of_its_own():
    class Both(nn.Conv2d):
        def __init__(self):
            super().__init__(6, 6, 3, padding=1)
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(self.bn(super().forward(x)))

    model = Both().double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, images())
    for m in (ours, model):
        m.stride = (2, 2)
    assert_same_steps(ours, model, images())


def test_identities_between(calls):
    """As in timm, where they stand for what a model may have there."""
    model = simple(lambda self, x: self.act(self.drop(self.bn(self.conv(x)))), act=nn.ReLU(), drop=nn.Identity())
    ours = fuse(model, fused={"bn": RELU})
    adds = simple(lambda self, x: self.drop(self.drop(self.bn(self.conv(x)))) + x, drop=nn.Identity())
    fuse(adds, fused={"bn": ADD})
    assert calls["fused"] and not calls["one by one"]
    for m in (ours, model):
        m.drop = nn.Hardtanh(-0.3, 0.3)
    assert_same_steps(ours, model, images())


def test_an_activation_replaced_later():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for act in (nn.Softplus(), nn.LeakyReLU(0.4), nn.Sequential(nn.Tanh()), nn.GELU(approximate="tanh")):
        ours[2] = model[2] = act
        assert_same_steps(ours, model, images())


def test_one_of_two_names_of_a_module_is_replaced():
    model = simple(lambda self, x: F.relu(self.alias(self.conv(x))) + self.bn(x)).double()
    model.alias = model.bn
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for m in (ours, model):
        torch.manual_seed(0)
        m.alias = nn.BatchNorm2d(6, eps=0.5).double()
    assert_same_steps(ours, model, images())


def test_dropout_by_the_mode(calls):
    """F.dropout(training=self.training) and a branch on the mode: each mode has its own list of operations."""

    def forward(self, x):
        y = F.dropout(F.relu(self.bn(self.conv(x))), 0.4, self.training)
        return y * 2 if self.training else torch.sin(y)

    model = fuse(simple(forward), fused={"bn": RELU})
    for training in (True, False):
        calls["fused"] = 0
        model.train(training)(images())
        assert calls == {"fused": 1, "one by one": 0}


def test_fused_in_one_mode_only():
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) * 2 if self.training else self.bn(self.conv(x))))
    fuse(model, fused={"bn": "batch_norm + relu (eval only)"})
    assert "fused: bn = batch_norm + relu (eval only)" in repr(fastbn.convert(model, fuse=True))


def test_modes_of_parts():
    """A frozen batch norm, in a model that trains."""
    model = ResNet().double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for m in (ours, model):
        m.train()
        m.layer1[0].eval()
        m.bn1.eval()
    x = images()
    torch.testing.assert_close(ours(x), model(x))
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


def random_depth(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return x if self.training and random.random() < 0.5 else y


def torch_random_depth(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return x if self.training and torch.rand(1).item() < 0.5 else y


def constant(self, x):
    return F.relu(self.bn(self.conv(x))) * torch.rand(5, dtype=x.dtype if self.conv is None else torch.float64)


def remembers(self, x):
    self.seen = F.relu(self.bn(self.conv(x)))
    return self.seen


def appends(self, x):
    self.outputs.append(1)
    return F.relu(self.bn(self.conv(x))) * len(self.outputs)


def without_grad(self, x):
    with torch.no_grad():
        y = F.relu(self.bn(self.conv(x)))
    return x + y


def with_grad(self, x):
    with torch.enable_grad():
        return F.relu(self.bn(self.conv(x)))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.bn(self.conv(x)))


def asks_for_grad(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y * 2 if torch.is_grad_enabled() else y


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def own_gradient(self, x):
    return Straight.apply(F.relu(self.bn(self.conv(x))))


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: F.relu(self.bn(self.conv(x))), x, use_reentrant=False)


def data_dependent(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y if y.sum() > 0 else -y


def asks_for_type(self, x):
    y = self.conv(x)
    return F.relu(self.bn(y)) if isinstance(y, torch.Tensor) else y[0]


def looks_into_dict(self, x):
    return F.relu(self.__dict__["_modules"]["bn"](self.conv(x)))


def sets_on_a_tensor(self, x):
    y = F.relu(self.bn(self.conv(x)))
    y.note = 1
    return y


UNTRACEABLE = {
    random_depth: "random", torch_random_depth: "random", constant: "random|tensors", remembers: "attributes",
    appends: "attributes", without_grad: "mode", with_grad: "mode", without_autocast: "mode", asks_for_grad: "mode",
    own_gradient: "mode", checkpointed: "mode", data_dependent: "torch.fx", asks_for_type: "type",
    sets_on_a_tensor: "attribute", looks_into_dict: "__dict__",
}  # fmt: skip


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda f: f.__name__)
def test_forwards_that_do_not_trace_are_left_and_it_is_said_why(forward):
    model = simple(forward).double()
    model.outputs = []
    before, random_state, torch_state = dict(model.__dict__), random.getstate(), torch.get_rng_state()
    ours = fastbn.convert(model, fuse=True)
    report = fastbn.report(ours)
    assert not report.fused and report.swapped == ["bn"]
    assert re.search(UNTRACEABLE[forward], report.left["bn"]), report.left
    assert random.getstate() == random_state and torch.equal(torch.get_rng_state(), torch_state)
    del ours.__dict__["_fastbn_report"]
    assert ours.__dict__ == before and ours.outputs == [], "and the model is as it was"


def test_a_part_that_does_not_trace_does_not_hinder_the_others(calls):
    """A root with a branch on data: what is inside is fused."""
    model = Of(lambda self, x: self.a(x) if x.sum() > 0 else self.b(x), a=ResNet(), b=ResNet())
    fuse(model, fused={f"{part}.{name}": what for part in "ab" for name, what in RESNET.items()})
    assert calls["fused"] and not calls["one by one"]


class Called(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


@pytest.mark.parametrize(
    "bn",
    [type("Mine", (nn.BatchNorm2d,), {})(6), nn.SyncBatchNorm(6), Called(6), nn.InstanceNorm2d(6), nn.GroupNorm(2, 6)],
    ids=lambda m: type(m).__name__,
)
def test_other_norms_are_left(bn):
    model = nn.Sequential(conv(), bn, nn.ReLU()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert not fastbn.report(ours).fused and type(ours[1]) is type(bn)
    if isinstance(bn, nn.modules.batchnorm._BatchNorm):
        assert type(bn).__name__ in fastbn.report(ours).left["1"]
    torch.testing.assert_close(ours.eval()(images()), model.eval()(images()), rtol=10, atol=10)


def test_a_module_with_a_call_of_its_own():
    """torch.fx would write down both the call and what its wrapper does."""

    class Doubled(nn.Conv2d):
        def __call__(self, x):
            return super().__call__(x) * 2

    ours = fuse(
        Of(lambda self, x: F.relu(self.bn(self.conv(x))), conv=Doubled(6, 6, 1), bn=nn.BatchNorm2d(6)), fused={}
    )
    assert "Doubled defines __call__" in fastbn.report(ours).left["bn"]


def test_parametrized_and_pruned():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double()
    parametrize.register_parametrization(model[1], "weight", nn.Softplus(), unsafe=True)
    assert not fastbn.report(fastbn.convert(copy.deepcopy(model), fuse=True)).fused
    late = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double(), fuse=True)
    late.load_state_dict(fastbn.revert(copy.deepcopy(late)).state_dict())
    parametrize.register_parametrization(late[1], "weight", nn.Softplus(), unsafe=True)
    x = images()
    expected = F.relu(F.batch_norm(late[0](x), None, None, late[1].weight, late[1].bias, True))
    torch.testing.assert_close(late(x), expected)
    pruned = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double(), fuse=True)
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    expected = F.relu(F.batch_norm(pruned[0](x), None, None, pruned[1].weight, pruned[1].bias, True))
    torch.testing.assert_close(pruned(x), expected)


# The model stays the model


def test_state_dicts_load_both_ways():
    plain, fused = ResNet(), fastbn.convert(ResNet(), fuse=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]
    fused.load_state_dict(plain.state_dict())
    x = images(dtype=torch.float32)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    other = ResNet()
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other.eval()(x), plain(x))


def test_nothing_moves_and_revert_puts_everything_back():
    model = ResNet()
    model.layer1[0].bn1.register_forward_hook(lambda m, args, y: None)
    before = {name: (m, type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    text = repr(model)
    fastbn.convert(model, fuse=True)
    assert isinstance(model, ResNet) and isinstance(model.layer1[0], Bottleneck)
    assert type(model.layer1[0]).__name__ == "Bottleneck" and "fused: bn1 = batch_norm + relu" in repr(model)
    assert model.forward_features(images(dtype=torch.float32)).shape == (4, 6, 5, 5)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is tensors[name]
    assert fastbn.revert(model) is model
    for name, m in model.named_modules():
        module, kind, attributes = before[name]
        assert m is module and type(m) is kind and m.__dict__ == attributes
    assert repr(model) == text
    with pytest.raises(ValueError, match="report"):
        fastbn.report(model)


def test_twice_and_after_a_plain_convert():
    model = fastbn.convert(ResNet())
    assert fastbn.report(fastbn.convert(model, fuse=True)).fused.keys() == RESNET.keys()
    classes, text = [type(m) for m in model.modules()], str(fastbn.report(model))
    fastbn.convert(model, fuse=True)
    assert [type(m) for m in model.modules()] == classes and str(fastbn.report(model)) == text
    assert isinstance(model.bn1, BatchNorm2d)


@pytest.mark.parametrize("carry", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies_and_pickles(calls, carry):
    model = fastbn.convert(ResNet().double(), fuse=True)
    model(images())
    if carry == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[carry](
            model
        )
    assert type(twin) is type(model) and isinstance(twin, ResNet)
    calls.update({"fused": 0, "one by one": 0})
    reference = fastbn.revert(copy.deepcopy(twin))
    assert_same_steps(twin, reference, images())
    assert calls["fused"] == 9 * 7 and calls["one by one"] == 0
    if carry != "copy":
        assert twin.bn1.weight is not model.bn1.weight
    assert str(fastbn.report(twin)) == str(fastbn.report(model))
    assert type(fastbn.revert(twin)) is ResNet


class Default(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x, then=lambda y: y * 2):
        return then(F.relu(self.bn(x)))


def test_a_default_argument_that_no_pickle_holds(calls):
    model = fuse(Default(), fused={"bn": RELU})
    assert calls["fused"] and not calls["one by one"]
    assert_same_steps(pickle.loads(pickle.dumps(model)), fastbn.revert(copy.deepcopy(model)), images())


def test_ordered_slices_and_walks_of_a_fused_sequential():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    x = images()
    torch.testing.assert_close(ours[:2](x), model[:2](x))
    torch.testing.assert_close(ours[1:](x), model[1:](x))
    ours.append(nn.Tanh())
    torch.testing.assert_close(ours(x), model(x).tanh())
    del ours[2]
    torch.testing.assert_close(ours(x), torch.tanh(model[3](model[1](model[0](x)))))


def test_compile_export_and_traces_see_the_original(calls):
    model = ResNet().eval()
    ours, x = fastbn.convert(copy.deepcopy(model), fuse=True), images(dtype=torch.float32)
    expected = model(x)
    torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), expected)
    calls["fused"] = 0
    torch.testing.assert_close(torch.jit.trace(ours, x, check_trace=False)(x), expected)
    assert not calls["fused"]
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), expected)


def test_functional_calls_and_per_sample_gradients():
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 1)).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def grads(m):
        def loss(params, x):
            return torch.func.functional_call(m, params, (x,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(m.named_parameters()), x)

    torch.testing.assert_close(grads(ours), grads(model))


def test_an_optimizer_made_before_keeps_working_and_losses_agree():
    models = [ResNet().double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    fastbn.convert(models[0], fuse=True)
    for _ in range(10):
        x, losses = images(8), []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(8) % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-7, atol=1e-9)


def test_classes_that_cannot_have_a_quiet_subclass():
    registry = []

    class Registered(nn.Module):
        def __init_subclass__(cls):
            registry.append(cls)

    class Net(Registered):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(self.bn(x))

    report = fastbn.report(fastbn.convert(Net(), fuse=True))
    assert registry == [Net] and report.left == {"bn": "Net defines __init_subclass__"}


def test_scripted_and_wrapped_modules():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    model = nn.Sequential(scripted, nn.DataParallel(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())))
    ours = fastbn.convert(model, fuse=True)
    assert fastbn.report(ours).fused == {"1.module.0": "batch_norm + relu in 1.module"}
    assert ours(images(dtype=torch.float32)).min() == 0


def test_the_report():
    model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)), fuse=True)
    report = fastbn.report(model)
    assert str(report).splitlines() == [
        "batch norms: 2 swapped, 1 fused, 0 folded, 1 left",
        "  1  fused   batch_norm + relu in Sequential",
        "  3  left    its output is returned",
    ]
    with pytest.raises(TypeError, match="report"):
        fastbn.report(3)


@pytest.mark.parametrize(
    "model", [nn.BatchNorm2d(3), nn.Linear(2, 2), nn.Sequential(), nn.Identity(), nn.Module()], ids=str
)
def test_models_with_nothing_to_fuse(model):
    kind = type(model)
    fastbn.convert(model, fuse=True)
    assert not fastbn.report(model).fused and type(fastbn.revert(model)) is kind
