"""Batch norm of the valid positions of padded sequences, judged by torch in float64 on those positions alone."""

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
