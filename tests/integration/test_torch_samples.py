"""PyTorch's own sample inputs (module_db, op_db) for batch norm, run with fastbn; a missing entry fails."""

import copy
from functools import partial

import pytest
import torch
from reference import assert_same_error, raised
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastbn
from fastbn.functional import batch_norm

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
MODULE_INFOS = {name: [info for info in module_db if info.module_cls is getattr(torch.nn, name)] for name in NAMES}
OP_INFOS = [op for op in op_db if op.name == "nn.functional.batch_norm"]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
names = pytest.mark.parametrize("name", NAMES)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_the_samples_are_there():
    """An entry renamed by a later torch must not empty this file."""
    assert all(len(infos) == 1 for infos in MODULE_INFOS.values())
    assert len(OP_INFOS) >= 1
    for infos in MODULE_INFOS.values():
        assert len(module_inputs(infos[0], "cpu", torch.float32, True)) >= 5
        # an older torch has none, a newer one must not lose them
        assert infos[0].module_error_inputs_func is not None or torch.__version__ < (2, 13)
    assert len(samples("cpu", torch.float32, False)) >= 10


def module_inputs(info, device, dtype, is_training):
    return info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=is_training)


def samples(device, dtype, requires_grad):
    """sample_inputs of every variant, and reference_inputs where an entry has some of its own."""
    found = []
    for op in OP_INFOS:
        found += op.sample_inputs(device, dtype, requires_grad)
        if op.reference_inputs_func is not None:
            found += op.reference_inputs(device, dtype, requires_grad)
    return found


def leaf(value):
    if not torch.is_tensor(value):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def outcome(call):
    try:
        return call()
    except Exception as exception:
        return type(exception), str(exception).splitlines()[0]


def close(ours, torchs, dtype):
    loose = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype)
    tolerance = {"rtol": loose, "atol": loose} if loose else {}
    torch.testing.assert_close(ours, torchs, **tolerance)


@names
@training
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_module_db(device, name, training, dtype):
    (info,) = MODULE_INFOS[name]
    for sample in module_inputs(info, device, dtype, training):
        build, call = sample.constructor_input, sample.forward_input
        kwargs = {**build.kwargs, "device": device, "dtype": dtype}
        ours = getattr(fastbn, name)(*build.args, **kwargs).train(training)
        torchs = getattr(torch.nn, name)(*build.args, **kwargs).train(training)
        assert repr(ours) == repr(torchs)
        for step in range(2):
            pair = []
            for module in (ours, torchs):
                args = [leaf(a) for a in call.args]
                module.zero_grad()
                y = module(*args)
                y.square().sum().backward()
                pair.append((y, args[0].grad, [p.grad for p in module.parameters()], list(module.buffers())))
            label = f"{sample.desc}, step {step}: "
            torch.testing.assert_close(*pair, msg=lambda text, label=label: label + text)
        ours.load_state_dict(torchs.state_dict())


@names
def test_module_db_gradients(device, name):
    (info,) = MODULE_INFOS[name]
    for sample in module_inputs(info, device, torch.float64, True):
        build, (x,) = sample.constructor_input, sample.forward_input.args
        # one sample of the plane is enough for numerical derivatives, which cost a forward an element
        x = x.detach()[:2, :3, :2, :2] if x.dim() > 3 else x.detach()[:3, :5]
        if x.numel() == 0:
            continue
        kwargs = {**build.kwargs, "device": device, "dtype": torch.float64}
        module = getattr(fastbn, name)(x.shape[1], *build.args[1:], **kwargs)
        module.momentum = 0.0  # gradcheck calls many times and wants the same answer
        assert gradcheck(module, x.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(module, x.clone().requires_grad_())


@names
@training
def test_module_db_errors(device, name, training):
    (info,) = MODULE_INFOS[name]
    if info.module_error_inputs_func is None:
        pytest.skip("this torch has no samples of errors")
    errors = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=training
    )
    assert errors
    for error in errors:
        sample = error.module_error_input

        def call(cls, sample=sample):
            build, forward = sample.constructor_input, sample.forward_input
            return cls(*build.args, **build.kwargs).train(training)(*forward.args, **forward.kwargs)

        ours, torchs = partial(call, getattr(fastbn, name)), partial(call, getattr(torch.nn, name))
        if training:
            with pytest.raises(error.error_type, match=error.error_regex):
                ours()
        if raised(torchs) is not None:
            assert_same_error(ours, torchs)
        else:  # the samples are for training, and in eval some of the calls are good ones
            assert not training
            torch.testing.assert_close(ours(), torchs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_op_db(device, dtype):
    for sample in samples(device, dtype, True):
        pair = []
        for function in (batch_norm, torch.nn.functional.batch_norm):
            args = [leaf(a) for a in (sample.input, *sample.args)]
            kwargs = {k: leaf(v) for k, v in sample.kwargs.items()}
            for statistic in args[1:3]:
                if torch.is_tensor(statistic):
                    statistic.requires_grad_(False)

            def call(function=function, args=args, kwargs=kwargs):
                y = function(*args, **kwargs)
                leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
                dy = torch.linspace(-1, 2, y.numel(), device=device).to(y.dtype).view(y.shape)
                return [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True), *args[1:3]]

            pair.append(outcome(call))
        ours, torchs = pair
        if isinstance(torchs, tuple):
            assert isinstance(ours, tuple) and ours[0] is torchs[0], f"{sample}: {ours}, torch: {torchs}"
            continue
        assert isinstance(ours, list), f"{sample}: {ours}"
        close(ours[0], torchs[0], dtype)
        close(ours[-2:], torchs[-2:], dtype)
        if dtype in FLOATS[:2]:  # torch's half gradients are far from float64; test_parity.py judges ours
            close(ours[1:-2], torchs[1:-2], dtype)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_op_db_gradients(device, dtype):
    checked = 0
    for sample in samples(device, dtype, True):
        tensors = [leaf(a) for a in (sample.input, *sample.args)]
        if sample.input.numel() in (0, 1) or sample.input.dim() < 2 or sample.input.numel() > 150:
            continue
        stats = [None if s is None else s.detach() for s in (tensors + [None] * 4)[1:3]]
        rest = [t for t in (tensors[0], *tensors[3:]) if t is not None]
        kwargs = sample.kwargs

        def call(x, *parameters, stats=stats, kwargs=kwargs):
            own = [None if s is None else s.clone() for s in stats]
            return batch_norm(x, *own, *parameters, **kwargs)

        if call_is_singular(sample):
            continue
        assert gradcheck(call, rest, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(call, rest)
        checked += 1
    assert checked >= 4


def call_is_singular(sample):
    """Samples of torch with negative running variances: NaN, which numerical derivatives cannot judge."""
    variance = (list(sample.args) + [None] * 4)[1]
    return not sample.kwargs.get("training", False) and variance is not None and bool((variance < 0).any())


def test_op_db_error_inputs(device):
    """batch_norm has no error inputs of its own in 2.13; the day it has, they are run."""
    for op in OP_INFOS:
        if op.error_inputs_func is None:
            continue
        for error in op.error_inputs(device):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                batch_norm(sample.input, *sample.args, **sample.kwargs)


@names
def test_samples_survive_a_deepcopy_of_the_module(device, name):
    (info,) = MODULE_INFOS[name]
    sample = module_inputs(info, device, torch.float32, True)[0]
    module = getattr(fastbn, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(module(*sample.forward_input.args), twin(*sample.forward_input.args))
