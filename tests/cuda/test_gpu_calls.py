"""What a call does on a GPU: every kind of plan, launches, synchronization, memory, determinism, compilers."""

import copy

import pytest
import torch
from on_gpu import KINDS, SMALL, assert_same_bits, kinds, layouts, problem, step, training
from reference import check
from torch.profiler import ProfilerActivity, profile

import fastbn
from fastbn import _C
from fastbn.functional import batch_norm

pytestmark = pytest.mark.cuda


def kernels(call, repeats=3):
    """Names of the kernels that one call launches, once it is warm."""
    call(), call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) % repeats == 0, names
    return names[: len(names) // repeats]


@kinds
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_plan(shape, layout, dtype):
    x = layout(shape, dtype=dtype, device="cuda")
    check(x, param_dtype=torch.float32)
    check(x, param_dtype=torch.float32, training=False)


def test_the_kinds_reach_both_strategies():
    plans = [fastbn.explain(torch.empty(shape, device="cuda")) for shape in KINDS.values()]
    plans.append(fastbn.explain(torch.empty(9, device="cuda")[1:].view(4, 2)))  # misaligned
    assert {s for p in plans for s in p.strategy} == {"resident", "streaming"}
    assert {p.batch_splits[0] > 1 for p in plans} == {True, False}


@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (64, 128), (2, 64, 28, 28), (32, 4, 33, 33)], ids=str)
@layouts
def test_one_launch_a_pass_below_a_megabyte(shape, layout):
    x, dy, weight, bias = problem(shape, layout)
    assert x.nbytes < 2**20 and x.data_ptr() % 16 == 0
    mean, var = torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    for train in (True, False):
        launched = kernels(lambda train=train: batch_norm(x, mean, var, weight, bias, train))
        assert len(launched) == 1, launched
        y = batch_norm(leaves[0], mean, var, *leaves[1:], train)
        launched = kernels(lambda y=y: torch.autograd.grad(y, leaves, dy, retain_graph=True))
        assert len(launched) == 1, launched


def test_launches_of_a_module():
    """The kernel counts the batch too."""
    bn, x = fastbn.BatchNorm2d(16).cuda(), torch.randn(8, 16, 14, 14, device="cuda")
    with torch.no_grad():
        assert len(kernels(lambda: bn(x))) == 1
        bn.eval()
        assert len(kernels(lambda: bn(x))) == 1


@pytest.fixture
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@kinds
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"affine": False}, {"dtype": torch.float64}], ids=str)
def test_nothing_waits_for_the_gpu(shape, kwargs, no_synchronization):
    bn = fastbn.BatchNorm2d(shape[1], device="cuda", **kwargs) if len(shape) == 4 else None
    bn = fastbn.BatchNorm1d(shape[1], device="cuda", **kwargs) if bn is None else bn
    x = torch.randn(shape, device="cuda", dtype=kwargs.get("dtype"), requires_grad=True)
    bn(x).square().sum().backward()
    bn.eval()(x).square().sum().backward()
    torch.func.grad(lambda t: batch_norm(t, None, None, training=True).pow(3).sum())(x.detach())


@kinds
@layouts
def test_memory_at_the_peak(shape, layout):
    """The output, what is saved for backward, and a workspace of a hundredth of the activation or 2 MB."""
    x, dy, weight, bias = problem(shape, layout)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    allowed = x.nbytes // 100 + 2**21 + _C.cuda_device(x)["multiprocessors"] * 2**14
    torch.autograd.grad(batch_norm(leaves[0], None, None, *leaves[1:], True), leaves, dy)  # makes the counters
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    y = batch_norm(leaves[0], None, None, *leaves[1:], True)
    assert torch.cuda.max_memory_allocated() - start <= y.nbytes + allowed
    held = torch.cuda.memory_allocated() - start
    assert held <= y.nbytes + 2**20, "moments, and nothing of the size of the input"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(y, leaves, dy)
    assert torch.cuda.max_memory_allocated() - before <= grads[0].nbytes + allowed


@kinds
@layouts
def test_the_same_bits_a_hundred_times(shape, layout):
    x, dy, weight, bias = problem(shape, layout, torch.bfloat16)
    expected = step(x, dy, weight, bias)
    for _ in range(100):
        assert_same_bits(step(x, dy, weight, bias), expected, "in another run")


def test_deterministic_algorithms_are_the_only_ones():
    x, dy, weight, bias = problem(KINDS["groups"])
    expected = step(x, dy, weight, bias)
    torch.use_deterministic_algorithms(True)
    try:
        found = step(x, dy, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(found, expected, "with deterministic algorithms asked for")


def test_bits_do_not_depend_on_the_address():
    """Of an aligned tensor: misaligned ones take another access pattern."""
    x, dy, weight, bias = problem(KINDS["groups"])
    expected = step(x, dy, weight, bias)
    for shift in (4, 8, 64):
        moved = torch.empty(x.numel() + shift, device="cuda")[shift:].view(x.shape).copy_(x)
        assert_same_bits(step(moved, dy, weight, bias), expected, f"{shift} floats further")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(1)
    torchs = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).cuda()
    ours = fastbn.convert(copy.deepcopy(torchs))
    x = torch.randn(SMALL, device="cuda")
    results = []
    for model in (ours, torchs):
        with torch.autocast("cuda", dtype=dtype):
            y = model(x)
        y.float().square().mean().backward()
        results.append((y, model[1].weight.grad, model[1].running_var))
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}], ids=str)
@training
def test_compile(compiler, kwargs, training):
    torch._dynamo.reset()
    torchs = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.BatchNorm2d(8, **kwargs), torch.nn.ReLU())
    torchs = torchs.cuda().train(training)
    ours = fastbn.convert(copy.deepcopy(torchs))
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for _ in range(3):
        x, grads = torch.randn(SMALL, device="cuda"), []
        for model in (compiled, torchs):
            leaf = x.clone().requires_grad_()
            model(leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_opcheck():
    x, weight, bias = torch.randn(4, 3, 5, 2, device="cuda"), *torch.rand(2, 3, device="cuda")
    moments = torch.ones(2, 3, dtype=torch.float64, device="cuda")
    for given in (None, moments):
        torch.library.opcheck(torch.ops.fastbn.forward, (x.requires_grad_(), weight, bias, given, 1e-5))
    arguments = (torch.randn_like(x), x.detach(), weight, moments, 1e-5, True, [True] * 4)
    torch.library.opcheck(torch.ops.fastbn.backward, arguments)
    stats = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    for momentum, counter in ((0.1, None), (None, torch.tensor(3, device="cuda"))):
        torch.library.opcheck(torch.ops.fastbn.update_running_stats, (moments, 40, momentum, *stats, counter))


def test_one_call_of_the_extension_does_it_all():
    """The fast path: no operator is dispatched, and the counter, statistics and gradients are right."""
    bn, torchs = fastbn.BatchNorm2d(6).cuda(), torch.nn.BatchNorm2d(6).cuda()
    x = torch.randn(SMALL, device="cuda")
    arguments = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked, True, 0.1, 1e-5)
    assert _C.batch_norm(x, *arguments) is not NotImplemented
    torchs(x)
    torch.testing.assert_close(bn.state_dict(), torchs.state_dict())
    with torch.autocast("cuda"), torch.no_grad():
        assert _C.batch_norm(x, *arguments) is not NotImplemented


def test_no_room_is_an_error_and_nothing_else():
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_norm(torch.ones(1, device="cuda").expand(free // 4, 6), None, None, training=True)
    check(torch.randn(SMALL, device="cuda"))
