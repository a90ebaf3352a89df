"""Empty tensors, single values, grids that overflow, and tensors of more than 2^31 elements."""

import os
from pathlib import Path

import inputs
import pytest
import torch
from reference import assert_same_error, check

import fastbn
from fastbn.functional import batch_norm

torch_batch_norm = torch.nn.functional.batch_norm
MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def pair(rank, *args, **kwargs):
    name = MODULES[rank]
    return getattr(fastbn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)


EMPTY = [
    (0, 3),
    (0, 3, 5),
    (2, 3, 0),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
    (2, 3, 4, 0),
    (0, 3, 2, 2, 2),
    (1, 3, 2, 0, 2),
]


@pytest.mark.simt_quick
@pytest.mark.sanitize
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_elements(device, shape, training):
    ours, _ = pair(len(shape), 3, device=device)
    ours.train(training)
    ours.running_mean.fill_(0.25)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = ours(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(ours.running_mean.cpu(), torch.full((3,), 0.25)), "statistics are untouched"
    assert torch.equal(ours.running_var.cpu(), torch.ones(3))
    assert ours.num_batches_tracked == int(training)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(ours.weight.grad.cpu(), torch.zeros(3)), "zeros, not None"
    assert torch.equal(ours.bias.grad.cpu(), torch.zeros(3))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_elements_has_torchs_strides(device, shape, training):
    ours, torchs = pair(len(shape), 3, device=device)
    x = torch.empty(shape, device=device)
    assert ours.train(training)(x).stride() == torchs.train(training)(x).stride()


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3), (2, 0, 3, 3), (0, 0), (2, 0, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_channels_is_as_in_torch(device, shape, training):
    def outcome(module):
        try:
            return module.train(training)(torch.empty(shape, device=device)).shape
        except Exception as exception:
            return type(exception)

    ours, torchs = pair(len(shape), 0, device=device)
    assert outcome(ours) == outcome(torchs)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_per_channel_in_training(device, shape):
    ours, torchs = pair(len(shape), 3, device=device)
    x = torch.randn(shape, device=device)
    assert_same_error(lambda: ours(x), lambda: torchs(x))
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 1, "counted before it is refused"
    assert torch.equal(ours.running_var, torchs.running_var)
    arguments = (x, None, None, None, None, True)
    assert_same_error(lambda: batch_norm(*arguments), lambda: torch_batch_norm(*arguments))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (1, 1), (1, 70000)], ids=str)
def test_one_value_per_channel_in_eval(device, shape):
    check(torch.randn(shape, device=device), training=False)


LARGE = [
    (65535, 3), (65536, 3), (131072, 2), (65536, 2, 2, 2), (131072, 1, 1, 1), (70000, 2), (140000, 1),
    (2, 70000), (3, 70000, 2, 2), (2, 2, 70000), (2, 2, 300, 301), (1, 1, 1, 140000),
]  # fmt: skip


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_sizes_beyond_grid_limits(device, shape, layout):
    """pt#19911, pt#16998: batches and channel counts past 65535."""
    check(layout(shape, device=device))
    check(layout(shape, dtype=torch.bfloat16, device=device), training=False)


def free_bytes(device):
    """What the device, or the system without swapping, would give, as far as a container allows; zero where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 3, 3500, 3500), (33000, 65, 32, 32)], ids=str)
def test_more_than_2_to_the_31_elements(device, shape, layout):
    """pt#81486, pt#51776. Samples repeat, so that the first one and arithmetic give the right answer."""
    count = torch.Size(shape).numel()
    assert count > 2**31
    # input, output, gradients of both, and as much again for slack
    needed = 2 * count * 4 + 2 * 2**30
    if free_bytes(device) < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    sample = torch.randn(1, *shape[1:]).to(torch.bfloat16).contiguous(memory_format=memory_format)
    sign = torch.where(torch.arange(shape[0]) % 2 == 0, 1, -1).to(torch.bfloat16).view(-1, 1, 1, 1)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format)
    torch.mul(sample.to(device), sign.to(device), out=x)
    x.requires_grad_()
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    # alternating signs: the mean is zero, and the variance that of one sample around zero
    rstd = (sample.double().square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    expected = sample.double() * rstd
    for index in (0, 1, shape[0] - 2, shape[0] - 1):
        error = (y[index].detach().cpu().double() - expected[0] * sign[index].double()).abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps * expected.abs().max()
    (dx,) = torch.autograd.grad(y, x, y.detach())
    # dy = y gives dx = rstd * y * (1 - var / (var + eps)), which is y * rstd^3 * eps: nearly nothing
    for index in (0, shape[0] - 1):
        assert dx[index].abs().max().cpu() <= 0.05 * rstd.max()
    del dx, y
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    dy = torch.empty_like(y)
    torch.mul(sample.abs().to(device), 1, out=dy[:1])
    dy[1:] = dy[:1]
    (dx,) = torch.autograd.grad(y, x, dy)
    # dy does not alternate, so its product with x sums to zero: dx = rstd * (dy - mean dy)
    right = rstd * (sample.double().abs() - sample.double().abs().mean((0, 2, 3), keepdim=True))
    for index in (0, 1, shape[0] - 2, shape[0] - 1):
        error = (dx[index].cpu().double() - right[0]).abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps * right.abs().max()
