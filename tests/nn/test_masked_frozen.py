"""Batch norms of other statistics: of the valid positions of padded sequences, and the frozen ones of fine-tuning.
In: padded batches and state dicts of torch's modules. Out: judged by float64, and by torch's modules in eval mode."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbn
from fastbn.functional import masked_batch_norm

LENGTHS = torch.tensor([5, 1, 0, 7, 3])
MASK = torch.arange(7) < LENGTHS[:, None]
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def padded(dtype=torch.float32, padding=float("nan")):
    x = torch.randn(5, 3, 7).to(dtype)
    return x.masked_fill(~MASK[:, None], padding)


def reference(x, weight, bias, running, training, dy, momentum=0.1):
    """By torch in float64, on the valid values alone."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    stats = [t.double() for t in running]
    rows = leaves[0].transpose(1, 2)[MASK]
    y = nn.functional.batch_norm(rows, *stats, *leaves[1:], training, momentum)
    grads = torch.autograd.grad(y, leaves, dy.double().transpose(1, 2)[MASK])
    output = torch.zeros_like(leaves[0]).transpose(1, 2)
    output[MASK] = y.detach()
    return [output.transpose(1, 2), *grads, *stats]


@training
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_lengths", [True, False], ids=["lengths", "mask"])
def test_masked_values_and_gradients(device, dtype, training, as_lengths):
    """NaN in the padding, of the input and of the gradient, reaches nothing."""
    for transposed in (False, True):
        x, dy = padded(dtype), padded(dtype)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
        bn = fastbn.MaskedBatchNorm1d(3, dtype=dtype).train(training)
        for t in (*bn.parameters(), bn.running_var):
            nn.init.uniform_(t, 0.5, 1.5)
        expected = reference(x, bn.weight, bn.bias, (bn.running_mean, bn.running_var), training, dy)
        bn, leaf = bn.to(device), x.to(device).requires_grad_()
        y = bn(leaf, (LENGTHS if as_lengths else MASK).to(device))
        grads = torch.autograd.grad(y, [leaf, bn.weight, bn.bias], dy.to(device))
        found = [y.detach(), *grads, bn.running_mean, bn.running_var]
        assert y.dtype == dtype and y.stride() == x.stride()
        for ours, right in zip(found, expected, strict=True):
            eps = {torch.float64: 400}.get(dtype, 8) * torch.finfo(dtype).eps
            torch.testing.assert_close(ours.cpu().double(), right, rtol=eps, atol=eps * right.abs().max().item())
        padding = ~MASK[:, None].expand_as(x)
        assert not y.cpu()[padding].any() and not grads[0].cpu()[padding].any()
        assert bn.num_batches_tracked == training


@pytest.mark.cpu
def test_masked_derivatives():
    x = padded(torch.float64, 0).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, weight, bias):
        return masked_batch_norm(x, LENGTHS, None, None, weight, bias, True)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.cpu
def test_masked_images_and_batches_without_valid_positions():
    x, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) < 0.5
    rows = x.permute(0, 2, 3, 1)[mask]
    y = masked_batch_norm(x, mask, None, None, training=True)
    torch.testing.assert_close(y.permute(0, 2, 3, 1)[mask], nn.functional.batch_norm(rows, None, None, training=True))
    bn = fastbn.MaskedBatchNorm1d(3)
    y = bn(padded(), torch.zeros(5, dtype=torch.int64))
    y.sum().backward()
    assert not y.any() and torch.equal(bn.running_var, torch.ones(3)) and torch.equal(bn.weight.grad, torch.zeros(3))


@pytest.mark.cpu
def test_masked_bad_arguments():
    bn, x = fastbn.MaskedBatchNorm1d(3), torch.randn(5, 3, 7)
    for mask, error, message in (
        ([5, 1, 0, 7, 3], TypeError, "mask should be a tensor of booleans or of lengths, not list"),
        (LENGTHS.float(), TypeError, "mask should be bool, or lengths of int32 or int64, not torch.float32"),
        (MASK.T, ValueError, r"mask should have sizes \(5, 7\), input's without channels, not \(7, 5\)"),
        (LENGTHS[:4], ValueError, r"lengths should have sizes \(5,\) beside an input \(N, C, L\), not \(4,\)"),
        (LENGTHS + 1, ValueError, "lengths should be from 0 to 7, but are from 1 to 8"),
        (LENGTHS - 1, ValueError, "lengths should be from 0 to 7, but are from -1 to 6"),
        (torch.arange(7) < torch.tensor([[1], [0], [0], [0], [0]]), ValueError, "more than 1 value per channel"),
    ):
        with pytest.raises(error, match=message):
            bn(x, mask)
    with pytest.raises(ValueError, match=r"expected 3D input \(got 2D input\)"):
        bn(x[0], LENGTHS)


# ---- frozen --------------------------------------------------------------------------------------------------------

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
