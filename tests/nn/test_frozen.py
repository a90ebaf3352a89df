"""fastbn.FrozenBatchNorm1d/2d/3d and fastbn.freeze, held against torch's modules in eval mode."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbn

FROZEN = {
    fastbn.FrozenBatchNorm1d: (nn.BatchNorm1d, (4, 3)),
    fastbn.FrozenBatchNorm2d: (nn.BatchNorm2d, (4, 3, 5, 2)),
    fastbn.FrozenBatchNorm3d: (nn.BatchNorm3d, (4, 3, 5, 2, 2)),
}


def trained(cls, **kwargs):
    bn = cls(3, **kwargs)
    for t in (*bn.parameters(), bn.running_mean, bn.running_var):
        nn.init.uniform_(t, 0.5, 1.5)
    return bn


@pytest.mark.parametrize("cls", FROZEN, ids=lambda c: c.__name__)
@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_is_eval_in_training_too(device, cls, trainable):
    torchs, shape = FROZEN[cls]
    torchs = trained(torchs, eps=0.01).eval()
    ours = cls(3, eps=0.01, trainable=trainable).to(device)
    ours.load_state_dict(torchs.state_dict())
    before = copy.deepcopy(ours.state_dict())
    for mode in (True, False):
        ours.train(mode)
        x, dy = torch.randn(shape), torch.randn(shape)
        found, expected = x.to(device, copy=True).requires_grad_(), x.double().requires_grad_()
        y, right = ours(found), copy.deepcopy(torchs).double()(expected)
        torch.testing.assert_close(y.cpu().double(), right, rtol=1e-6, atol=1e-6)
        y.backward(dy.to(device)), right.backward(dy.double())
        torch.testing.assert_close(found.grad.cpu().double(), expected.grad, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), before.values(), strict=True))
    assert [*ours.state_dict()] == ["weight", "bias", "running_mean", "running_var"] or trainable
    assert len([*ours.parameters()]) == 2 * trainable
    if trainable:
        x, dy = torch.randn(shape), torch.randn(shape)
        twin = copy.deepcopy(torchs).double()
        twin.zero_grad(), ours.zero_grad()
        ours(x.to(device)).backward(dy.to(device)), twin(x.double()).backward(dy.double())
        torch.testing.assert_close(ours.weight.grad.cpu().double(), twin.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.bias.grad.cpu().double(), twin.bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
def test_state_dicts_load_from_and_into_torchs():
    torchs = trained(nn.BatchNorm2d)
    ours = fastbn.FrozenBatchNorm2d(3)
    ours.load_state_dict(torchs.state_dict())
    back = nn.BatchNorm2d(3)
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back.state_dict(), torchs.state_dict())
    torchvisions = {name: torchs.state_dict()[name] for name in ("weight", "bias", "running_mean", "running_var")}
    ours.load_state_dict(torchvisions)
    with pytest.raises(RuntimeError, match="running_var"):
        ours.load_state_dict({name: t for name, t in torchvisions.items() if name != "running_var"})
    assert repr(ours) == "FrozenBatchNorm2d(3, eps=1e-05, trainable=False)"


@pytest.mark.cpu
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("before", [lambda m: m, fastbn.convert, lambda m: fastbn.convert(m, fuse=True)])
def test_freeze(before, trainable):
    norms = trained(nn.BatchNorm2d), trained(nn.BatchNorm1d)
    model = before(nn.Sequential(nn.Conv2d(3, 3, 1), norms[0], nn.ReLU(), nn.Flatten(2), norms[1]))
    x = torch.randn(2, 3, 4, 4)
    expected, bn, mean, weight = model.eval()(x), model[1], model[1].running_mean, model[1].weight
    assert fastbn.freeze(model, trainable=trainable) is model and model[1] is bn and bn.running_mean is mean
    assert type(model[1]) is fastbn.FrozenBatchNorm2d and type(model[4]) is fastbn.FrozenBatchNorm1d
    assert bn.weight.data_ptr() == weight.data_ptr() and len([*model.parameters()]) == 2 + 4 * trainable
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(m.train()(x), expected)
    assert fastbn.freeze(model) is model, "again changes nothing"
    fastbn.update_bn([x], nn.Sequential(model, nn.BatchNorm1d(3)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.cpu
def test_freeze_refuses():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="1 has no running statistics to use"):
        fastbn.freeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="freeze: expected a torch.nn.Module, got int"):
        fastbn.freeze(3)
    frozen = fastbn.freeze(nn.BatchNorm1d(3, affine=False))
    torch.testing.assert_close(frozen(torch.ones(2, 3)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        fastbn.FrozenBatchNorm2d(3)(torch.randn(2, 3))
