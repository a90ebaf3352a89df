"""fastbn.convert and fastbn.revert: which modules change their class, and that nothing else changes."""

import copy

import pytest
import torch
from reference import needs_bias
from torch import nn

import fastbn

SWAPS = {
    nn.BatchNorm1d: fastbn.BatchNorm1d,
    nn.BatchNorm2d: fastbn.BatchNorm2d,
    nn.BatchNorm3d: fastbn.BatchNorm3d,
}


OPTIONS = [
    {}, {"affine": False}, {"track_running_stats": False}, pytest.param({"bias": False}, marks=needs_bias),
    {"momentum": None, "eps": 0.1}, {"dtype": torch.float64},
]  # fmt: skip


class Residual(nn.Module):
    """One batch norm used twice, one in a list, one in a dict: what a naive walk misses."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.BatchNorm2d(4)
        self.alias = self.shared
        self.list = nn.ModuleList([nn.BatchNorm2d(4), nn.Identity()])
        self.dict = nn.ModuleDict({"bn": nn.BatchNorm2d(4, momentum=None, eps=1e-3)})
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 6), nn.BatchNorm1d(6, affine=False))

    def forward(self, x):
        y = torch.relu(self.shared(self.conv(x)))
        y = torch.relu(self.list[0](self.alias(y)) + x)
        return self.head(self.dict["bn"](y))


def batch_norms(model):
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if "BatchNorm" in type(m).__name__}


@pytest.mark.parametrize("cls", SWAPS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_a_root_batch_norm_both_ways(cls, kwargs):
    module = cls(3, **kwargs).eval()
    state, text = copy.deepcopy(module.state_dict()), repr(module)
    converted = fastbn.convert(module)
    assert type(converted) is SWAPS[cls]
    assert repr(converted) == text and not converted.training
    torch.testing.assert_close(converted.state_dict(), state)
    for name, value in kwargs.items():
        if name not in ("dtype", "bias"):
            assert getattr(converted, name) == value
    back = fastbn.revert(converted)
    assert type(back) is cls and repr(back) == text and not back.training
    torch.testing.assert_close(back.state_dict(), state)


def test_every_place_of_a_model():
    model = Residual()
    names = list(batch_norms(model))
    converted = fastbn.convert(model)
    found = batch_norms(converted)
    assert list(found) == names and len(found) == 5
    assert all(type(m) in SWAPS.values() for m in found.values())
    assert converted.shared is converted.alias, "a shared module stays one module"
    reverted = fastbn.revert(converted)
    assert all(type(m) in SWAPS for m in batch_norms(reverted).values())
    assert reverted.shared is reverted.alias


def test_parameters_and_buffers_stay_the_same_objects():
    model = Residual()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    for change in (fastbn.convert, fastbn.revert):
        model = change(model)
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(found[name] is tensor for name, tensor in tensors.items()) and len(found) == len(tensors)
        assert list(model.state_dict()) == keys


def test_a_training_run_has_the_same_losses():
    """Same weights, same batches: losses, gradients and statistics of the two agree at every step."""
    torchs = Residual()
    ours = fastbn.convert(copy.deepcopy(torchs))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (torchs, ours)]
    for step in range(10):
        x, target = torch.randn(8, 4, 6, 6), torch.randint(6, (8,))
        losses = []
        for model, optimizer in zip((torchs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4, msg=lambda m, s=step: f"step {s}: {m}")
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=1e-2, atol=1e-3)
    x = torch.randn(8, 4, 6, 6)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-2, atol=1e-2)


def test_an_optimizer_made_before_keeps_working():
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model = fastbn.convert(model)
    before = model.shared.weight.detach().clone()
    model(torch.randn(5, 4, 6, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.shared.weight, before)


def test_hooks_survive():
    model, calls = nn.Sequential(nn.BatchNorm2d(3)), []
    model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model[0].register_forward_hook(lambda m, args, output: calls.append(type(m)))
    model[0].register_full_backward_hook(lambda m, grad_in, grad_out: calls.append("backward"))
    model[0].register_state_dict_post_hook(lambda m, state, prefix, meta: calls.append("state"))
    model = fastbn.convert(model)
    model(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    model.state_dict()
    assert calls == ["pre", fastbn.BatchNorm2d, "backward", "state"]


def test_attributes_modes_and_requires_grad_survive():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].note, model[0].momentum = "kept", 0.25
    model[0].weight.requires_grad_(False)
    model[1].eval()
    converted = fastbn.convert(model)
    assert converted[0].note == "kept" and converted[0].momentum == 0.25
    assert not converted[0].weight.requires_grad and converted[0].bias.requires_grad
    assert converted[0].training and not converted[1].training


class Mine(nn.BatchNorm2d):
    """Someone's subclass: its forward may do anything, so it is not ours to swap."""

    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_and_other_norms_are_left_alone():
    others = [Mine(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)]
    model = nn.Sequential(*others)
    kinds = [type(m) for m in model]
    for change in (fastbn.convert, fastbn.revert):
        assert [type(m) for m in change(model)] == kinds


