"""Derivatives up to third order, forward mode, batched gradients, and what may be changed before backward."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastbn
from fastbn.functional import batch_norm

training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
PARAMETERS = [(True, True), (True, False), (False, True), (False, False)]
parameters = pytest.mark.parametrize("weight, bias", PARAMETERS, ids=["both", "weight", "bias", "neither"])
SHAPES = [(3, 2), (4, 3, 2), (2, 3, 2, 2), (2, 2, 2, 1, 2)]


def leaves(shape, weight=True, bias=True, device="cpu", channels_last=False):
    """Double tensors that require gradients: x, and weight and bias or None."""

    def double(*size):
        return torch.randn(size, dtype=torch.float64, device=device)

    x = double(*shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    made = [x, double(shape[1]) if weight else None, double(shape[1]) if bias else None]
    return [None if t is None else t.requires_grad_() for t in made]


def function(training, channels, device="cpu", weight=True, bias=True):
    """batch_norm of only the tensors that are there, with fresh statistics, for gradcheck."""
    mean = torch.linspace(-1, 1, channels, dtype=torch.float64, device=device)
    var = torch.linspace(0.5, 2, channels, dtype=torch.float64, device=device)

    def call(x, *rest):
        rest = list(rest)
        w, b = rest.pop(0) if weight else None, rest.pop(0) if bias else None
        stats = (None, None) if training else (mean, var)
        return batch_norm(x, *stats, w, b, training, 0.1, 1e-3)

    return call


def composed(x, weight, bias, mean=None, var=None, eps=1e-3):
    """Batch norm out of torch operations: differentiable to every order."""
    axes, view = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    if mean is None:
        mean, var = x.mean(axes), x.var(axes, correction=0)
    y = (x - mean.view(view)) * (var.view(view) + eps).rsqrt()
    y = y if weight is None else y * weight.view(view)
    return y if bias is None else y + bias.view(view)


@training
@parameters
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(device, shape, weight, bias, training):
    inputs = [t for t in leaves(shape, weight, bias, device) if t is not None]
    call = function(training, shape[1], device, weight, bias)
    assert gradcheck(
        call,
        inputs,
        fast_mode=False,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@training
@parameters
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradgradcheck(device, shape, weight, bias, training):
    inputs = [t for t in leaves(shape, weight, bias, device) if t is not None]
    call = function(training, shape[1], device, weight, bias)
    assert gradgradcheck(call, inputs, fast_mode=False, check_fwd_over_rev=True, check_rev_over_rev=True)


@training
def test_gradcheck_channels_last(device, training):
    inputs = leaves((2, 3, 2, 2), device=device, channels_last=True)
    call = function(training, 3, device)
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, inputs)


@training
def test_gradcheck_of_the_autograd_function(device, training):
    moments = torch.rand(2, 3, dtype=torch.float64, device=device) + 0.5

    def call(x, weight, bias):
        given = None if training else moments
        return fastbn.BatchNormFunction.apply(x, weight, bias, given, 1e-3)[0]

    inputs = leaves((4, 3, 2), device=device)
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(call, inputs)


def test_the_moments_of_the_autograd_function(device):
    x, weight, bias = leaves((5, 3, 4), device=device)
    y, moments = fastbn.BatchNormFunction.apply(x, weight, bias, None, 1e-3)
    assert moments.dtype == torch.float64 and moments.shape == (2, 3) and not moments.requires_grad
    torch.testing.assert_close(moments[0], x.detach().mean((0, 2)))
    torch.testing.assert_close(moments[1], x.detach().var((0, 2), correction=0))
    again, same = fastbn.BatchNormFunction.apply(x, weight, bias, moments, 1e-3)
    torch.testing.assert_close(again, y)
    assert torch.equal(same, moments)
    half = x.detach().to(torch.bfloat16)
    assert fastbn.BatchNormFunction.apply(half, None, None, None, 1e-3)[1].dtype == torch.float64


@training
@parameters
def test_third_order(device, weight, bias, training):
    """Right, where torch is wrong in second order already for a bias without a weight."""
    tensors = leaves((3, 2, 2), weight, bias, device)
    present = [t for t in tensors if t is not None]
    mean, var = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([0.7, 1.4], dtype=torch.float64)
    mean, var = mean.to(device), var.to(device)
    stats = () if training else (mean, var)
    seeds = [torch.randn_like(t) for t in present]

    def third(y):
        first = torch.autograd.grad(y.pow(3).sum(), present, create_graph=True)
        second = torch.autograd.grad(
            sum((g * s).sum() for g, s in zip(first, seeds, strict=True)), present, create_graph=True
        )
        return torch.autograd.grad(sum((g * s).sum() for g, s in zip(second, seeds, strict=True)), present)

    expected = third(composed(*tensors, *stats))
    found = third(function(training, 2, device, weight, bias)(*present) if training else
                  batch_norm(tensors[0], mean, var, *tensors[1:], False, 0.1, 1e-3))  # fmt: skip
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


@training
@parameters
def test_second_order_against_a_composition(device, weight, bias, training):
    tensors = leaves((4, 3, 2), weight, bias, device)
    present = [t for t in tensors if t is not None]
    mean = torch.linspace(-1, 1, 3, dtype=torch.float64, device=device)
    var = torch.linspace(0.5, 2, 3, dtype=torch.float64, device=device)
    dy = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)

    def second(y):
        first = torch.autograd.grad(y, present, dy, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), [*present, dy], allow_unused=True)

    expected = second(composed(*tensors, *(() if training else (mean, var))))
    found = second(function(training, 3, device, weight, bias)(*present))
    for ours, right in zip(found, expected, strict=True):
        if ours is None or right is None:  # no dependence, which may also be said with zeros
            assert all(t is None or not t.any() for t in (ours, right))
        else:
            torch.testing.assert_close(ours, right)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_subset_of_requires_grad(device, wanted, training):
    tensors = [
        t.detach().requires_grad_(flag) for t, flag in zip(leaves((4, 3, 5), device=device), wanted, strict=True)
    ]
    others = [t.detach().clone().requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True)]
    y = function(training, 3, device)(*tensors)
    assert y.requires_grad == any(wanted)
    assert (y.grad_fn is not None) == any(wanted)
    if not any(wanted):
        return
    mean = torch.linspace(-1, 1, 3, dtype=torch.float64, device=device)
    var = torch.linspace(0.5, 2, 3, dtype=torch.float64, device=device)
    expected = composed(*others, *(() if training else (mean, var)))
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for ours, right, flag in zip(tensors, others, wanted, strict=True):
        assert (ours.grad is not None) == flag
        if flag:
            torch.testing.assert_close(ours.grad, right.grad)


def test_no_graph_without_grad_mode(device):
    tensors = leaves((4, 3, 5), device=device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = function(True, 3, device)(*tensors)
        assert y.grad_fn is None and not y.requires_grad


@pytest.mark.simt_quick
def test_only_what_is_asked_is_computed(device):
    """grad for one input alone, in every choice of one, equals that entry of the full gradient."""
    tensors = leaves((4, 3, 5), device=device)
    y = function(True, 3, device)(*tensors)
    dy = torch.randn_like(y)
    full = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    for tensor, right in zip(tensors, full, strict=True):
        (alone,) = torch.autograd.grad(y, tensor, dy, retain_graph=True)
        assert torch.equal(alone, right)


@training
def test_retain_graph_and_a_second_backward(device, training):
    tensors = leaves((4, 3, 5), device=device)
    y = function(training, 3, device)(*tensors)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors, dy)


def test_create_graph_leaves_the_values_alone(device):
    tensors = leaves((4, 3, 5), device=device)
    y = function(True, 3, device)(*tensors)
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    graphed = torch.autograd.grad(y, tensors, dy, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b)
        assert b.requires_grad or a is None


@pytest.mark.sanitize
@training
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_in_place_relu_on_the_output(device, training, dtype):
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in leaves((4, 3, 5), device=device))
    stats = [torch.zeros(3, dtype=dtype, device=device), torch.ones(3, dtype=dtype, device=device)]
    grads = []
    for relu in (torch.relu_, torch.relu):
        y = relu(batch_norm(x, *(s.clone() for s in stats), weight, bias, training))
        grads.append(torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y)))
    for in_place, plain in zip(*grads, strict=True):
        assert torch.equal(in_place, plain)


@pytest.mark.sanitize
@training
@pytest.mark.parametrize("index, name", [(0, "input"), (1, "weight")])
def test_change_before_backward_raises(device, index, name, training):
    tensors = [t * 1 for t in leaves((4, 3, 5), device=device)]
    y = function(training, 3, device)(*tensors)
    with torch.no_grad():
        tensors[index].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_change_of_the_bias_does_not_matter(device):
    originals = leaves((4, 3, 5), device=device)
    tensors = [t * 1 for t in originals]
    y = function(True, 3, device)(*tensors)
    dy = torch.randn_like(y)
    right = torch.autograd.grad(y, originals, dy, retain_graph=True)
    with torch.no_grad():
        tensors[2].add_(1)
    found = torch.autograd.grad(y, originals, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eval_then_training_then_backward_of_the_first(device, dtype):
    """torch uses the statistics that the training step has changed since, and is silently wrong."""
    bn = fastbn.BatchNorm2d(3, device=device, dtype=dtype)
    with torch.no_grad():
        bn.running_mean.uniform_(-1, 1)
        bn.running_var.uniform_(0.5, 2)
        bn.weight.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 5, dtype=dtype, device=device, requires_grad=True)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    dy = torch.randn(4, 3, 5, 5, dtype=dtype, device=device)
    first = bn.eval()(x)
    bn.train()(x.detach() * 7 + 3)
    assert not torch.equal(bn.running_mean, mean)
    found = torch.autograd.grad(first, (x, bn.weight, bn.bias), dy)
    right = torch.autograd.grad(composed(x, bn.weight, bn.bias, mean, var, bn.eps), (x, bn.weight, bn.bias), dy)
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours, exact)


def test_two_training_forwards_before_a_backward(device):
    """What DDP users do (pt#175024): each output keeps its own statistics."""
    bn = fastbn.BatchNorm1d(3, device=device, dtype=torch.float64)
    a, b = (torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    first, second = bn(a), bn(b * 5 + 1)
    dy = torch.randn_like(first)
    found = torch.autograd.grad((first * dy).sum() + (second * dy).sum(), (a, b))
    for x, ours, scaled in ((a, found[0], lambda t: t), (b, found[1], lambda t: t * 5 + 1)):
        right = torch.autograd.grad(composed(scaled(x), bn.weight, bn.bias, eps=bn.eps), x, dy)[0]
        torch.testing.assert_close(ours, right)


@training
def test_forward_mode(device, training):
    tensors = [t.detach() for t in leaves((4, 3, 5), device=device)]
    tangents = [torch.randn_like(t) for t in tensors]
    mean = torch.linspace(-1, 1, 3, dtype=torch.float64, device=device)
    var = torch.linspace(0.5, 2, 3, dtype=torch.float64, device=device)
    results = []
    for call in (function(training, 3, device), lambda *t: composed(*t, *(() if training else (mean, var)))):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, dt) for t, dt in zip(tensors, tangents, strict=True)]
            results.append(forward_ad.unpack_dual(call(*duals)))
    torch.testing.assert_close(results[0].primal, results[1].primal)
    torch.testing.assert_close(results[0].tangent, results[1].tangent)


