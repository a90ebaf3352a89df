"""Synchronized batch norm in 2, 3 and 4 processes against float64 batch norm of the whole batch.
In: a batch, cut into the parts of the ranks. Out: the values, statistics and gradients of each part."""

import contextlib
import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from inputs import LAYOUTS, channels_last, contiguous
from ranks import RankFailed, Ranks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn.activations import ACTIVATIONS

C = 5
# Relative to the largest right value: roundings of the type itself, and of float sums where it is float or half.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# Samples a rank.
EVEN, UNEVEN, EMPTY, ONE_EACH = (3, 3, 3, 3), (1, 4, 2, 7), (4, 0, 3, 0), (1, 1, 1, 1)


@pytest.fixture(scope="module")
def pool(request):
    made = {}

    def ranks_of(size, backend="gloo", **options):
        if (backend == "nccl") != (request.config.getoption("--backend") == "cuda"):
            pytest.skip("Gloo ranks are for CPU tensors, and NCCL's for GPUs")
        return made.setdefault((size, *options.items()), Ranks(size, backend, **options))

    yield ranks_of
    for ranks in made.values():
        ranks.close()


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within, of any kind."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        collective = function.namespace in ("c10d", "_c10d_functional")
        if collective and "wait" not in function.__name__:
            self.names.append(function.__name__)
        return function(*arguments, **(kwargs or {}))


def assert_near(found, right, what, dtype=None, least=1e-3):
    """least: the size of what is added up, where it may cancel."""
    dtype = dtype or found.dtype
    assert found.shape == right.shape, f"{what} has sizes {found.shape}, not {right.shape}"
    scale = right.abs().max().item() if right.numel() else 0
    error = (found.detach().double() - right).abs().max().item() if right.numel() else 0
    assert error <= TOLERANCE[dtype] * max(scale, least), f"{what} is off by {error}, at a scale of {scale}"


def module_for(activation, param, dtype, affine=True, channels=C, **arguments):
    if activation is None:
        return fastbn.SyncBatchNorm(channels, affine=affine, dtype=dtype, **arguments)
    return fastbn.SyncBatchNormAct(
        channels, affine=affine, dtype=dtype, activation=activation, activation_param=param, **arguments
    )


def whole_batch(shape, layout, dtype):
    """The same in every rank."""
    torch.manual_seed(7)
    return [(layout(shape, dtype=torch.float64) * 2 + shift).to(dtype) for shift in (3, 0, 1)]


def expected(parts, residuals, grads, params, activation, param, eps, penalty=None):
    """Outputs, gradients of each rank's input, residual, weight and bias, and the moments, in float64.

    Each rank has parameters of its own, equal in value, so that their gradients are those of its part.
    """
    xs = [x.detach().double().requires_grad_() for x in parts]
    rs = [None if r is None else r.detach().double().requires_grad_() for r in residuals]
    ps = [[None if p is None else p.detach().double().requires_grad_() for p in params] for _ in parts]
    whole = torch.cat(xs)
    axes = [i for i in range(whole.dim()) if i != 1]
    view = [1, -1] + [1] * (whole.dim() - 2)
    mean, var = whole.mean(axes), whole.var(axes, correction=0)
    ys = []
    for x, r, (w, b) in zip(xs, rs, ps, strict=True):
        z = (x - mean.view(view)) * torch.rsqrt(var + eps).view(view)
        z = z if w is None else z * w.view(view)
        z = z if b is None else z + b.view(view)
        z = z if r is None else z + r
        ys.append(z if activation is None else ACTIVATIONS[activation].forward(z, param))
    leaves = [t for t in (*xs, *rs, *(p for pair in ps for p in pair)) if t is not None]
    found = torch.autograd.grad(
        ys, leaves, [g.double() for g in grads], create_graph=penalty is not None, allow_unused=True
    )
    if penalty is not None:
        loss = sum(penalty(g) for g in found if g is not None)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    by_leaf = dict(zip(map(id, leaves), found, strict=True))
    pick = lambda ts: [None if t is None else by_leaf[id(t)] for t in ts]  # noqa: E731
    return ys, pick(xs), pick(rs), [pick(pair) for pair in ps], (mean.detach(), var.detach())


