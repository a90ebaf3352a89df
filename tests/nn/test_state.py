"""State beside a torch.nn module: buffers, counter, momentum, state_dict, copies, hooks, conversions, threads, repr."""

import copy
import io
import pickle
import threading

import pytest
import torch
from reference import needs_bias

import fastbn

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SHAPES = {"BatchNorm1d": (4, 3, 5), "BatchNorm2d": (4, 3, 5, 2), "BatchNorm3d": (4, 3, 2, 2, 3)}
names = pytest.mark.parametrize("name", NAMES)
OPTIONS = [
    {}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.7, "eps": 1e-3},
    {"affine": False, "track_running_stats": False}, {"dtype": torch.float64},
    pytest.param({"bias": False}, marks=needs_bias),
]  # fmt: skip
options = pytest.mark.parametrize("kwargs", OPTIONS, ids=str)


def pair(name="BatchNorm2d", *args, **kwargs):
    args = args or (3,)
    return getattr(fastbn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)


def assert_same_state(ours, torchs):
    ours, torchs = ours.state_dict(), torchs.state_dict()
    assert list(ours) == list(torchs)
    for key, value in torchs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
        torch.testing.assert_close(ours[key], value, equal_nan=True)


@pytest.mark.simt_quick
@names
@options
def test_a_training_run_keeps_torchs_state(device, name, kwargs):
    ours, torchs = pair(name, device=device, **kwargs)
    assert repr(ours) == repr(torchs)
    assert type(ours).__mro__.index(getattr(torch.nn, name)) > 0 and isinstance(ours, getattr(torch.nn, name))
    assert_same_state(ours, torchs)
    for step in range(4):
        for module in (ours, torchs):
            module.train(step != 2)
        x = (torch.randn(SHAPES[name], device=device) * 3 + step).to(kwargs.get("dtype", torch.float32))
        torch.testing.assert_close(ours(x), torchs(x))
        assert_same_state(ours, torchs)
    for module in (ours, torchs):
        module.reset_running_stats()
    assert_same_state(ours, torchs)
    for module in (ours, torchs):
        module.reset_parameters()
    assert_same_state(ours, torchs)


@pytest.mark.sanitize
def test_the_counter_and_the_buffers_are_updated_in_place(device):
    bn = fastbn.BatchNorm2d(3, device=device)
    buffers = {name: (buffer, buffer.data_ptr()) for name, buffer in bn.named_buffers()}
    bn(torch.randn(4, 3, 5, 5, device=device))
    for name, buffer in bn.named_buffers():
        assert buffer is buffers[name][0] and buffer.data_ptr() == buffers[name][1]
    assert bn.num_batches_tracked.dtype == torch.int64 and bn.num_batches_tracked.dim() == 0
    assert bn.num_batches_tracked == 1


@pytest.mark.simt_quick
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, -1.0, 2.0, 0.1])
@pytest.mark.parametrize("counter", ["counter", "no counter"])
def test_momentum_with_and_without_a_counter(device, momentum, counter):
    ours, torchs = pair(momentum=momentum, device=device)
    for module in (ours, torchs):
        if counter == "no counter":
            module.num_batches_tracked = None
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5, device=device)
        torch.testing.assert_close(ours(x), torchs(x))
    assert_same_state(ours, torchs)


