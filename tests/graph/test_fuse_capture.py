"""fastbn.convert(fuse=True): hooks, changed attributes, random numbers, modes and threads work as without fastbn."""

import copy
import pickle
import random

import pytest
import torch
from fusing import ADD, RELU, Of, ResNet, as_tuple, assert_same_steps, conv, fuse, images, simple
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fastbn

pytestmark = pytest.mark.cpu


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
@pytest.mark.parametrize("where", ["bn", "act", ""])
def test_hooks_see_what_they_saw(kind, where):
    """A hook on the batch norm or the activation ends the fusing of the two, also one that comes after a capture."""
    model = simple(lambda self, x: self.act(self.bn(self.conv(x))), act=nn.ReLU()).double()

    def register(model, f):
        HOOKS[kind](model.get_submodule(where), f)

    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    ours(images())
    assert fastbn.report(ours).fused == {"bn": RELU}
    model(images())
    torch.manual_seed(0)
    expected = seen_by_hooks(model, register)
    torch.manual_seed(0)
    seen = seen_by_hooks(ours, register)
    assert expected
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
@pytest.mark.parametrize("carry", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m))], ids=["itself", "pickled"])
def test_changes_after_the_fact(name, carry):
    model = Decides().double()
    ours = carry(fastbn.convert(copy.deepcopy(model), fuse=True))
    ours(images())
    assert fastbn.report(ours).fused == {"bn": RELU}
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


def test_identities_between():
    """As in timm, where they stand for what a model may have there."""
    model = simple(lambda self, x: self.act(self.drop(self.bn(self.conv(x)))), act=nn.ReLU(), drop=nn.Identity())
    ours = fuse(model, fused={"bn": RELU})
    adds = simple(lambda self, x: self.drop(self.drop(self.bn(self.conv(x)))) + x, drop=nn.Identity())
    fuse(adds, fused={"bn": ADD})
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


def test_dropout_by_the_mode():
    """F.dropout(training=self.training) and a branch on the mode."""

    def forward(self, x):
        y = F.dropout(F.relu(self.bn(self.conv(x))), 0.4, self.training)
        return y * 2 if self.training else torch.sin(y)

    fuse(simple(forward), fused={"bn": RELU})


def test_fused_in_one_mode_only():
    model = simple(lambda self, x: F.relu(self.bn(self.conv(x)) * 2 if self.training else self.bn(self.conv(x))))
    fuse(model, fused={"bn": "batch_norm + relu (eval only)"})


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


SPECIAL = [
    random_depth, torch_random_depth, remembers, appends, without_grad, with_grad, without_autocast, asks_for_grad,
    own_gradient, checkpointed, data_dependent, asks_for_type, sets_on_a_tensor, looks_into_dict,
]  # fmt: skip


@pytest.mark.parametrize("forward", SPECIAL, ids=lambda f: f.__name__)
def test_forwards_that_do_more_than_operations(forward):
    """Whatever Python does beside: the same values, statistics, random numbers and attributes as without fastbn."""
    model = simple(forward).double()
    model.outputs = []
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for training in (True, True, False):
        results = []
        for m in (ours, model):
            m.train(training)
            random.seed(1), torch.manual_seed(1)
            x = images().requires_grad_()
            y = m(x)
            y.sum().backward()
            results.append([y, x.grad, m.state_dict(), random.random(), torch.rand(1), m.outputs])
        torch.testing.assert_close(*results)
    # A checkpointed function runs as it is; a checkpointed module captures its own forward.
    assert fastbn.report(ours).fused == ({} if forward is checkpointed else {"bn": RELU})


def test_a_part_that_cannot_be_captured_does_not_hinder_the_others():
    """A root with a branch on data: what is inside is fused."""
    model = Of(lambda self, x: self.a(x) if x.sum() > 0 else self.b(x), a=ResNet(), b=ResNet()).double()
    ours = fastbn.convert(model, fuse=True)
    ours(images().abs())
    ours(-images().abs())
    assert len(fastbn.report(ours).fused) == 14


class Called(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


def test_other_norms():
    """Subclasses keep their class and are fused where they compute torch's batch norm; what is none is left."""
    mine = type("Mine", (nn.BatchNorm2d,), {})(6)
    others = [mine, Called(6), nn.InstanceNorm2d(6), nn.GroupNorm(2, 6)]
    for bn, fused in zip(others, ({"1": RELU}, {}, {}, {}), strict=True):
        ours = fuse(nn.Sequential(conv(), bn, nn.ReLU()), fused=fused)
        assert type(ours[1]) is type(bn)


def test_a_module_with_a_call_of_its_own():
    class Doubled(nn.Conv2d):
        def __call__(self, x):
            return super().__call__(x) * 2

    fuse(
        Of(lambda self, x: F.relu(self.bn(self.conv(x))), conv=Doubled(6, 6, 1), bn=nn.BatchNorm2d(6)),
        fused={"bn": RELU},
    )


def test_parametrized_and_pruned():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()).double()
    parametrize.register_parametrization(model[1], "weight", nn.Softplus(), unsafe=True)
    assert_same_steps(fastbn.convert(copy.deepcopy(model), fuse=True), model, images())
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