def test_forward_mode_updates_the_running_statistics(device):
    bn, torchs = fastbn.BatchNorm1d(3, device=device), torch.nn.BatchNorm1d(3, device=device)
    x, dx = torch.randn(5, 3, device=device), torch.randn(5, 3, device=device)
    for module in (bn, torchs):
        with forward_ad.dual_level():
            module(forward_ad.make_dual(x, dx))
    torch.testing.assert_close(bn.running_mean, torchs.running_mean)
    torch.testing.assert_close(bn.running_var, torchs.running_var)
    assert bn.num_batches_tracked == 1


def test_gradients_of_non_leaf_and_of_views(device):
    base = torch.randn(4, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    y = batch_norm(base[:, ::2], None, None, None, None, True, 0.1, 1e-3)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, base, dy)
    (right,) = torch.autograd.grad(composed(base[:, ::2], None, None), base, dy)
    torch.testing.assert_close(found, right)


def test_the_same_tensor_in_two_places(device):
    x = torch.randn(5, 5, dtype=torch.float64, device=device, requires_grad=True)
    y = batch_norm(x, None, None, x[0], x[1], True, 0.1, 1e-3)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, dy)
    (right,) = torch.autograd.grad(composed(x, x[0], x[1]), x, dy)
    torch.testing.assert_close(found, right)