def test_a_lazy_batch_norm_becomes_convertible_after_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(fastbn.convert(model)[0]) is fastbn.BatchNorm2d


def test_a_subclass_of_ours_is_not_reverted():
    class Special(fastbn.BatchNorm2d):
        pass

    assert type(fastbn.revert(nn.Sequential(Special(3)))[0]) is Special


def test_parametrized_batch_norms_still_work():
    model = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus(), unsafe=True)
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(fastbn.convert(model)(x), expected)
    converted = fastbn.convert(nn.Sequential(nn.BatchNorm2d(3)))
    nn.utils.parametrize.register_parametrization(converted[0], "weight", nn.Softplus(), unsafe=True)
    torch.testing.assert_close(converted(x), expected)
    assert isinstance(converted[0], fastbn.BatchNorm2d)


def test_idempotent():
    model = fastbn.convert(Residual())
    before = dict(model.named_modules())
    again = fastbn.convert(model)
    assert again is model or type(again) is type(model)
    assert all(after is before[name] for name, after in again.named_modules())
    plain = fastbn.revert(fastbn.revert(again))
    assert all(type(m) in SWAPS for m in batch_norms(plain).values())


def test_models_without_batch_norm_and_empty_models():
    for model in (nn.Linear(2, 2), nn.Sequential(), nn.Identity()):
        kind = type(model)
        assert type(fastbn.convert(model)) is kind and type(fastbn.revert(model)) is kind


def test_modules_that_are_none_in_the_tree():
    model = nn.Module()
    model.bn, model.missing = nn.BatchNorm2d(3), None
    model.register_module("empty", None)
    assert type(fastbn.convert(model).bn) is fastbn.BatchNorm2d


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(3), nn.BatchNorm2d, [nn.BatchNorm2d(3)]], ids=str)
@pytest.mark.parametrize("change", [fastbn.convert, fastbn.revert], ids=lambda f: f.__name__)
def test_not_a_module(change, wrong):
    with pytest.raises(TypeError, match=change.__name__):
        change(wrong)


def test_fuse_is_a_keyword():
    with pytest.raises(TypeError):
        fastbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), True)


def test_deepcopy_compile_and_meta_after_conversion():
    model = fastbn.convert(Residual())
    twin = copy.deepcopy(model)
    x = torch.randn(4, 4, 6, 6)
    torch.testing.assert_close(twin(x), model(x))
    with torch.device("meta"):
        lazy = fastbn.convert(Residual())
    assert lazy.shared.weight.is_meta
    lazy.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(lazy.eval()(x), model.eval()(x))


def test_statistics_move_in_the_reverted_model():
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(3)))
    model(torch.randn(4, 3, 5, 5))
    model = fastbn.revert(model)
    model(torch.randn(4, 3, 5, 5))
    assert model[0].num_batches_tracked == 2
