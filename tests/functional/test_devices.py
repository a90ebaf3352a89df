"""Tensors on several devices in one call, devices without kernels, and what explain() shows for each device."""

import dataclasses

import pytest
import torch

import fastbn
from fastbn import _C, ops
from fastbn.functional import batch_norm

HAS_GPU = "cuda" in _C.build_info()["backends"] and torch.cuda.is_available()
GPUS = torch.cuda.device_count() if HAS_GPU else 0
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

# (device of the input, device of the odd one out)
MIXTURES = [
    ("cpu", "meta"),
    pytest.param("cpu", "cuda", marks=pytest.mark.cuda),
    pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
    pytest.param("cuda", "meta", marks=pytest.mark.cuda),
    pytest.param("cuda:0", "cuda:1", marks=[pytest.mark.cuda, needs_two]),
    pytest.param("cuda:1", "cuda:0", marks=[pytest.mark.cuda, needs_two]),
]
mixtures = pytest.mark.parametrize(("home", "away"), MIXTURES)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def arguments(device):
    def stats():
        return torch.zeros(3, device=device), torch.ones(3, device=device)

    mean, var = stats()
    bias, weight = stats()
    x = torch.randn(4, 3, 5, device=device)
    return {"input": x, "running_mean": mean, "running_var": var, "weight": weight, "bias": bias}


@mixtures
@training
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_tensor_elsewhere_is_named(home, away, name, training):
    call = arguments(home)
    call[name] = call[name].to(away)
    with pytest.raises(RuntimeError, match=f"{name} is on device {away}.*input is on device {home}"):
        batch_norm(**call, training=training)
    if call["running_mean"].device.type != "meta":
        assert not call["running_mean"].any(), "before anything was written"


@mixtures
def test_a_tensor_of_an_operator_elsewhere_is_named(home, away):
    """The operators check for themselves."""
    x, p = torch.randn(4, 3, 5, device=home), torch.ones(3, device=home)
    moments = torch.ones(2, 3, dtype=torch.float64, device=home)
    far = {name: t.to(away) for name, t in (("x", x), ("p", p), ("moments", moments))}
    mask = (True, True, True, True)
    calls = {
        "weight": lambda: ops.forward(x, far["p"], None, None, 1e-5),
        "bias": lambda: ops.forward(x, None, far["p"], None, 1e-5),
        "moments": lambda: ops.forward(x, None, None, far["moments"], 1e-5),
        "grad_output": lambda: ops.backward(far["x"], x, None, moments, 1e-5, True, mask),
        "running_mean": lambda: ops.update_running_stats(moments, 20, 0.1, far["p"], p, None),
        "running_var": lambda: ops.update_running_stats(moments, 20, 0.1, p, far["p"], None),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name} is on device {away}"):
            call()
    with pytest.raises(RuntimeError, match=f"weight is on device {away}"):
        ops.backward(x, x, far["p"], moments, 1e-5, True, mask)
    with pytest.raises(RuntimeError, match=f"moments is on device {away}"):
        ops.backward(x, x, None, far["moments"], 1e-5, True, mask)
    stats = torch.zeros(3, device=home), torch.ones(3, device=home)
    assert _C.batch_norm(x, far["p"], None, *stats, None, True, 0.1, 1e-5) is NotImplemented


