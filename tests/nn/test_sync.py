"""Synchronized batch norm in 2, 3 and 4 processes against float64 batch norm of the whole batch.
In: a batch, cut into the parts of the ranks. Out: the values, statistics and gradients of each part."""

import copy

import pytest
import torch
import torch.distributed as dist
from inputs import LAYOUTS, channels_last, contiguous
from sync import (
    ADD,
    ADD_GELU,
    ADD_RELU,
    EMPTY,
    EVEN,
    LEAKY,
    ONE_EACH,
    PLAIN,
    RELU,
    TOLERANCE,
    UNEVEN,
    C,
    Collectives,
    assert_near,
    expected,
    module_for,
    whole_batch,
)
from torch.nn import functional as F

import fastbn


def check_training(counts, shape, layout, dtype, param_dtype, epilogue, affine=True):
    """One step, in the ranks that have counts."""
    activation, param, adds = epilogue
    rank, momentum = dist.get_rank(), 0.25
    x, r, dy = whole_batch((sum(counts), C, *shape), LAYOUTS[layout], dtype)
    module = module_for(activation, param, param_dtype, affine, momentum=momentum)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 2, C))
            module.bias.copy_(torch.linspace(1, -1, C))
    parts, residuals, grads = (t.split(counts) for t in (x, r, dy))
    residuals = residuals if adds else [None] * len(counts)
    ys, dxs, drs, dps, (mean, var) = expected(
        parts, residuals, grads, (module.weight, module.bias), activation,
        None if activation is None else fastbn.activations.check(activation, param), module.eps,
    )  # fmt: skip
    own = parts[rank].detach().requires_grad_()
    residual = None if residuals[rank] is None else residuals[rank].detach().requires_grad_()
    output = module(own) if residual is None else module(own, residual)
    like = copy.deepcopy(module).eval()(*((own,) if residual is None else (own, residual)))
    assert output.dtype == dtype and (own.numel() == 0 or output.stride() == like.stride())
    output.backward(grads[rank])
    assert_near(output, ys[rank].detach(), "output")
    gain = torch.rsqrt(var.min() + module.eps).item() * (2 if affine else 1)
    assert_near(own.grad, dxs[rank], "grad_input", least=gain * dy.abs().max().item())
    if residual is not None:
        assert_near(residual.grad, drs[rank], "grad_residual")
    sums = max(param_dtype, dtype, key=TOLERANCE.get)
    for name, right in zip(("weight", "bias"), dps[rank], strict=True):
        if affine:
            assert_near(getattr(module, name).grad, right, f"grad of {name}", sums)
            assert getattr(module, name).grad.dtype == param_dtype
    n = x.numel() // C
    assert_near(module.running_mean, momentum * mean, "running_mean", param_dtype)
    assert_near(module.running_var, 1 - momentum + momentum * var * n / (n - 1), "running_var", param_dtype)
    assert module.num_batches_tracked == 1


POSITIONS = {"(N, C)": (), "(N, C, L)": (9,), "2d": (6, 5), "large maps": (40, 30), "3d": (3, 4, 2)}
CASES = [
    (EVEN, "2d", "contiguous", torch.float32, PLAIN), (UNEVEN, "2d", "channels_last", torch.float32, PLAIN),
    (EMPTY, "2d", "contiguous", torch.float32, ADD_RELU), (ONE_EACH, "(N, C)", "contiguous", torch.float32, PLAIN),
    (ONE_EACH, "(N, C)", "contiguous", torch.float64, LEAKY), (UNEVEN, "(N, C, L)", "contiguous", torch.float64, ADD),
    (UNEVEN, "3d", "channels_last", torch.float64, ADD_GELU), (EMPTY, "2d", "channels_last", torch.bfloat16, RELU),
    (UNEVEN, "2d", "contiguous", torch.float16, ADD_RELU), (EVEN, "large maps", "contiguous", torch.bfloat16, PLAIN),
    (UNEVEN, "large maps", "contiguous", torch.float32, ADD_RELU), (EVEN, "2d", "sliced", torch.float32, RELU),
    (UNEVEN, "2d", "transposed", torch.float32, PLAIN), (UNEVEN, "2d", "cropped", torch.float64, ADD_RELU),
    (EVEN, "2d", "offset", torch.float32, LEAKY), (EMPTY, "(N, C)", "contiguous", torch.float64, PLAIN),
]  # fmt: skip
BY_NAME = {layout.__name__: i for i, layout in enumerate(LAYOUTS)}


