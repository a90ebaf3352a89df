"""Which calls take the fast path, one call of the extension with its autograd node in C++, and which the slow path."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn import _C
from fastbn.functional import batch_norm

NAMES = ("input", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def arguments(**change):
    call = {
        "input": torch.randn(4, 3, 5),
        "weight": torch.nn.Parameter(torch.ones(3)),
        "bias": torch.nn.Parameter(torch.zeros(3)),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(0),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return {**call, **change}


def taken(call):
    return _C.batch_norm(**call) is not NotImplemented


class Subclass(torch.Tensor):
    pass


class SeesDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@training
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_plain_tensors_and_parameters(training, dtype):
    x = torch.randn(4, 3, 5, 2).to(dtype)
    for input in (x, x.clone().requires_grad_(), torch.nn.Parameter(x), x[:, :, ::2], x.mT.contiguous().mT):
        params = {name: None if t is None else t.to(dtype) for name, t in tensors_of(arguments()).items()}
        params["num_batches_tracked"] = torch.tensor(0)
        assert taken(arguments(**{**params, "input": input, "training": training}))
    if dtype in (torch.float16, torch.bfloat16):
        assert taken(arguments(input=x, training=training))


def tensors_of(call):
    return {name: call[name] for name in NAMES}


@pytest.mark.parametrize(
    "change",
    [
        {"weight": None}, {"bias": None}, {"weight": None, "bias": None}, {"num_batches_tracked": None},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None}, {"momentum": None},
        {"momentum": 1}, {"eps": 1}, {"weight": torch.ones(9)[::3]}, {"input": torch.randn(4, 3)},
        {"training": False, "eps": 0.0},
    ],
    ids=" ".join,
)  # fmt: skip
def test_variants_on_the_fast_path(change):
    assert taken(arguments(**change))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_common_contexts(context):
    with context():
        assert taken(arguments())


@training
def test_a_module_takes_it(monkeypatch, training):
    """In forward and in backward: the slow path is replaced by an error."""

    def broken(*args):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(fastbn.autograd, "_slow_path", broken)
    monkeypatch.setattr(fastbn.autograd.BatchNormBackward, "apply", broken)
    for module, shape in ((fastbn.BatchNorm1d, (4, 3)), (fastbn.BatchNorm2d, (4, 3, 5, 5))):
        module(3).train(training)(torch.randn(shape, requires_grad=True)).sum().backward()


WRONG = {
    "no values": {"input": torch.randn(0, 3, 5)},
    "one value a channel": {"input": torch.randn(1, 3)},
    "one dimension": {"input": torch.randn(3)},
    "integers": {"weight": torch.ones(3).long()},
    "mixed types": {"running_var": torch.ones(3).double()},
    "other size": {"bias": torch.ones(4)},
    "two dimensions": {"weight": torch.ones(1, 3)},
    "one statistic": {"running_var": None},
    "no statistics in eval": {"running_mean": None, "running_var": None, "training": False},
    "statistics that require grad": {"running_mean": torch.zeros(3, requires_grad=True)},
    "another device": {"weight": torch.ones(3, device="meta")},
    "not a tensor": {"weight": [1.0, 1.0, 1.0]},
    "no input": {"input": None},
    "sparse": {"input": torch.randn(4, 3).to_sparse()},
    "eps": {"eps": 0.0},
    "eps in eval": {"eps": -1.0, "training": False},
    "eps of another type": {"eps": "1e-5"},
    "momentum of another type": {"momentum": torch.tensor(0.1)},
    "training of another type": {"training": 1},
    "counter of another type": {"num_batches_tracked": torch.tensor(0.0)},
    "subclass of input": {"input": torch.randn(4, 3, 5).as_subclass(Subclass)},
    "subclass of weight": {"weight": torch.ones(3).as_subclass(Subclass)},
    "conjugate": {"input": torch.randn(4, 3, 5, dtype=torch.complex64).conj().imag},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_takes_the_slow_path(name):
    """Before anything was written."""
    call = arguments(**WRONG[name])
    assert not taken(call)
    assert call["num_batches_tracked"] == 0
    for statistic, start in (("running_mean", torch.zeros), ("running_var", torch.ones)):
        if call[statistic] is not None:
            assert torch.equal(call[statistic], start(3, dtype=call[statistic].dtype))


@pytest.mark.parametrize("mode", [SeesDispatch, SeesFunctions, FakeTensorMode])
def test_not_under_a_mode(mode):
    call = arguments()
    with mode():
        assert not taken(call)
    assert taken(call)


def test_not_for_fake_and_meta_tensors():
    with FakeTensorMode():
        fake = arguments()
    assert not taken(fake)
    assert not taken({name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments().items()})


@pytest.mark.parametrize("name", NAMES[:3])
def test_not_for_dual_numbers(name):
    call = arguments()
    with forward_ad.dual_level():
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        assert not taken(call)


@pytest.mark.parametrize("name", NAMES[:3])
def test_not_under_functorch(name):
    call, seen = arguments(), []

    def watch(t):
        seen.append(taken({**call, name: t}))
        return t.sum()

    t = call[name].detach()
    torch.vmap(watch)(torch.stack([t, t]))
    torch.func.grad(watch)(t)
    torch.func.jvp(watch, (t,), (t,))
    assert seen == [False] * 3


def test_transformed_gradients_use_the_kernels():
    """torch.func.grad and vmap take the slow path, which calls the two operators."""

    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    def loss(x):
        return batch_norm(x, None, None, training=True).pow(3).sum()

    x = torch.randn(2, 4, 3)
    for call in (lambda: torch.func.grad(loss)(x), lambda: torch.vmap(torch.func.grad(loss))(x[:, :, :, None])):
        seen = set()
        with Records():
            call()
        assert {"fastbn.forward.default", "fastbn.backward.default"} <= seen


def test_numbers_of_other_kinds_are_the_same_numbers():
    x = torch.randn(4, 3, 5)
    results = []
    for kind in (float, np.float64, torch.tensor):
        mean, var = torch.zeros(3), torch.ones(3)
        y = batch_norm(x, mean, var, training=True, momentum=kind(0.25), eps=kind(0.5))
        results.append((y, mean, var))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
