"""Memory layouts: strides of results, x and dy in different layouts, and outputs that share no memory with inputs."""

import itertools

import inputs
import pytest
import torch
from reference import assert_close, check, oracle, run

import fastbn
from fastbn.functional import batch_norm

torch_batch_norm = torch.nn.functional.batch_norm
SHAPES = [
    (4, 3), (4, 3, 5), (4, 3, 5, 7), (4, 3, 1, 1), (4, 1, 5, 7), (1, 3, 5, 7), (2, 3, 4, 5, 3), (2, 8, 8, 1),
    (1, 1, 1, 2), (2, 3, 1, 7),
]  # fmt: skip
GRAD_LAYOUTS = (inputs.contiguous, inputs.channels_last, inputs.transposed, inputs.cropped, inputs.offset)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
layouts = pytest.mark.parametrize("layout", inputs.LAYOUTS, ids=lambda layout: layout.__name__)


def leaf_of(x):
    return x.detach().requires_grad_()


def through_torch_and_us(x, training, grad_output=None):
    """[(output, x.grad)] of fastbn and of torch, gradients accumulated into the leaf."""
    stats = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    results = []
    for function in (batch_norm, torch_batch_norm):
        leaf = leaf_of(x)
        y = function(leaf, *(s.clone() for s in stats), training=training)
        y.backward(torch.ones_like(y) if grad_output is None else grad_output)
        results.append((y, leaf.grad))
    return results


@pytest.mark.sanitize
@training
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_are_torchs(device, layout, shape, training):
    (y, dx), (torch_y, torch_dx) = through_torch_and_us(layout(shape, device=device), training)
    assert y.stride() == torch_y.stride()
    assert dx.stride() == torch_dx.stride()


@training
@layouts
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 5, 2)], ids=str)
def test_fake_kernels_give_the_strides_of_the_real_ones(device, layout, shape, training):
    x = layout(shape, device=device)
    moments = torch.ones(2, shape[1], dtype=torch.float64, device=device)
    fake = torch.empty_strided(x.shape, x.stride(), device="meta")
    ops = torch.ops.fastbn
    for activation, mask in itertools.product(["identity", "silu"], [[True] * 4, [True, False, False, False]]):
        rest = 1e-5, training, mask, activation
        real = ops.backward(torch.ones_like(x), x, None, moments, *rest)
        guess = ops.backward(torch.ones_like(fake), fake, None, moments.to("meta"), *rest)
        assert [t.stride() for t in real] == [t.stride() for t in guess]
    real = ops.forward(x, None, None, None if training else moments, 1e-5)
    guess = ops.forward(fake, None, None, None if training else moments.to("meta"), 1e-5)
    assert [t.stride() for t in real] == [t.stride() for t in guess]


@training
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dx_takes_the_strides_of_a_dense_x(device, shape, training):
    for layout in (inputs.contiguous, inputs.channels_last):
        x = layout(shape, device=device)
        if x.dim() == 3 and layout is inputs.channels_last:
            continue  # torch has no channels_last for three dimensions
        (_, dx), _ = through_torch_and_us(x, training)
        assert dx.stride() == x.stride()


@pytest.mark.sanitize
@training
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 8, 8, 1), (3, 4, 1, 1), (3, 33, 7, 7), (2, 5, 3, 2, 4)], ids=str)
def test_mixtures_of_the_layouts_of_x_and_dy(device, shape, dtype, training):
    """pt#64100 was silently wrong; pt#42588 permuted dy on (2, 8, 8, 1)."""
    for layout in (inputs.contiguous, inputs.channels_last):
        for grad_layout in GRAD_LAYOUTS:
            dy = grad_layout(shape, dtype=dtype, device=device)
            check(layout(shape, dtype=dtype, device=device), grad_output=dy, training=training)


