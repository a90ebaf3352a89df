"""y = act(bn(x) + residual): values and every gradient on each backend, no further from float64 than torch's are."""

import itertools
import math

import inputs
import pytest
import torch
from epilogue import MASKED, PARAMS, check, composed, each_activation, fused, gradients, residuals, training
from torch import nn

from fastbn import _C, activations, ops
from fastbn.activations import ACTIVATIONS
from fastbn.functional import batch_norm

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).removeprefix("torch."))
# Rows of whole packs and of odd ends, one position a channel, few channels, spare rows, one map in several parts.
SHAPES = [
    (33, 5), (64, 96), (5, 1), (3, 7, 1, 3), (4, 6, 7, 7), (3, 5, 33, 31), (8, 130, 3, 3), (2, 3, 14, 14),
    (2, 4, 65, 64), (40, 3, 4, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 0.0])
def test_elu_of_zero_is_zero_whatever_alpha_is(device, alpha):
    """A constant channel is zero once it is normalized."""
    x = torch.full((4, 3, 5, 5), 2.5, device=device)
    y = batch_norm(x, None, None, training=True, activation="elu", activation_param=alpha)
    assert torch.equal(y, torch.zeros_like(y))
    torchs = nn.functional.elu(torch.zeros_like(x), alpha)
    if torch.__version__ < (2, 9) and not math.isfinite(alpha):  # torch 2.6 multiplies zero by alpha
        assert torchs.isnan().all() or torch.equal(y, torchs)
    else:
        assert torch.equal(y, torchs)


@training
@residuals
@each_activation
@dtypes
def test_values_and_gradients(device, dtype, activation, residual, training):
    shapes = SHAPES[2:6] if ops.SIMULATED else SHAPES  # there it takes seconds
    for shape, layout in itertools.product(shapes, (inputs.contiguous, inputs.channels_last)):
        check(layout(shape, dtype=dtype, device=device), activation, residual, training)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@residuals
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients_of_some(device, dtype, activation, residual, training):
    for shape, layout in itertools.product(
        [(33, 5), (2, 8, 9, 7), (4, 64, 3, 3)], (inputs.contiguous, inputs.channels_last)
    ):
        check(layout(shape, dtype=dtype, device=device), activation, residual, training)


@residuals
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layout", inputs.LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(device, layout, activation, residual):
    for shape in ((2, 6, 5, 7), (3, 1, 4, 4), (2, 16, 12, 11)):
        check(layout(shape, device=device), activation, residual, True)


# Over 4 MB, in both access patterns, with rows left over after those that are taken together. 70 channels are no whole
# lines in channels_last, and 1000 positions are none in contiguous: there two make a row.
@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(67, 64, 17, 16), (19, 64, 33, 32), (18, 70, 1000)], ids=str)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_stores_past_the_cache(device, shape, layout):
    check(layout(shape, device=device), "relu", True, True, ulps=16)
    check(layout(shape, device=device), "identity", True, False, ulps=16)


# Wide maps of whole lines, four samples together and two left over: in eval, and, over 4 MB, in training.
@pytest.mark.cpu
@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape, training", [((6, 5, 64, 32), False), ((18, 64, 33, 64), True)], ids=["eval", "training"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_four_samples_together(device, dtype, shape, training):
    for activation, residual in (("relu", True), ("identity", False)):
        check(inputs.contiguous(shape, dtype=dtype, device=device), activation, residual, training)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 300, 301), (16, 64, 56, 56), (64, 256, 14, 14), (1, 40, 2, 4100)], ids=str)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_large_tensors(device, shape, layout):
    """Channel tiles in several batch splits, and stores past the cache."""
    for activation, residual in (("relu", True), ("relu", False), ("leaky_relu", True), ("tanh", True)):
        check(layout(shape, device=device), activation, residual, True, ulps=16)
    check(layout(shape, dtype=torch.bfloat16, device=device), "relu", True, True)


@residuals
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_mixed_layouts_and_half_inputs_with_float_parameters(device, activation, residual):
    x, r, dy = (inputs.contiguous((3, 8, 5, 6), dtype=torch.bfloat16, device=device) for _ in range(3))
    weight, bias = torch.randn(2, 8, device=device)
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    rest = True, activation, PARAMS.get(activation)
    alike = gradients(fused, x, mean, var, weight, bias, r if residual else None, dy, *rest)
    r, dy = (t.contiguous(memory_format=torch.channels_last) for t in (r, dy))
    mixed = gradients(fused, x, mean, var, weight, bias, r if residual else None, dy, *rest)
    for a, b in zip(alike, mixed, strict=True):
        assert torch.equal(a, b)
    assert mixed[2].dtype == torch.float32


