"""Values for which naive formulas fail, judged by exact answers where there is one, else by float64 and torch."""

import timeit

import inputs
import pytest
import torch
from reference import check, oracle, rows, run, wide

import fastbn
from fastbn.functional import batch_norm

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


def train(x, weight=None, bias=None, eps=1e-5):
    return batch_norm(x, None, None, weight, bias, True, 0.1, eps)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("mean, std", [(1e4, 1), (1e3, 0.01), (-1e4, 1), (3e6, 1), (1e5, 1e-2)])
def test_variance_beside_a_large_mean(device, layout, mean, std):
    x = inputs.around(mean, std)((8, 3, 9, 9), dtype=torch.float32, device=device)
    check(x.contiguous(memory_format=layout))
    moments = fastbn.BatchNormFunction.apply(x.contiguous(memory_format=layout), None, None, None, 1e-5)[1]
    exact = rows(wide(x)).var(1)
    assert (moments[1] >= 0).all()
    # a naive variance would be wrong by eps * mean^2, far more than this bound
    bound = exact * 1e-3 + (abs(mean) * torch.finfo(x.dtype).eps) ** 2
    assert (abs(wide(moments[1]) - exact) <= bound).all()


@pytest.mark.simt_quick
@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("value", [1e10, -1e10, 0.1, 1e4, 3e38, 0.0])
@pytest.mark.parametrize("shape", [(4, 3, 7, 7), (3, 2, 33, 5), (64, 5, 1, 1)])
def test_constant_channel_gives_beta_exactly(device, layout, value, shape):
    x = torch.full(shape, value, device=device).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(shape[1], device=device).requires_grad_(), torch.randn(shape[1], device=device)
    stats = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    y = batch_norm(x, *stats, weight, bias, True)
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand(shape))
    torch.testing.assert_close(stats[0], torch.full_like(stats[0], 0.1 * value))
    assert torch.equal(stats[1], torch.full_like(stats[1], 0.9)), "the variance of a constant is zero"
    _, grad_weight = torch.autograd.grad(y, (x, weight), torch.randn(shape, device=device))
    assert not grad_weight.any(), "the sum of dy * 0"


@pytest.mark.parametrize("dtype, value", [(torch.float64, 1e300), (torch.bfloat16, 1e10), (torch.float16, 6e4)])
def test_constant_channel_in_other_types(device, dtype, value):
    x = torch.full((6, 3, 5, 5), value, dtype=dtype, device=device)
    assert torch.equal(train(x), torch.zeros_like(x))