def test_cumulative_mean_is_the_mean_of_the_batches(device):
    bn = fastbn.BatchNorm1d(2, momentum=None, device=device)
    batches = [torch.randn(6, 2, device=device) for _ in range(5)]
    for x in batches:
        bn(x)
    torch.testing.assert_close(bn.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("start", [True, False], ids=["tracking", "not tracking"])
def test_track_running_stats_toggled_later(device, start, mode):
    ours, torchs = pair(track_running_stats=start, device=device)
    x = torch.randn(4, 3, 5, 5, device=device) * 2 + 1
    for module in (ours, torchs):
        module(x)
        module.track_running_stats = not start
        module.train(mode)
    torch.testing.assert_close(ours(x), torchs(x))
    assert_same_state(ours, torchs)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_buffer_set_to_none(device, missing, mode):
    from reference import assert_refused

    ours, torchs = pair(device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    for module in (ours, torchs):
        setattr(module, missing, None)
        module.train(mode)
    assert_refused(lambda: ours(x), lambda: torchs(x), "either both be None")


@names
@options
def test_state_dict_both_ways(device, name, kwargs):
    ours, torchs = pair(name, device=device, **kwargs)
    x = torch.randn(SHAPES[name], device=device).to(kwargs.get("dtype", torch.float32))
    ours(x), torchs(x * 2)
    fresh_ours, fresh_torchs = pair(name, device=device, **kwargs)
    fresh_ours.load_state_dict(torchs.state_dict())
    fresh_torchs.load_state_dict(ours.state_dict())
    assert_same_state(fresh_ours, torchs)
    assert_same_state(ours, fresh_torchs)
    assert ours.state_dict()._metadata == torchs.state_dict()._metadata


@pytest.mark.parametrize("version", [None, 1, 2])
def test_a_missing_counter_keeps_the_current_one(device, version):
    ours, torchs = pair(device=device)
    outcomes = []
    for module in (ours, torchs):
        state = module.state_dict()
        del state["num_batches_tracked"]
        state._metadata[""]["version"] = version
        module.num_batches_tracked.fill_(7)
        try:
            module.load_state_dict(state)
            outcomes.append(int(module.num_batches_tracked))
        except RuntimeError as error:
            outcomes.append("Missing key" in str(error))
    assert outcomes[0] == outcomes[1]


def test_wrong_keys_and_sizes_in_a_state_dict(device):
    from reference import assert_same_error

    ours, torchs = pair(device=device)
    for change in ({"extra": torch.zeros(1)}, {"weight": torch.zeros(4)}, {"running_mean": torch.zeros(2)}):
        state = {**torchs.state_dict(), **change}
        assert_same_error(lambda s=state: ours.load_state_dict(s), lambda s=state: torchs.load_state_dict(s))


@names
def test_deepcopy_pickle_and_save(device, name):
    bn = getattr(fastbn, name)(3, device=device)
    x = torch.randn(SHAPES[name], device=device)
    bn(x)
    buffer = io.BytesIO()
    torch.save(bn, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(bn),
        copy.copy(bn),
        pickle.loads(pickle.dumps(bn)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is type(bn)
        assert_same_state(twin, bn)
        assert torch.equal(twin.eval()(x), copy.deepcopy(bn).eval()(x))
    twins[0].train()(x)
    assert twins[0].num_batches_tracked == 2 and bn.num_batches_tracked == 1


def test_deepcopy_after_a_backward(device):
    bn = fastbn.BatchNorm2d(3, device=device)
    bn(torch.randn(4, 3, 5, 5, device=device)).sum().backward()
    twin = copy.deepcopy(bn)
    assert twin.weight.grad is None and bn.weight.grad is not None, "as in torch: copies have no gradients"
    twin(torch.randn(4, 3, 5, 5, device=device)).square().sum().backward()
    assert twin.weight.grad is not None and twin.weight.grad.data_ptr() != bn.weight.grad.data_ptr()


def test_hooks_of_every_kind(device):
    bn, calls = fastbn.BatchNorm2d(3, device=device), []
    bn.register_forward_pre_hook(lambda module, args: calls.append("pre") or (args[0] * 2,))
    bn.register_forward_hook(lambda module, args, output: calls.append("post") or output + 1)
    bn.register_full_backward_pre_hook(lambda module, grads: calls.append("backward pre"))
    bn.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    bn.weight.register_hook(lambda grad: calls.append("weight"))
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    y = bn(x)
    assert abs(float(y.detach().mean()) - 1) < 1e-5
    y.square().sum().backward()
    assert calls[:3] == ["pre", "post", "backward pre"]
    assert sorted(calls[3:]) == ["backward", "weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["to", "method"])
def test_conversion_of_the_module(device, dtype, how):
    method = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    ours, torchs = pair(device=device)
    for module in (ours, torchs):
        module.to(dtype) if how == "to" else getattr(module, method)()
    assert ours.num_batches_tracked.dtype == torch.int64 and ours.running_mean.dtype == dtype
    x = torch.randn(4, 3, 5, 5, device=device).to(dtype)
    y, torch_y = ours(x), torchs(x)
    assert y.dtype == torch_y.dtype == dtype
    torch.testing.assert_close(y, torch_y, rtol=2e-2, atol=2e-2)
    assert ours.num_batches_tracked.dtype == torch.int64 and ours.num_batches_tracked == 1


def test_float32_module_on_half_input(device):
    """The usual mixed precision: float32 parameters and statistics, a half activation."""
    for dtype in (torch.float16, torch.bfloat16):
        ours, torchs = pair(device=device)
        x = torch.randn(4, 3, 5, 5, device=device).to(dtype)
        y = ours(x)
        assert y.dtype == dtype == torchs(x).dtype
        y.float().square().sum().backward()
        assert ours.weight.grad.dtype == torch.float32
        torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize("workers", [4])
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}], ids=str)
def test_the_counter_is_exact_under_threads(device, workers, kwargs):
    bn, repeats = fastbn.BatchNorm2d(3, device=device, **kwargs), 200
    x = torch.randn(2, 3, 4, 4, device=device)
    start = threading.Barrier(workers)

    def work():
        start.wait()
        for _ in range(repeats):
            bn(x)

    pool = [threading.Thread(target=work) for _ in range(workers)]
    [t.start() for t in pool]
    [t.join() for t in pool]
    assert bn.num_batches_tracked == workers * repeats
    assert torch.isfinite(bn.running_mean).all()


def test_threads_get_the_same_results(device):
    x = torch.randn(8, 16, 9, 9, device=device)
    dy = torch.randn_like(x)

    def step():
        leaf = x.clone().requires_grad_()
        y = fastbn.functional.batch_norm(leaf, None, None, None, None, True)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)

    expected, failures = step(), []

    def work():
        for _ in range(30):
            failures.extend(1 for a, b in zip(step(), expected, strict=True) if not torch.equal(a, b))

    pool = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in pool]
    [t.join() for t in pool]
    assert not failures


def test_checkpointing_agrees_with_torch(device):
    """Values and gradients; both count the recomputed forward (pt#96136), as docs/training.md says."""
    from torch.utils.checkpoint import checkpoint

    ours, torchs = pair(device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    grads = []
    for module in (ours, torchs):
        leaf = x.clone().requires_grad_()
        checkpoint(module, leaf, use_reentrant=False).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@names
def test_train_and_eval_against_torch_after_loading(device, name):
    ours, torchs = pair(name, device=device)
    torchs(torch.randn(SHAPES[name], device=device) * 4 - 2)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(SHAPES[name], device=device)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    torch.testing.assert_close(ours.train()(x), torchs.train()(x))
