"""fastbn.convert(fuse=True): what must not be fused, because something else reads or changes what is between."""

import copy
import operator

import pytest
import torch
from fusing import ADD, ADD_RELU, Branches, Of, assert_same_steps, conv, fuse, images, simple
from torch import nn
from torch.nn import functional as F

import fastbn

pytestmark = pytest.mark.cpu
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