@pytest.mark.sanitize
@training
@layouts
def test_expanded_output_gradients(device, layout, training):
    """y.sum().backward() hands over a dy with strides of zero (pt#1866)."""
    x = layout((4, 3, 5, 7), device=device)
    constant = torch.tensor(1.5, device=device).expand(x.shape)
    weight, bias, mean, var = torch.rand(4, 3, device=device) + 0.5
    arguments = (x, weight, bias, mean, var, training, 0.1, 1e-5, constant)
    truth = oracle(*arguments)
    for quantity, result in run(batch_norm, *arguments).items():
        # not compared with torch: in training everything cancels, and what is left of it is chance
        assert_close(quantity, result, truth)
    for axis in (0, 2, 3):
        size = [x.shape[i] if i == axis else 1 for i in range(4)]
        check(x, grad_output=torch.randn(size, device=device).expand(x.shape), training=training)
    leaf = leaf_of(x)
    y = batch_norm(leaf, None, None, None, None, True)
    y.sum().backward()
    assert leaf.grad.abs().max() < 1e-4, "the sum of a normalized batch is constant"


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shift", range(1, 9))
def test_addresses_that_are_no_multiple_of_a_vector(device, shift, itemsize):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    shape = (3, 5, 4, 9)
    count = torch.Size(shape).numel()

    def at_offset(by, order):
        flat = torch.randn(count + by, device=device).to(dtype)
        inverse = [order.index(i) for i in range(4)]
        return flat[by:].view([shape[i] for i in order]).permute(inverse)

    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        x, dy = at_offset(shift, order), at_offset((shift * 3) % 5, order)
        assert x.data_ptr() % 64 == shift * itemsize % 64, "torch's allocator aligns to 64 bytes"
        check(x, grad_output=dy)
        check(x, grad_output=dy, training=False)


@pytest.mark.simt_quick
@pytest.mark.sanitize
def test_offset_parameters_and_statistics(device):
    """Views into one flat buffer, as FSDP and fused optimizers make them."""
    flat = torch.rand(4 * 7 + 1, device=device) + 0.5
    weight, bias, mean, var = flat[1:].view(4, 7)
    x, dy = torch.randn(3, 7, 5, 5, device=device), torch.randn(3, 7, 5, 5, device=device)
    arguments = (x, weight, bias, mean, var, True, 0.1, 1e-5, dy)
    truth = oracle(*arguments)
    for quantity, result in run(batch_norm, *arguments).items():
        assert_close(quantity, result, truth)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_buffers_with_strides_are_updated_in_place(device, stride, dtype):
    memory = torch.full((2, 5 * stride), 7.0, device=device, dtype=dtype)
    mean, var = memory[0, ::stride], memory[1, 1::stride]
    x = torch.randn(4, 5, 6, device=device, dtype=dtype)
    expected = mean.clone(), var.clone()
    batch_norm(x, mean, var, None, None, True, 0.3)
    torch_batch_norm(x, *expected, None, None, True, 0.3)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(var, expected[1])
    untouched = torch.ones_like(memory, dtype=torch.bool)
    untouched[0, ::stride], untouched[1, 1::stride] = False, False
    assert (memory[untouched] == 7).all(), "and nothing between them is"


@pytest.mark.simt_quick
@pytest.mark.sanitize
def test_strided_weights(device):
    memory = torch.randn(2, 15, device=device)
    weight, bias = memory[0, ::3], memory[1, 1::3]
    for layout in (inputs.contiguous, inputs.channels_last):
        check(layout((4, 5, 6, 3), device=device), weight=weight, bias=bias)


@pytest.mark.sanitize
@training
@layouts
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 3), (0, 3, 2), (1, 1, 1, 2)], ids=str)
def test_the_output_never_aliases_the_input(device, layout, shape, training):
    x = layout(shape, device=device)
    before = x.clone()
    weight = torch.ones(shape[1], device=device)
    stats = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    y = batch_norm(x, *stats, weight, None, training, 0.1, 1e-5 if training else 0.0)
    if y.numel():
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    y.fill_(3)
    assert torch.equal(x, before)


def test_gradients_do_not_alias_each_other_or_the_output_gradient(device):
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    weight, bias = (torch.ones(3, device=device, requires_grad=True) for _ in range(2))
    stats = torch.zeros(3, device=device), torch.ones(3, device=device)
    for training in (True, False):
        dy = torch.randn(4, 3, 5, 5, device=device)
        y = batch_norm(x, *stats, weight, bias, training, eps=1e-5)
        grads = torch.autograd.grad(y, (x, weight, bias), dy)
        starts = {t.untyped_storage().data_ptr() for t in (*grads, dy, x, weight, bias)}
        assert len(starts) == 7


@pytest.mark.parametrize("module", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_modules_keep_the_memory_format(device, module):
    rank = {"1": 3, "2": 4, "3": 5}[module[-2]]
    bn = getattr(fastbn, module)(6, device=device)
    torch_bn = getattr(torch.nn, module)(6, device=device)
    for layout in inputs.LAYOUTS:
        x = layout((4, 6, 5, 3, 2)[:rank], device=device)
        assert bn(x).stride() == torch_bn(x).stride()
