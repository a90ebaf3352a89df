"""Modules under autocast, fx, func, dispatch modes and conversions. (torch.compile: integration/test_compile.py.)"""

import copy

import pytest
import torch
from nets import assert_same_step, images, nets
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.overrides import TorchFunctionMode

import fastbn
from fastbn.functional import batch_norm

CLASSES = {
    fastbn.BatchNorm1d: nn.BatchNorm1d,
    fastbn.BatchNorm2d: nn.BatchNorm2d,
    fastbn.BatchNorm3d: nn.BatchNorm3d,
}
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    ours, torchs = nets()
    with torch.autocast("cpu", dtype=dtype):
        y, expected = ours(images(8)), torchs(images(8))
        direct = [model.bn2(torch.randn(2, 5, 4, 4).to(dtype)) for model in (ours, torchs)]
    assert y.dtype == expected.dtype and direct[0].dtype == direct[1].dtype == dtype
    y.float().sum().backward()
    assert ours.bn2.weight.grad.dtype == torch.float32
    x = images(8)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(ours(x), torchs(x), rtol=5e-2, atol=5e-2)


@training
def test_fx_symbolic_trace(training):
    """fx enters modules outside torch.nn, so forward has to be traceable, buffers and counter included."""
    ours, torchs = (model.train(training) for model in nets())
    traced = torch.fx.symbolic_trace(ours)
    traced.recompile()
    for _ in range(2):
        assert_same_step(traced, torchs, images())
    if training:
        assert traced.bn2.num_batches_tracked == 2
    assert_same_step(copy.deepcopy(traced), torchs, images())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_fx_traces_a_module_alone(cls):
    bn, x = cls(3), torch.randn((4, 3, 2, 2, 2)[: int(cls.__name__[-2]) + 2])
    traced = torch.fx.symbolic_trace(copy.deepcopy(bn))
    torch.testing.assert_close(traced(x), bn(x))
    torch.testing.assert_close(traced.state_dict(), bn.state_dict())


@training
def test_jit_trace(training):
    """Deprecated in torch, and still how many models are deployed."""
    ours, torchs = (model.train(training) for model in nets())
    before = copy.deepcopy(ours.state_dict())
    traced = torch.jit.trace(ours, images(), check_trace=False)
    ours.load_state_dict(before)
    x = images()
    torch.testing.assert_close(traced(x), torchs(x))


@training
def test_functional_call(training):
    ours, torchs = (model.train(training) for model in nets())
    x, results = images(), []
    for model in (ours, torchs):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        state["bn2.weight"] = state["bn2.weight"] * 3
        results.append((functional_call(model, state, (x,)), state))
        assert model.bn2.num_batches_tracked == 0
    torch.testing.assert_close(*results)


def test_vmap_in_eval():
    bn = fastbn.BatchNorm2d(3).eval()
    torch_bn = nn.BatchNorm2d(3).eval()
    x = torch.randn(5, 2, 3, 4, 4)
    torch.testing.assert_close(vmap(bn)(x), vmap(torch_bn)(x))
    for in_dims in (0, 1, 4):
        moved = x.movedim(0, in_dims)
        torch.testing.assert_close(vmap(bn, in_dims=in_dims)(moved), vmap(torch_bn, in_dims=in_dims)(moved))


def test_vmap_in_training_without_statistics():
    x, weight = torch.randn(5, 4, 3, 2), torch.randn(5, 3)
    results = [
        vmap(lambda x, w, f=function: f(x, None, None, w, None, True))(x, weight)
        for function in (batch_norm, nn.functional.batch_norm)
    ]
    torch.testing.assert_close(*results)


def test_vmap_in_training_with_statistics_refuses_or_is_right():
    """One buffer cannot hold five updates: torch raises, and a silent answer would be wrong."""
    x, stats = torch.randn(5, 2, 3, 4, 4), torch.ones(2, 3)
    for function in (batch_norm, nn.functional.batch_norm):
        with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
            vmap(lambda x, f=function: f(x, *stats, training=True))(x)


def test_vmap_over_an_ensemble():
    models = [fastbn.BatchNorm1d(3).eval() for _ in range(4)]
    for model in models:
        model(torch.randn(5, 3))
        nn.init.normal_(model.weight)
    parameters, buffers = stack_module_state(models)
    x = torch.randn(5, 3)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