def test_a_device_without_kernels_says_what_to_do(device):
    with pytest.raises(RuntimeError, match="input is on meta.*kernels for"):
        _C.check_device(torch.empty(4, 3, device="meta"))
    if "cuda" not in _C.build_info()["backends"]:
        with pytest.raises(RuntimeError, match="FASTBN_CUDA=1 pip install"):
            _C.check_device(torch.empty(4, 3, device="meta"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_fake_tensors_of_a_device_without_kernels(kind):
    """What a traced model for that device would meet; no such device is needed to see it."""
    if kind in _C.build_info()["backends"]:
        pytest.skip(f"this build has kernels for {kind}")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), pytest.raises(RuntimeError, match="fastbn: input is on"):
        x = torch.empty(4, 3, 5, device=kind)
        batch_norm(x, None, None, training=True)


def test_the_counter_may_be_elsewhere_only_where_it_can_be_read(device):
    """A counter on the CPU counts for every device: to read it costs no synchronization."""
    mean, var, counter = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(1)
    x = torch.randn(4, 3, 5, device=device)
    fastbn.autograd.batch_norm(x, None, None, mean, var, counter, True, None, 1e-5)
    assert counter == 2
    torch.testing.assert_close(mean, x.mean((0, 2)) / 2)


SHAPES = [(8, 6, 5, 5), (64, 40), (4, 3, 200, 200), (2, 64, 7, 7)]


@pytest.mark.simt_quick
@training
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_explain(device, shape, training):
    x = torch.randn(shape, device=device)
    for t in (x, x.bfloat16(), x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.double()):
        plan = fastbn.explain(t, training=training)
        names = [f.name for f in dataclasses.fields(plan)]
        lines = str(plan).splitlines()
        assert [line.split()[0] for line in lines] == names
        size = t.numel() * t.element_size()
        if isinstance(plan, fastbn.CudaPlan):
            assert plan.least_bytes == (2 * size, 3 * size)
            assert all(b >= a for b, a in zip(plan.bytes, plan.least_bytes, strict=True))
            assert training or plan.bytes == plan.least_bytes
        else:
            assert plan.least_forward_bytes == 2 * size <= plan.forward_bytes
            assert plan.least_backward_bytes == 3 * size <= plan.backward_bytes


def test_explain_knows_the_gpu_from_the_cpu(device, backend):
    plan = fastbn.explain(torch.randn(4, 3, 5, 5, device=device))
    assert isinstance(plan, fastbn.Plan if backend.name == "cpu" else fastbn.CudaPlan)
    assert plan.device == str(torch.empty(0, device=device).device)


def test_explain_refuses_what_batch_norm_would():
    for bad, error in (([1.0], TypeError), (torch.ones(4, 3).long(), NotImplementedError), (torch.ones(3), IndexError)):
        with pytest.raises(error):
            fastbn.explain(bad)


@pytest.mark.simt
@pytest.mark.simt_quick
@training
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_move_the_bytes_of_their_plan(shape, training):
    """Counted by the emulator: what passes beside the activations is parameters and partial sums."""
    x, weight = torch.randn(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    plan = fastbn.explain(x, training=training)
    _C.simt.take_stats()
    y = batch_norm(x, mean, var, weight, training=training)
    forward = _C.simt.take_stats()
    y.backward(torch.randn(shape))
    backward = _C.simt.take_stats()
    for stats, planned, strategy in zip((forward, backward), plan.bytes, plan.strategy, strict=True):
        moved = stats["bytes_read"] + stats["bytes_written"]
        beside = 200 * shape[1] + 64 * stats["blocks"]
        # a vector that two rows share is read for both of them
        assert planned <= moved <= 1.3 * planned + beside, (planned, stats)
        assert stats["launches"] == (1 if strategy == "resident" or not training else 2)


@pytest.mark.simt
@pytest.mark.simt_quick
def test_a_plan_queries_the_device_once():
    """How many blocks of its kernel are resident. Plans are cached, for each pass."""
    x = torch.randn(3, 2, 53, 59, requires_grad=True)
    assert fastbn.explain(x).strategy == ("resident", "resident")
    queries = []
    for _ in range(2):
        _C.simt.take_stats()
        batch_norm(x, None, None, training=True).sum().backward()
        queries.append(_C.simt.take_stats()["queries"])
    assert queries[0] >= 2 and queries[1] == 0, queries


@pytest.mark.simt
def test_the_simulated_build_uses_no_other_kernels(backend):
    assert ops.SIMULATED
    _C.simt.take_stats()
    bn = fastbn.BatchNorm2d(3)
    bn(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    bn.eval()(torch.randn(2, 3, 4, 4))
    stats = _C.simt.take_stats()
    assert (stats["launches"], stats["translated"]) == (3, 3 if backend.name == "ptx" else 0)
