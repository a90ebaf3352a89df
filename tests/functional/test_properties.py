"""Invariances of batch norm, searched with hypothesis (the same examples in every run), and random cases in float64."""

import inputs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import check

from fastbn.functional import batch_norm

bounded = settings(
    deadline=None, derandomize=True, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)
seeds = st.integers(0, 2**31 - 1)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def shapes(draw, largest=400):
    """At least two values a channel; any rank from 2 to 5; mostly small."""
    channels = draw(st.integers(1, 70))
    rank = draw(st.integers(2, 5))
    spatial = [draw(st.integers(1, {2: 1, 3: 60, 4: 12, 5: 5}[rank])) for _ in range(rank - 2)]
    batch = draw(st.integers(1, 9))
    size = torch.Size(spatial).numel()
    if batch * size < 2:
        batch = 2
    return (batch, min(channels, max(1, largest // size)), *spatial)


def tensors(seed, shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, channels, channels, shape)]
    return [t.to(device=device, dtype=dtype) for t in made]


def train(x, weight, bias, eps=1e-5):
    return batch_norm(x, None, None, weight, bias, True, 0.1, eps)


def with_grads(call, leaves, dy):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = call(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@bounded
@given(
    shape=shapes(),
    seed=seeds,
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    layout=st.sampled_from(inputs.LAYOUTS),
    grad_layout=st.sampled_from(inputs.LAYOUTS),
    affine=st.booleans(),
)
def test_random_cases_against_float64(backend, shape, seed, training, dtype, wide, layout, grad_layout, affine):
    torch.manual_seed(seed)
    if layout is inputs.expanded and shape[0] * torch.Size(shape[2:]).numel() == shape[0]:
        layout = inputs.contiguous  # a channel of one repeated value: rstd amplifies the last bit of the mean
    half = dtype in (torch.float16, torch.bfloat16)
    check(
        layout(shape, dtype=dtype, device=backend.device),
        grad_output=grad_layout(shape, dtype=dtype, device=backend.device),
        param_dtype=torch.float32 if half and wide else dtype,
        training=training,
        affine=affine,
    )


@bounded
@given(shape=shapes(), seed=seeds, shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_shift_and_scale_of_the_input(backend, shape, seed, shift, scale):
    """BN(a x + b) = BN(x) when eps is scaled by a^2, and the gradient for x is 1/a of it."""
    x, weight, bias, dy = tensors(seed, shape, device=backend.device)
    y, dx, dweight, dbias = with_grads(lambda *t: train(*t, eps=1e-3), (x, weight, bias), dy)
    moved = with_grads(lambda *t: train(*t, eps=1e-3 * scale**2), (x * scale + shift, weight, bias), dy)
    for ours, right in zip(moved, (y, dx / scale, dweight, dbias), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6 / min(scale, 1))


@bounded
@given(shape=shapes(), seed=seeds)
def test_permutation_of_the_batch(backend, shape, seed):
    x, weight, bias, dy = tensors(seed, shape, device=backend.device)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed)).to(backend.device)
    y, dx, dweight, dbias = with_grads(train, (x, weight, bias), dy)
    mixed = with_grads(train, (x[order], weight, bias), dy[order])
    for ours, right in zip(mixed, (y[order], dx[order], dweight, dbias), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@bounded
@given(shape=shapes(), seed=seeds)
def test_permutation_of_the_channels_is_exact(backend, shape, seed):
    """Channels are independent: moving one changes not a bit of it, in a layout that walks channels alone."""
    x, weight, bias, dy = tensors(seed, shape, torch.float32, backend.device)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)).to(backend.device)
    y, dx, *parameters = with_grads(train, (x, weight, bias), dy)
    moved = with_grads(train, (x[:, order].contiguous(), weight[order], bias[order]), dy[:, order].contiguous())
    for ours, right in zip(moved[:2], (y, dx), strict=True):
        torch.testing.assert_close(ours, right[:, order], rtol=2e-5, atol=2e-5)
    for ours, right in zip(moved[2:], parameters, strict=True):
        torch.testing.assert_close(ours, right[order], rtol=2e-5, atol=2e-4)


@bounded
@given(
    seed=seeds,
    a=st.floats(0.05, 20),
    features=st.integers(1, 6),
    units=st.integers(1, 5),
    batch=st.integers(3, 9),
)
def test_scale_of_the_weights_before_it(backend, seed, a, features, units, batch):
    """Ioffe & Szegedy, section 3.3: BN((aW)u) = BN(Wu), dBN/du is the same, and dBN/d(aW) = dBN/dW / a."""
    generator = torch.Generator().manual_seed(seed)

    def double(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(backend.device)

    inputs_u, matrix, dy = double(batch, features), double(units, features), double(batch, units)
    # eps is tiny, so that the scale of W is all that could differ; the property is exact for eps = 0
    y, du, dw = with_grads(lambda u, w: train(u @ w.T, None, None, 1e-30), (inputs_u, matrix), dy)
    scaled = with_grads(lambda u, w: train(u @ w.T, None, None, 1e-30), (inputs_u, a * matrix), dy)
    for ours, right in zip(scaled, (y, du, dw / a), strict=True):
        magnitude = float(right.abs().max()) + 1e-3
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6 * magnitude)


@bounded
@given(shape=shapes(), seed=seeds, layout=st.sampled_from(inputs.LAYOUTS))
def test_the_output_is_normalized(backend, shape, seed, layout):
    torch.manual_seed(seed)
    x = layout(shape, dtype=torch.float64, device=backend.device)
    rows = train(x, None, None, 1e-12).transpose(0, 1).reshape(shape[1], -1)
    variance = x.transpose(0, 1).reshape(shape[1], -1).var(1, correction=0)
    assert rows.mean(1).abs().max() < 1e-6
    expected = variance / (variance + 1e-12)
    spread = variance > 1e-6
    torch.testing.assert_close(rows.var(1, correction=0)[spread], expected[spread], rtol=1e-6, atol=1e-6)


@bounded
@given(shape=shapes(), seed=seeds)
def test_the_input_gradient_is_orthogonal_to_one_and_to_the_output(backend, shape, seed):
    """Neither a shift nor (with eps near zero) a scale of a channel changes the loss."""
    x, _, _, dy = tensors(seed, shape, device=backend.device)
    y, dx = with_grads(lambda t: train(t, None, None, 1e-30), (x,), dy)
    axes = [0, *range(2, len(shape))]
    bound = 1e-7 * (1 + dx.abs().amax(axes)) * shape[0] * torch.Size(shape[2:]).numel()
    assert (dx.sum(axes).abs() <= bound).all()
    assert ((dx * y).sum(axes).abs() <= bound).all()


@bounded
@given(shape=shapes(), seed=seeds)
def test_training_with_known_moments_is_eval(backend, shape, seed):
    x, weight, bias, dy = tensors(seed, shape, device=backend.device)
    axes = [0, *range(2, len(shape))]
    mean, var = x.mean(axes), x.var(axes, correction=0)
    y = train(x, weight, bias)
    torch.testing.assert_close(y, batch_norm(x, mean, var, weight, bias), rtol=1e-7, atol=1e-7)