@training
def test_func_transforms(training):
    x, tangent = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    stats = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double() * 2)
    weight = torch.randn(3, dtype=torch.float64)
    results = []
    for function in (batch_norm, nn.functional.batch_norm):

        def call(x, function=function):
            return function(x, *stats, weight, None, training)

        def loss(x, call=call):
            return call(x).pow(3).sum()

        y, pullback = vjp(call, x)
        first = [grad(loss)(x), y, *pullback(tangent), *jvp(call, (x,), (tangent,)), jacrev(call)(x)]
        results.append([*first, hessian(loss)(x), vmap(grad(loss))(torch.stack([x, 2 * x]))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_running_statistics_move_under_func_transforms(transform):
    x, stats = torch.randn(4, 3, 2), []
    for function in (batch_norm, nn.functional.batch_norm):
        mean, var = torch.zeros(3), torch.ones(3)

        def loss(x, function=function, mean=mean, var=var):
            return function(x, mean, var, training=True).pow(3).sum()

        {"grad": lambda: grad(loss)(x), "jvp": lambda: jvp(loss, (x,), (x,)), "hessian": lambda: hessian(loss)(x)}[
            transform
        ]()
        stats.append((mean, var))
    torch.testing.assert_close(*stats)


@pytest.mark.parametrize("momentum", [0.3, None], ids=str)
def test_vmap_over_an_ensemble_in_training(momentum):
    """Each model has statistics and a counter of its own."""
    x, results = torch.randn(5, 3), []
    for cls in (fastbn.BatchNorm1d, nn.BatchNorm1d):
        models = [cls(3, momentum=momentum) for _ in range(4)]
        for i, model in enumerate(models):
            nn.init.constant_(model.weight, i + 1)
            model.num_batches_tracked.fill_(i)
        parameters, buffers = stack_module_state(models)
        if cls is fastbn.BatchNorm1d:
            y = vmap(lambda p, b, m=models[0]: functional_call(m, (p, b), (x,)))(parameters, buffers)
        else:  # torch has no batching rule for a momentum of None
            y = torch.stack([model(x) for model in models])
            buffers = {name: torch.stack([m.state_dict()[name] for m in models]) for name in buffers}
        results.append((y, buffers))
    torch.testing.assert_close(*results)


def test_per_sample_gradients_in_eval():
    ours, torchs = (model.eval() for model in nets())
    x, results = images(), []
    for model in (ours, torchs):
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(p, sample, model=model, buffers=buffers):
            return functional_call(model, (p, buffers), (sample[None],)).square().sum()

        results.append(vmap(grad(loss), in_dims=(None, 0))(parameters, x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def op_arguments(dtype=torch.float32, channels_last=False):
    x = torch.randn(4, 3, 5, 2).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    moments = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    return x, torch.randn(3).to(dtype), torch.randn(3).to(dtype), moments


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, channels_last):
    """Schema, fake kernel, autograd registration and AOT dispatch, by torch's own checker."""
    x, weight, bias, moments = op_arguments(dtype, channels_last)
    dy = torch.randn_like(x)
    ops = torch.ops.fastbn
    for leaf in (x, x.clone().requires_grad_()):
        for given in (None, moments):
            torch.library.opcheck(ops.forward, (leaf, weight, bias, given, 1e-5))
            torch.library.opcheck(ops.forward, (leaf, None, None, given, 1e-5))
    for mode in (True, False):
        torch.library.opcheck(ops.backward, (dy, x, weight, moments, 1e-5, mode, [True] * 4))
    for momentum, counter in ((0.1, None), (None, torch.tensor(3))):
        stats = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        torch.library.opcheck(ops.update_running_stats, (moments, 40, momentum, *stats, counter))


@training
def test_meta_and_fake_tensors(training):
    from torch._subclasses import FakeTensorMode

    for shape in [(4, 3, 5, 2), (0, 3, 5, 2)]:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ours, torchs = (c(3, device="meta").train(training) for c in (fastbn.BatchNorm2d, nn.BatchNorm2d))
            x = torch.empty(shape, device="meta", requires_grad=True).contiguous(memory_format=memory_format)
            y, expected = ours(x), torchs(x)
            assert (y.shape, y.dtype, y.device, y.stride()) == (x.shape, x.dtype, x.device, expected.stride())
            y.sum().backward()
            assert ours.weight.grad.shape == (3,) and ours.weight.grad.is_meta
            with FakeTensorMode():
                fake = fastbn.BatchNorm2d(3).train(training)
                z = torch.randn(shape).contiguous(memory_format=memory_format)
                out = fake(z)
                assert out.shape == shape and out.stride() == expected.stride()


def test_module_on_the_meta_device_can_be_filled():
    with torch.device("meta"):
        bn = fastbn.BatchNorm2d(3)
    assert bn.weight.is_meta and bn.running_var.is_meta and bn.num_batches_tracked.is_meta
    bn = bn.to_empty(device="cpu")
    bn.reset_parameters()
    x = images()
    torch.testing.assert_close(bn(x), nn.BatchNorm2d(3)(x))


class Logged(torch.Tensor):
    """A subclass that writes down which function it went through."""

    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@training
def test_tensor_subclass(training):
    Logged.seen.clear()
    ours, torchs = (c(3).train(training) for c in (fastbn.BatchNorm2d, nn.BatchNorm2d))
    x = images()
    y = ours(x.as_subclass(Logged))
    assert type(y) is Logged and Logged.seen
    torch.testing.assert_close(y.as_subclass(torch.Tensor), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@training
def test_torch_function_mode_sees_the_call(training):
    class Recorder(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    x = images()
    stats = torch.zeros(3), torch.ones(3)
    with Recorder() as recorder:
        y = batch_norm(x, *stats, training=training)
    torch.testing.assert_close(y, batch_norm(x, torch.zeros(3), torch.ones(3), training=training))
    assert recorder.seen


def test_dispatch_mode_sees_the_call():
    from torch.utils.flop_counter import FlopCounterMode

    ours, torchs = nets()
    counts = []
    for model in (ours, torchs):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_sync_batch_norm_conversion_by_torch():
    ours, _ = nets()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(converted.bn2) is nn.SyncBatchNorm and type(converted.bn1) is nn.SyncBatchNorm
    assert converted.bn2.weight is ours.bn2.weight


def test_swa_utils_update_bn():
    loader = [images(5) for _ in range(4)]
    ours, torchs = nets()
    for model in (ours, torchs):
        torch.optim.swa_utils.update_bn(loader, model)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    assert ours.bn2.num_batches_tracked == 4 and ours.bn2.momentum == 0.1


def test_averaged_model():
    ours, _ = nets()
    average = torch.optim.swa_utils.AveragedModel(ours, use_buffers=True)
    ours(images())
    average.update_parameters(ours)
    average(images())
    assert type(average.module.bn2) is fastbn.BatchNorm2d


def test_replace_all_batch_norm_modules():
    ours, _ = nets()
    torch.func.replace_all_batch_norm_modules_(ours)
    assert not ours.bn2.track_running_stats and ours.bn2.running_mean is None
    assert vmap(ours, randomness="error")(images(8).view(2, 4, 3, 6, 6)).shape == (2, 4, 2)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_isinstance_repr_and_constructor(cls):
    torchs = CLASSES[cls]
    assert issubclass(cls, torchs) and isinstance(cls(3), nn.modules.batchnorm._BatchNorm)
    assert cls.__name__ == torchs.__name__ and cls.__module__.startswith("fastbn")
    assert repr(cls(7, momentum=None, affine=False)) == repr(torchs(7, momentum=None, affine=False))
    arguments = (7, 0.5, 0.25, True, False, "cpu", torch.float64)
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype")
    for module in (cls(*arguments), cls(**dict(zip(names, arguments, strict=True)))):
        assert repr(module) == repr(torchs(*arguments)) and module.weight.dtype == torch.float64
    module = cls(3, bias=False)
    module.reset_parameters()
    assert module.bias is None and module.weight is not None


def test_optimizers_step_over_the_parameters():
    ours, torchs = nets()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True) for m in (ours, torchs)]
    for _ in range(3):
        x = images()
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=1e-4, atol=1e-5)


def test_shared_memory_and_parametrize():
    bn = fastbn.BatchNorm2d(3).share_memory()
    assert bn.running_mean.is_shared()
    bn(images())
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Softplus(), unsafe=True)
    assert torch.isfinite(bn(images())).all()