@pytest.mark.simt_quick
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(part) for part in c[1:4]) + f"-{c[4][0]}-{c[0]}")
def test_training(pool, size, case):
    counts, shape, layout, dtype, epilogue = case
    ranks = pool(size)
    for param_dtype in {dtype, torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype}:
        ranks.run(check_training, counts[:size], POSITIONS[shape], BY_NAME[layout], dtype, param_dtype, epilogue)


def test_without_parameters(pool):
    pool(3).run(check_training, UNEVEN[:3], (4, 4), 0, torch.float64, torch.float64, PLAIN, False)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["identity", "relu", "elu", "gelu"])
@pytest.mark.parametrize("layout", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_thoroughly(pool, dtype, layout, activation):
    for counts in (UNEVEN, EMPTY):
        for adds in (False, True):
            pool(3).run(check_training, counts[:3], (7, 3), layout, dtype, dtype, (activation, None, adds))


def check_statistics():
    """Over several steps, with the momenta and modes that there are."""
    rank = dist.get_rank()
    for momentum in (0.1, None, 1.0, 0.0):
        module, right = fastbn.SyncBatchNorm(C, momentum=momentum), torch.nn.BatchNorm2d(C, momentum=momentum).double()
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(7, C, 3, 2) * (1 + step) + step
            module(x.tensor_split([2, 4])[rank])
            right(x.double())
        for name in ("running_mean", "running_var"):
            assert_near(getattr(module, name), getattr(right, name), f"{name} at momentum {momentum}")
        assert module.num_batches_tracked == 3
    module = fastbn.SyncBatchNorm(C, track_running_stats=False)
    right = torch.nn.BatchNorm2d(C, track_running_stats=False).double()
    assert_near(module(x.tensor_split([2, 4])[rank]), right(x.double()).tensor_split([2, 4])[rank].detach(), "output")
    # where the wide batch has a mean far from its spread, nothing is lost
    x = torch.randn(6, C, 2, 2, dtype=torch.float64).mul(0.5).add(1e4).float()
    output = fastbn.SyncBatchNorm(C)(x.split(2)[rank])
    error = (output.double() - torch.nn.BatchNorm2d(C).double()(x.double()).split(2)[rank]).abs().max()
    assert error < 5e-6, error


def test_running_statistics(pool):
    pool(3).run(check_statistics)


def test_moments_may_have_a_count(device):
    """What the ranks merged, with its counts: the output is that of the moments alone, and so is what is returned."""
    x = torch.randn(4, C, 6, 6, device=device)
    batch_stats = torch.cat([torch.rand(2, C, dtype=torch.float64), torch.full((1, C), 8.0, dtype=torch.float64)]).to(
        device
    )
    y, moments = fastbn.ops.forward(x, None, None, batch_stats, 1e-5)
    right, _ = fastbn.ops.forward(x, None, None, batch_stats[:2], 1e-5)
    assert torch.equal(y, right) and torch.equal(moments, batch_stats[:2])
    moments.zero_()
    assert batch_stats.all(), "it is not a view of what was given"
    with pytest.raises(RuntimeError, match=r"sizes \[3, 5\]"):
        fastbn.ops.forward(x, None, None, batch_stats[:, :4], 1e-5)


def check_parameters_only():
    """The gradients that remain where nobody wants that of the input."""
    for activation in (None, "tanh"):
        module = module_for(activation, None, torch.float64)
        x, r = torch.randn(3, C, 2, dtype=torch.float64), torch.randn(3, C, 2, dtype=torch.float64, requires_grad=True)
        residual = () if activation is None else (r,)
        right = torch.autograd.grad(
            module(x.requires_grad_(), *residual).sin().sum(), [*module.parameters(), *residual]
        )
        found = torch.autograd.grad(module(x.detach(), *residual).sin().sum(), [*module.parameters(), *residual])
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_parameters_alone(pool):
    pool(2).run(check_parameters_only)


def check_subgroups():
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module = fastbn.SyncBatchNorm(C, process_group=groups[rank // 2])
    torch.manual_seed(0)
    pairs = torch.randn(2, 4, C, 3, dtype=torch.float64)
    x = pairs[rank // 2].split([1, 3])[rank % 2].float()
    right = torch.nn.BatchNorm1d(C).double()(pairs[rank // 2]).split([1, 3])[rank % 2]
    assert_near(module(x), right.detach(), "output")
    stranger = fastbn.SyncBatchNorm(C, process_group=groups[1 - rank // 2])
    with pytest.raises(ValueError, match=f"rank {rank} is not in process_group"):
        stranger(x)
    stranger.eval()(x)
    alone = fastbn.SyncBatchNorm(C, process_group=[dist.new_group([i]) for i in range(4)][rank])
    with Collectives() as seen:
        torch.testing.assert_close(alone(x), torch.nn.BatchNorm1d(C)(x))
    assert not seen.names
    again = copy.deepcopy(torch.nn.Sequential(module, module))
    assert again[0] is again[1] is not module and again[0].process_group is module.process_group
    assert_near(again[0](x), right.detach(), "output")


def test_process_groups(pool):
    pool(4).run(check_subgroups)


@pytest.mark.cuda
def test_nccl_with_one_rank(pool):
    pool(1, backend="nccl").run(check_on_gpu)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_with_two_ranks(pool):
    pool(2, backend="nccl").run(check_on_gpu)


def check_on_gpu():
    """Through the collectives even in a group of one, where the module would do without."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), torch.device("cuda", dist.get_rank())
    counts = UNEVEN[1 : 1 + size]
    for layout in (contiguous, channels_last):
        for dtype in TOLERANCE:
            x, r, dy = whole_batch((sum(counts), C, 6, 5), layout, dtype)
            weight, bias = torch.linspace(-1, 2, C), torch.linspace(1, -1, C)
            ys, dxs, drs, dps, (mean, var) = expected(
                x.split(counts), r.split(counts), dy.split(counts), (weight, bias), "relu", None, 1e-5
            )
            wide = dtype if dtype == torch.float64 else torch.float32
            own, residual, w, b = (
                t.detach().to(device).requires_grad_()
                for t in (x.split(counts)[rank], r.split(counts)[rank], weight.to(wide), bias.to(wide))
            )
            stats = [torch.zeros(C, dtype=wide, device=device), torch.ones(C, dtype=wide, device=device)]
            counter = torch.tensor(0, device=device)
            output = fastbn.functional.sync.sync_batch_norm(
                own, w, b, *stats, counter, 0.25, 1e-5, dist.group.WORLD, "relu", None, residual
            )
            output.backward(dy.split(counts)[rank].to(device))
            n = x.numel() // C
            assert_near(output.cpu(), ys[rank].detach(), "output")
            assert_near(own.grad.cpu(), dxs[rank], "grad_input")
            assert_near(residual.grad.cpu(), drs[rank], "grad_residual")
            assert_near(w.grad.cpu(), dps[rank][0], "grad_weight", dtype)
            assert_near(b.grad.cpu(), dps[rank][1], "grad_bias", dtype)
            assert_near(stats[0].cpu(), 0.25 * mean, "running_mean")
            assert_near(stats[1].cpu(), 0.75 + 0.25 * var * n / (n - 1), "running_var")
            assert counter.item() == 1
    dead = F.relu(fastbn.SyncBatchNorm(C, device=device)(own.detach().float()))
    assert dead.isfinite().all()