@pytest.mark.simt_quick
@LAYOUTS
@pytest.mark.parametrize("magnitude", [1e18, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (5, 16, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_huge_values(device, layout, magnitude, shape, dtype, aligned):
    """Squares overflow float32. torch sums in double on the CPU and is right, so this has to be right as well. What is
    not aligned, CUDA reads twice; and of two channels beside each other, only one is huge."""
    x = (torch.randn(shape, device=device) * magnitude).to(dtype)
    x[:, 1] /= magnitude
    x = x.contiguous(memory_format=layout)
    if not aligned:
        moved = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].as_strided(x.shape, x.stride())
        x = moved.copy_(x)
    check(x, param_dtype=torch.float32, stats=False)
    y = train(x)
    assert torch.isfinite(y).all() and abs(y.double().std(correction=0) - 1) < 1e-3


@pytest.mark.parametrize("magnitude", [1e-18, 1e-30, 1e-38])
def test_tiny_values_in_float32(device, magnitude):
    """Squares underflow float32: eps decides, and the output is x / sqrt(eps)."""
    check(torch.randn(6, 3, 5, 5, device=device) * magnitude, affine=False, stats=False)


@LAYOUTS
def test_float16_at_its_limits(device, layout):
    sign = torch.where(torch.rand(16, 3, 8, 8) < 0.5, -1.0, 1.0)
    x = (sign * 6e4).to(device=device, dtype=torch.float16).contiguous(memory_format=layout)
    check(x, param_dtype=torch.float32)
    assert train(x).abs().max() < 1.5


@pytest.mark.parametrize("case", [((1, 1, 64, 32), 1e4), ((1, 1, 64, 32), 1e-4), ((4, 7, 9, 9), 1e6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_with_unusual_output_gradients(device, case, dtype):
    """pt#57796, pt#62034, pt#156513: dy large or tiny, and with a mean far from zero."""
    shape, magnitude = case
    if dtype == torch.float16:
        magnitude = max(min(magnitude, 1e3), 1e-2)
    x = torch.randn(shape, device=device).to(dtype)
    for shift in (0, 10):
        dy = ((torch.randn(shape, device=device) + shift) * magnitude).to(dtype)
        parameter = torch.float32 if dtype != torch.float32 else None
        check(x, grad_output=dy, param_dtype=parameter)
        check(x, grad_output=dy, param_dtype=parameter, training=False)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 5, 6, 6), (3, 16, 7, 7), (2, 33, 3, 1)])
def test_nan_and_inf_stay_in_their_channel(device, layout, shape):
    x = torch.randn(shape, device=device)
    clean = x.clone()
    x[1, 1, 0, 0], x[0, 3, 1, 0] = float("nan"), float("inf")
    x, clean = x.contiguous(memory_format=layout), clean.contiguous(memory_format=layout)
    stats = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    leaf, clean_leaf = x.requires_grad_(), clean.requires_grad_()
    dy = torch.randn(shape, device=device)
    y = batch_norm(leaf, *stats, None, None, True)
    expected = batch_norm(clean_leaf, None, None, None, None, True)
    y.backward(dy)
    expected.backward(dy)
    others = [c for c in range(shape[1]) if c not in (1, 3)]
    assert torch.equal(y[:, others], expected[:, others])
    assert torch.equal(leaf.grad[:, others], clean_leaf.grad[:, others])
    assert y[:, 1].isnan().all() and y[:, 3].isnan().any()
    assert stats[0][1].isnan() and stats[1][1].isnan()
    assert stats[0][3] == float("inf") and stats[1][3].isnan(), "inf: the mean is inf, the variance NaN"
    assert torch.isfinite(stats[0][others]).all() and torch.isfinite(stats[1][others]).all()


def bias_gradient(dy):
    bias = torch.zeros(dy.size(1), device=dy.device).requires_grad_()
    y = batch_norm(torch.randn(dy.shape, device=dy.device).to(dy.dtype), None, None, torch.ones_like(bias), bias, True)
    return torch.autograd.grad(y, bias, dy)[0]


# Maps that are summed in registers, of few samples and of more; a pack of columns lies in two channels, or does not.
FEW = pytest.mark.parametrize("shape", [(1, 3, 45, 45), (4, 3, 16, 16), (5, 6, 14, 14), (16, 4, 7, 7), (40, 2, 14, 14)])


@pytest.mark.simt_quick
@pytest.mark.sanitize
@FEW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_nearly_cancel_are_summed_exactly(device, shape, dtype):
    values = torch.randn(shape, device=device) * torch.logspace(-1, 1, shape[-1], device=device)
    dy = values.to(dtype)
    half = dy.flatten(2).size(2) // 2
    dy.flatten(2)[..., :half] = -dy.flatten(2)[..., half : 2 * half].flip(0)
    exact = rows(wide(dy)).sum(1)
    error = abs(wide(bias_gradient(dy)) - exact)
    # floats would lose 1e-7 of what had been summed on the way
    assert (error <= 1e-6 * abs(exact) + 1e-9 * abs(rows(wide(dy))).sum(1)).all()


@pytest.mark.simt_quick
@FEW
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_gradient_makes_an_infinite_sum(device, shape, value):
    dy = torch.randn(shape, device=device).bfloat16()
    clean = bias_gradient(dy)
    dy[-1, 1, 3, 4] = value
    found, expected = bias_gradient(dy), clean.clone()
    expected[1] = value
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 5, 6, 6), (8, 40, 14, 14), (4, 3, 40, 40)])
@pytest.mark.parametrize("types", [(torch.float32, None), (torch.float16, torch.float32)], ids=["float32", "float16"])
def test_one_channel_far_from_zero(device, layout, shape, types):
    """Sums about zero do for the others: it alone is summed once more about its mean, and they have the same bits."""
    near = torch.randn(shape, device=device)
    far = near.clone()
    far[:, 1] = near[:, 1] * 1e-2 + 3e4
    near, far = (x.to(types[0]).contiguous(memory_format=layout) for x in (near, far))
    check(far, param_dtype=types[1])
    others = [c for c in range(shape[1]) if c != 1]
    assert torch.equal(train(near)[:, others], train(far)[:, others])