def check_training(counts, shape, layout, dtype, param_dtype, ending, affine=True):
    """One step, in the ranks that have counts."""
    activation, param, adds = ending
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


PLAIN, RELU, ADD_RELU = (None, None, False), ("relu", None, False), ("relu", None, True)
LEAKY, ADD_GELU, ADD = ("leaky_relu", 0.2, True), ("gelu", None, True), ("identity", None, True)
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
    counts, shape, layout, dtype, ending = case
    ranks = pool(size)
    for param_dtype in {dtype, torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype}:
        ranks.run(check_training, counts[:size], POSITIONS[shape], BY_NAME[layout], dtype, param_dtype, ending)


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


def check_collectives():
    module = fastbn.SyncBatchNormAct(C, activation="silu")
    x = torch.randn(4, C, 3, 3, requires_grad=True)
    with Collectives() as forward:
        output = module(x, x * 2)
    with Collectives() as backward:
        output.sum().backward()
    with Collectives() as parameters_only:
        module(x.detach()).sum().backward()
    module.eval()
    with Collectives() as evaluation:
        output = module(x)
        output.sum().backward()
    module.running_mean = module.running_var = None
    with Collectives() as without_statistics:  # of the batch at hand, as torch has it
        module(x)
    return [len(c.names) for c in (forward, backward, parameters_only, evaluation, without_statistics)]


def test_one_collective_a_pass(pool):
    assert pool(2).run(check_collectives) == [[1, 1, 1, 0, 0]] * 2


def test_moments_may_be_a_packet(device):
    """What the ranks merged, with its counts: the output is that of the moments alone, and so is what is returned."""
    x = torch.randn(4, C, 6, 6, device=device)
    packet = torch.cat([torch.rand(2, C, dtype=torch.float64), torch.full((1, C), 8.0, dtype=torch.float64)]).to(device)
    y, moments = fastbn.ops.forward(x, None, None, packet, 1e-5)
    right, _ = fastbn.ops.forward(x, None, None, packet[:2], 1e-5)
    assert torch.equal(y, right) and torch.equal(moments, packet[:2])
    moments.zero_()
    assert packet.all(), "it is not a view of what was given"
    with pytest.raises(RuntimeError, match=r"sizes \[2, 5\]"):
        fastbn.ops.forward(x, None, None, packet[:, :4], 1e-5)


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


def check_one_value_in_all():
    rank = dist.get_rank()
    module = fastbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1 if rank == 1 else 0, C))
    # nothing at all: an empty output, as in torch, and statistics as they were
    output = module(torch.randn(0, C, 3, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, C, 3) and module.weight.grad.eq(0).all()
    assert module.running_mean.eq(0).all() and module.running_var.eq(1).all()


@pytest.mark.cpu
def test_too_few_values(pool):
    pool(2).run(check_one_value_in_all)


def check_double_backward(activation, param, adds):
    rank, counts = dist.get_rank(), (2, 0, 3)
    x, r, dy = whole_batch((5, C, 3), contiguous, torch.float64)
    module = module_for(activation, param, torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, C))
    parts, residuals, grads = (t.split(counts) for t in (x, r, dy))
    residuals = residuals if adds else [None] * 3
    penalty = lambda g: (g**3).sum()  # noqa: E731
    _, dxs, drs, dps, _ = expected(
        parts, residuals, grads, (module.weight, module.bias), activation,
        None if activation is None else fastbn.activations.check(activation, param), module.eps, penalty,
    )  # fmt: skip
    own = parts[rank].clone().requires_grad_()
    residual = residuals[rank].clone().requires_grad_() if adds else None
    output = module(own, residual) if adds else module(own)
    leaves = [own, *module.parameters(), *([residual] if adds else [])]
    first = torch.autograd.grad(output, leaves, grads[rank], create_graph=True)
    second = torch.autograd.grad(sum(penalty(g) for g in first), leaves, allow_unused=True)
    for name, found, right in zip("xwbr", second, (dxs[rank], *dps[rank], drs[rank]), strict=False):
        if right is None or found is None:
            assert (found is None or not found.any()) and (right is None or not right.any()), name
        else:
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ending", [PLAIN, ("tanh", None, True), ("silu", None, False)], ids=str)
def test_double_backward(pool, ending):
    pool(3).run(check_double_backward, *ending)


