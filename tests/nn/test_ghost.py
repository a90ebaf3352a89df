"""Ghost batch norm, compared with torch's batch norm in float64, called on one chunk after the other."""

import copy

import inputs
import pytest
import torch
from torch import nn

import fastbn
from fastbn import _C, ops
from fastbn.functional import ghost_batch_norm

V = 4
SHAPES = [(16, 6), (18, 6), (17, 6), (3, 6), (6, 130), (9, 5, 7), (5, 3, 1), (9, 4, 7, 3), (8, 16, 2, 2)]
float32 = pytest.param(torch.float32, marks=pytest.mark.simt_quick)
dtypes = pytest.mark.parametrize("dtype", [float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
layouts = pytest.mark.parametrize(
    "layout", [inputs.contiguous, inputs.channels_last, inputs.sliced, inputs.offset], ids=lambda f: f.__name__
)


def chunks(x, size=V):
    """Those of split; a last one of one value a channel belongs to the one before it."""
    parts = list(x.split(size))
    if len(parts) > 1 and parts[-1].numel() == x.size(1):
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def classes(dimensions):
    return (fastbn.GhostBatchNorm2d, nn.BatchNorm2d) if dimensions == 4 else (fastbn.GhostBatchNorm1d, nn.BatchNorm1d)


def modules(shape, device, dtype=torch.float32, size=V, **kwargs):
    ours, torchs = classes(len(shape))
    ours = ours(shape[1], virtual_batch_size=size, device=device, dtype=dtype, **kwargs)
    for p in ours.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    torchs = torchs(shape[1], device=device, **kwargs).double()
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def step(call, module, x, dy):
    leaf = x.detach().clone().requires_grad_()
    y = call(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)]


@pytest.mark.sanitize
@dtypes
@layouts
def test_values_gradients_and_statistics(device, dtype, layout):
    for shape in SHAPES[2:4] + SHAPES[-1:] if ops.SIMULATED else SHAPES:
        x, dy = (layout(shape, dtype=dtype, device=device) for _ in range(2))
        for momentum in (0.3,) if ops.SIMULATED else (0.3, None):
            ours, torchs = modules(shape, device, dtype, momentum=momentum)
            found = step(ours, ours, x, dy)
            expected = step(lambda t, m=torchs: torch.cat([m(c) for c in chunks(t)]), torchs, x.double(), dy.double())
            found += [b for b in ours.buffers() if b.is_floating_point()]
            expected += [b for b in torchs.buffers() if b.is_floating_point()]
            ulps = {torch.float64: 400}.get(dtype, 16) * torch.finfo(dtype).eps
            for ours_is, right in zip(found, expected, strict=True):
                assert ours_is.dtype == dtype
                torch.testing.assert_close(ours_is.double(), right, rtol=ulps, atol=ulps * right.abs().max().item())
            assert ours.num_batches_tracked == torchs.num_batches_tracked == len(chunks(x))
            assert found[0].stride() == fastbn.functional.batch_norm(x, None, None, training=True).stride()


def test_the_same_bits_as_fastbns_own_batch_norm_on_chunks(device, threads):
    """And whatever the number of threads: chunks side by side, or one after the other."""
    x, dy = torch.randn(70, 300, device=device), torch.randn(70, 300, device=device)
    ours, _ = modules((70, 300), device, size=8)
    results = []
    for n in (1, 2, 16):  # 9 chunks
        threads(n)
        results.append(step(ours, ours, x, dy)[:2])
    plain = fastbn.BatchNorm1d(300, device=device)
    plain.load_state_dict(ours.state_dict())
    results.append(step(lambda t: torch.cat([plain(c) for c in chunks(t, 8)]), plain, x, dy)[:2])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_only_what_is_asked_is_computed(device, affine):
    ours, torchs = modules((10, 6), device, affine=affine, track_running_stats=False)
    x, dy = torch.randn(10, 6, device=device), torch.randn(10, 6, device=device)
    y = ours(x)
    assert y.requires_grad == affine
    if affine:
        y.backward(dy)
        torch.cat([torchs(c) for c in chunks(x.double())]).backward(dy.double())
        torch.testing.assert_close(ours.weight.grad.double(), torchs.weight.grad, rtol=1e-5, atol=1e-5)
    ours.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(ours(leaf), leaf, dy)
    twin = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.cat([torchs(c) for c in chunks(twin)]), twin, dy.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("weights", [True, False])
def test_first_and_second_derivatives(weights):
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    arguments = [x, *(torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2 * weights))]

    def f(x, weight=None, bias=None):
        return ghost_batch_norm(x, 3, None, None, weight, bias, True)

    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_other_transformations_are_right_or_refused():
    x = torch.randn(2, 8, 3)

    def f(x):
        return ghost_batch_norm(x, 4, None, None, training=True)

    torch.testing.assert_close(torch.func.vmap(f)(x), torch.stack([f(x[0]), f(x[1])]))
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.func.jvp(f, (x[0],), (x[1],))
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="running_var, which will be updated in place, were not batched"):
        torch.func.vmap(lambda x: ghost_batch_norm(x, 4, mean, var, training=True))(x)
    means, variances = torch.zeros(2, 3), torch.ones(2, 3)
    torch.func.vmap(lambda x, m, v: ghost_batch_norm(x, 4, m, v, training=True))(x, means, variances)
    ghost_batch_norm(x[1], 4, mean, var, training=True)
    assert torch.equal(means[1], mean) and torch.equal(variances[1], var) and not torch.equal(means[0], mean)