@training
@pytest.mark.parametrize("activation", ["identity", "relu", "elu"])
def test_every_subset_of_gradients(device, activation, training):
    tensors = [inputs.contiguous((4, 6, 5, 5), device=device), *torch.randn(2, 6, device=device)]
    tensors.append(torch.randn_like(tensors[0]))
    mean, var, dy = torch.zeros(6, device=device), torch.ones(6, device=device), torch.randn_like(tensors[0])
    all_of_them = gradients(fused, tensors[0], mean, var, *tensors[1:], dy, training, activation, None)[1:]
    for subset in itertools.product([False, True], repeat=4):
        leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, subset, strict=True)]
        y = fused(leaves[0], mean.clone(), var.clone(), *leaves[1:], training, activation, None)
        assert y.requires_grad == any(subset)
        if any(subset):
            y.backward(dy)
        for leaf, wanted, expected in zip(leaves, subset, all_of_them, strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("activation", MASKED)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_the_gradient_passes_where_the_output_does(device, layout, activation):
    """The sign of z is that of the forward pass, to the bit, in what is computed again and in what was saved."""
    for residual in (None, layout((4, 24, 9, 9), device=device)):
        x = layout((4, 24, 9, 9), device=device).requires_grad_()
        added = None if residual is None else residual.requires_grad_()
        # many values at zero: a few values, and a bias that is minus one of them
        with torch.no_grad():
            x.copy_((x * 2).round() / 2)
        y = fused(
            x, None, None, torch.ones(24, device=device), torch.zeros(24, device=device), added, True, activation, None
        )
        leaf = x if added is None else added
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        if added is None:  # eval statistics are constants: dx is dz times a positive number
            mean, var = torch.zeros(24, device=device), torch.ones(24, device=device)
            y = fused(x, mean, var, None, torch.full((24,), -0.5, device=device), None, False, activation, None)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        passes = (y > 0) & (y < 6) if activation == "relu6" else y > 0
        assert torch.equal(grad.abs() > 0.5, passes)


@pytest.mark.parametrize("activation", MASKED)
@residuals
def test_infinite_gradients_are_blocked(device, activation, residual):
    """In torch dz is zero where z is below zero, whatever dy is; a product with zero would be NaN."""
    x = inputs.contiguous((4, 4, 8, 8), device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    r = torch.randn_like(x) if residual else None
    dy = torch.full_like(x, float("inf"))
    ours = gradients(fused, x, mean, var, None, None, r, dy, False, activation, None)
    torchs = gradients(composed, x, mean, var, None, None, r, dy, False, activation, None)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not ours[1].isnan().any()


@each_activation
def test_a_nan_stays_in_its_channel(device, activation):
    x = inputs.contiguous((3, 4, 5, 5), device=device)
    x[1, 2, 0, 3] = float("nan")
    y = fused(x, None, None, None, None, torch.randn_like(x), True, activation, PARAMS.get(activation))
    bad = y.isnan().transpose(0, 1).flatten(1)
    assert bad[2].all() and not bad[[0, 1, 3]].any()
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = fused(x, mean, var, None, None, None, False, activation, PARAMS.get(activation))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_same_bits_with_any_number_of_threads(threads, activation):
    for shape in ((8, 6, 70, 70), (64, 40, 7, 7), (3, 5, 33, 31)):
        x, r, dy = torch.randn(3, *shape).unbind()
        found = []
        for n in (1, 2, 3):
            threads(n)
            leaves = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = fused(leaves[0], None, None, None, None, leaves[1], True, activation, None)
            found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_python_and_the_kernels_have_the_same_table():
    assert list(_C.activations()) == sorted(ACTIVATIONS)


@each_activation
def test_derivatives_are_those_of_torch(activation):
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    param = activations.check(activation, PARAMS.get(activation))
    (right,) = torch.autograd.grad(ACTIVATIONS[activation].forward(z, param).sum(), z)
    if activation == "hardswish" and torch.__version__ < (2, 9):
        # At its two kinks, torch 2.6 takes the slope z / 3 + 0.5 of the part between them.
        for kink, slope, inner in ((-3, 0.0, -0.5), (3, 1.0, 1.5)):
            at = z.detach() == kink
            assert at.sum() == 1 and right[at].item() in (slope, inner)
            right[at] = slope
    torch.testing.assert_close(ACTIVATIONS[activation].derivative(z.detach(), param), right, rtol=1e-9, atol=1e-12)