@pytest.mark.cpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_take_no_longer(layout, dtype):
    """A training that diverges must not look as if it hung: each channel of bfloat16 was once summed again in a pass of
    its own over all channels, 10,000 times as long."""
    x = torch.randn(8, 256, 14, 14).to(dtype).contiguous(memory_format=layout)

    def seconds(x):
        return min(timeit.repeat(lambda: train(x), number=1, repeat=5))

    finite = seconds(x)
    assert seconds(torch.full_like(x, float("nan"))) < 100 * finite, "in double, plainly: 10 times or so"


@pytest.mark.simt_quick
@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_eval_touches_only_the_element(device, layout, value):
    x = torch.randn(3, 5, 7, 7, device=device).contiguous(memory_format=layout)
    stats = torch.randn(5, device=device), torch.rand(5, device=device) + 0.5
    expected = batch_norm(x, *stats)
    x[2, 4, 3, 3] = value
    y = batch_norm(x, *stats)
    expected[2, 4, 3, 3] = value
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.simt_quick
@pytest.mark.sanitize
def test_unbiased_running_variance_biased_normalization_eps_inside_the_root(device):
    x = torch.tensor([[1.0], [3.0], [5.0]], device=device)
    mean, var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    y = batch_norm(x, mean, var, None, None, True, 1.0, 0.5)
    assert mean.item() == 3 and var.item() == 4, "8 / (3 - 1)"
    expected = torch.tensor([[-2.0], [0.0], [2.0]]) / (8 / 3 + 0.5) ** 0.5
    torch.testing.assert_close(y.cpu(), expected)


@pytest.mark.parametrize("eps", [0.0, -1.0, -1e-9])
def test_eps_must_be_positive_in_training(device, eps):
    from reference import assert_refused

    x = torch.randn(4, 3, device=device)
    arguments = (x, None, None, None, None, True, 0.1, eps)
    assert_refused(lambda: batch_norm(*arguments), lambda: torch.nn.functional.batch_norm(*arguments), "eps must be")


def test_eps_zero_in_eval(device):
    check(torch.randn(4, 3, 5, 5, device=device), training=False, eps=0.0)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_and_negative_weights(device, layout, training):
    x = torch.randn(4, 4, 6, 6, device=device).contiguous(memory_format=layout)
    weight = torch.tensor([0.0, -2.0, 1e-20, -0.0], device=device)
    ours, *_ = check(x, weight=weight, training=training)
    assert not ours["grad_input"][:, [0, 3]].any(), "weight = 0 gives dx = 0"
    assert (ours["grad_weight"] != 0).all(), "and still a gradient for the weight"


def test_backward_with_zero_variance(device):
    """rstd is 1 / sqrt(eps) there; the gradient is finite."""
    x = torch.full((4, 3, 5, 5), 2.5, device=device)
    ours, *_ = check(x)
    assert torch.isfinite(ours["grad_input"]).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_statistics_of_a_mixture_of_scales(device, channels_last):
    """Every channel has its own scale: a sum or a shift shared between channels shows at once."""
    scale = torch.logspace(-6, 6, 33, device=device).view(1, -1, 1, 1)
    x = torch.randn(5, 33, 6, 6, device=device) * scale + scale * 3
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = torch.ones(33, device=device), torch.zeros(33, device=device)
    dy = torch.randn_like(x)
    arguments = (x, weight, bias, None, None, True, 0.1, 1e-20, dy)
    ours, truth = run(batch_norm, *arguments), oracle(*arguments)
    from reference import assert_close

    for quantity, result in ours.items():
        assert_close(quantity, result, truth)


@LAYOUTS
def test_variance_of_bfloat16_with_few_values_near_zero(device, layout):
    """Sums about zero would round in the last digits of a float32: such a channel has to be read again."""
    torch.manual_seed(0)
    rare = torch.rand(4, 64, 7, 7) < 0.01
    x = torch.where(rare, 0.01 + 0.001 * torch.randn(rare.shape), 1.2 + 0.6 * torch.rand(rare.shape))
    x = x.to(device, torch.bfloat16).contiguous(memory_format=layout)
    moments = fastbn.BatchNormFunction.apply(x, None, None, None, 1e-5)[1]
    exact = rows(wide(x)).var(1)
    assert (abs(wide(moments[1]) - exact) <= 2**-22 * exact).all()