def check_transformations():
    """What has no rule says so."""
    module = fastbn.SyncBatchNorm(C, track_running_stats=False)
    x = torch.randn(3, C)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward.mode|forward AD"):
        torch.func.jvp(module, (x,), (x,))
    with pytest.raises((RuntimeError, NotImplementedError), match="vmap|Batching"):
        torch.func.vmap(module)(torch.randn(2, 3, C))


def test_other_derivatives_are_refused(pool):
    pool(2).run(check_transformations)


def check_misuse():
    x, module = torch.randn(3, C), fastbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="at least 2D input"):
        module(torch.randn(C))
    with pytest.raises(RuntimeError, match="mixed dtype"):
        module(x.double())
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        module(torch.randn(3, 6))
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        module(x.long())
    with pytest.raises(RuntimeError, match="residual should have the shape"):
        fastbn.SyncBatchNormAct(C)(x, x[:2])
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        fastbn.SyncBatchNorm(0)(torch.randn(3, 0))
    with pytest.raises(ValueError, match="eps must be positive"):
        fastbn.SyncBatchNorm(C, eps=0)(x)


def test_wrong_arguments(pool):
    pool(2).run(check_misuse)


def check_compiled(backend):
    torch._dynamo.reset()
    rank = dist.get_rank()
    for activation, track in ((None, True), ("silu", True), (None, False)):
        module = module_for(activation, None, torch.float32, track_running_stats=track)
        other = copy.deepcopy(module)
        compiled = torch.compile(other, backend=backend, fullgraph=True)
        for samples in ((2, 3), (4, 1)):
            x = torch.randn(samples[rank], C, 4, 4)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            residual = () if activation is None else (torch.randn(x.shape),)
            module(a, *residual).sin().sum().backward()
            compiled(b, *residual).sin().sum().backward()
            torch.testing.assert_close(b.grad, a.grad)
        for ours, right in zip(other.buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(ours, right)
        for ours, right in zip(other.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, right.grad)


def test_compiled(pool):
    pool(2).run(check_compiled, "aot_eager")


@pytest.mark.slow
def test_compiled_by_inductor(pool):
    pool(2, timeout=120).run(check_compiled, "inductor")


def check_death():
    module = fastbn.SyncBatchNorm(C)
    x = torch.randn(3, C, requires_grad=True)
    module(x).sum().backward()
    output = module(x)
    if dist.get_rank() == 1:
        os._exit(3)
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        output.sum().backward()
    with pytest.raises(RuntimeError):
        module(x)
    return time.monotonic() - begun


@pytest.mark.cpu
def test_a_rank_that_dies_does_not_hang_the_others():
    ranks = Ranks(3, timeout=8)
    try:
        with pytest.raises(RankFailed) as caught:
            ranks.run(check_death)
    finally:
        ranks.close()
    assert str(caught.value) == "rank 1 of 3: ended with status 3", caught.value


def check_silence():
    """A rank that is there and does not take part."""
    if dist.get_rank() == 1:
        time.sleep(5)
        return None
    with contextlib.suppress(RuntimeError):
        fastbn.SyncBatchNorm(C)(torch.randn(3, C))
        raise AssertionError("the batch norm of one rank of two returned")
    return True


@pytest.mark.cpu
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_timeout():
    ranks = Ranks(2, timeout=3)
    try:
        assert ranks.run(check_silence) == [True, None]
    finally:
        ranks.close()


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
            output = fastbn.nn.sync.sync_batch_norm(
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