def test_eval_is_batch_norm(device):
    ours, _ = modules((9, 6), device)
    ours(torch.randn(9, 6, device=device))
    plain = fastbn.BatchNorm1d(6, device=device).eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(9, 6, device=device)
    assert torch.equal(ours.eval()(x), plain(x)) and ours.num_batches_tracked == 2


@pytest.mark.cpu
def test_nothing_in_the_batch():
    ours = fastbn.GhostBatchNorm1d(3, virtual_batch_size=4)
    y = ours(torch.empty(0, 3, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 3) and ours.num_batches_tracked == 1 and torch.equal(ours.weight.grad, torch.zeros(3))
    assert torch.equal(ours.running_mean, torch.zeros(3))


@pytest.mark.cpu
def test_bad_arguments():
    make = fastbn.GhostBatchNorm1d
    with pytest.raises(TypeError, match="virtual_batch_size"):
        make(3)
    with pytest.raises(TypeError, match="virtual_batch_size should be an int, not float"):
        make(3, virtual_batch_size=2.0)
    with pytest.raises(ValueError, match="virtual_batch_size should be positive, not 0"):
        make(3, virtual_batch_size=0)
    with pytest.raises(ValueError, match="virtual_batch_size 1 leaves one value per channel"):
        make(3, virtual_batch_size=1)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        make(3, virtual_batch_size=8)(torch.randn(1, 3))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        make(3, virtual_batch_size=8)(torch.randn(3))
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 4"):
        ghost_batch_norm(torch.randn(4, 3), 2, None, None, torch.ones(4), training=True)
    with pytest.raises(TypeError, match="momentum"):
        ghost_batch_norm(torch.randn(4, 3), 2, None, None, training=True, momentum=None)
    x, moments = torch.randn(4, 3), torch.ones(2, 2, 3).double()
    backward = torch.ops.fastbn.ghost_backward
    with pytest.raises(RuntimeError, match=r"moments should have sizes \[3, 2, 3\]"):
        backward(x, x, None, moments, 1, 1e-5, [True] * 3)  # the fourth of one value joins the third
    with pytest.raises(RuntimeError, match="grad_output should have the sizes of input"):
        backward(x[:2], x, None, moments, 2, 1e-5, [True] * 3)
    with pytest.raises(ValueError, match="virtual_batch_size should be positive, not -1"):
        torch.ops.fastbn.ghost_forward(x, None, None, -1, 1e-5)


@pytest.mark.cpu
def test_which_calls_are_one_call_of_the_extension():
    x, stats = torch.randn(8, 3), (torch.zeros(3), torch.ones(3))
    common = {"momentum": 0.1, "eps": 1e-5, "virtual_batch_size": 4}
    for size in (4, 2**63 - 1):
        y = _C.ghost_batch_norm(x, None, None, *stats, None, **{**common, "virtual_batch_size": size})
        torch.testing.assert_close(y, ghost_batch_norm(x, size, None, None, training=True))
    assert not torch.equal(stats[0], torch.zeros(3))
    assert ghost_batch_norm(x.clone().requires_grad_(), 4, *stats, training=True).grad_fn.name().startswith("FastGhost")
    before = [t.clone() for t in stats]
    with pytest.raises(ValueError, match="one value per channel in a chunk"):
        _C.ghost_batch_norm(x, None, None, *stats, None, **{**common, "virtual_batch_size": 1})
    for change in ({"virtual_batch_size": 0}, {"eps": -1.0}):
        assert _C.ghost_batch_norm(x, None, None, *stats, None, **{**common, **change}) is NotImplemented
    for odd in (x.to("meta"), x[:0], x.numpy(), x.long(), x[0]):
        assert _C.ghost_batch_norm(odd, None, None, *stats, None, **common) is NotImplemented
    assert all(torch.equal(a, b) for a, b in zip(before, stats, strict=True))


def by_operators(x, weight, bias, mean, var, counter, momentum, eps, size):
    output, moments = torch.ops.fastbn.ghost_forward(x, weight, bias, size, eps)
    positions = x.numel() // x.size(1) // x.size(0)
    ops.ghost_update(moments, x.size(0), positions, size, momentum, mean, var, counter)
    return output


@pytest.mark.cpu
@pytest.mark.parametrize("momentum", [0.3, 0.0, 1.0, None])
@pytest.mark.parametrize("call", [_C.ghost_batch_norm, by_operators], ids=["short", "operators"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_statistics_and_counter_of_both_ways(dtype, call, momentum):
    """Statistics that are not contiguous, and in the second round not new, either."""
    _, torchs = modules((9, 6, 2), "cpu", momentum=momentum)
    mean, var = (torch.stack([t, t], 1).to(dtype)[:, 0] for t in (torch.zeros(6), torch.ones(6)))
    counter = torch.tensor(0)
    for _ in range(2):
        x = torch.randn(9, 6, 2).to(dtype)  # chunks of 4, 4 and 1 samples
        for chunk in chunks(x.double()):
            torchs(chunk)
        call(x, None, None, mean, var, counter, momentum, 1e-5, V)
        ulps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(mean.double(), torchs.running_mean, rtol=ulps, atol=ulps)
        torch.testing.assert_close(var.double(), torchs.running_var, rtol=ulps, atol=ulps)
    assert counter == torchs.num_batches_tracked == 6


@pytest.mark.cpu
def test_bad_updates():
    update, moments = torch.ops.fastbn.ghost_update, torch.ones(2, 2, 3).double()
    mean, var = torch.zeros(3), torch.ones(3)
    for change, message in (
        ({"moments": moments[0]}, r"moments should have sizes \[chunks, 2, C\]"),
        ({"moments": moments.float()}, "moments should be float64"),
        ({"positions": 0}, "a chunk should have at least 2 values in a channel, not 0"),
        ({"samples": 3, "virtual_batch_size": 1}, "at least 2 values in a channel, not 1"),
        ({"samples": 10}, r"moments should have sizes \[3, 2, 3\], not \[2, 2, 3\]"),
        ({"samples": -1}, "samples and positions should not be negative"),
        ({"samples": 2**62, "positions": 4}, "samples and positions are too large"),
        ({"virtual_batch_size": 0}, "virtual_batch_size should be positive, not 0"),
        ({"running_mean": None}, "must either both be None or neither"),
        ({"running_mean": mean[:2]}, "running_mean should contain 3 elements not 2"),
    ):
        sizes = {"samples": 7, "positions": 1, "virtual_batch_size": 4}
        good = {"moments": moments, **sizes, "running_mean": mean, "running_var": var}
        with pytest.raises((RuntimeError, ValueError), match=message):
            update(**{"momentum": 0.1, "num_batches_tracked": None, **good, **change})
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


@pytest.mark.cpu
def test_repr_state_and_tools_around_it():
    ours = fastbn.GhostBatchNorm2d(3, virtual_batch_size=4, momentum=None)
    assert "virtual_batch_size=4" in repr(ours) and "momentum=None" in repr(ours)
    nn.BatchNorm2d(3).load_state_dict(ours.state_dict())
    assert fastbn.convert(ours) is ours and type(fastbn.revert(ours)) is fastbn.GhostBatchNorm2d
    x = torch.randn(9, 3, 2, 2)
    traced = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(ours)))
    torch.testing.assert_close(traced(x), ours(x))
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.fastbn.ghost_forward, (leaf, torch.ones(3), None, 4, 1e-5))
    arguments = (x, x, torch.ones(3), torch.ones(3, 2, 3).double(), 4, 1e-5, [True] * 3)
    torch.library.opcheck(torch.ops.fastbn.ghost_backward, arguments)
    statistics = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    torch.library.opcheck(torch.ops.fastbn.ghost_update, (torch.ones(3, 2, 3).double(), 9, 4, 4, 0.1, *statistics))


@pytest.mark.cpu
def test_compile():
    torch._dynamo.reset()
    ours, _ = modules((10, 6), "cpu")
    twin = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (10, 14, 9):
        x, dy = torch.randn(n, 6), torch.randn(n, 6)
        found, expected = step(compiled, ours, x, dy), step(twin, twin, x, dy)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours.state_dict(), twin.state_dict())
    torch._dynamo.reset()
