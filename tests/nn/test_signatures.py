"""The constructors have torch's parameters: names, kinds and defaults, in every class."""

import inspect

import pytest
import torch
from torch import nn

import fastbn

pytestmark = pytest.mark.cpu

# By class: torch's counterpart, the keyword-only parameters added to torch's, and those that must be given.
CLASSES = {
    **{f"BatchNorm{n}d": (getattr(nn, f"BatchNorm{n}d"), {}, {}) for n in (1, 2, 3)},
    **{
        f"BatchNormAct{n}d": (getattr(nn, f"BatchNorm{n}d"), {"activation": "relu", "activation_param": None}, {})
        for n in (1, 2, 3)
    },
    **{
        f"GhostBatchNorm{n}d": (
            getattr(nn, f"BatchNorm{n}d"),
            {"virtual_batch_size": inspect.Parameter.empty},
            {"virtual_batch_size": 4},
        )
        for n in (1, 2)
    },
    "MaskedBatchNorm1d": (nn.BatchNorm1d, {}, {}),
    "SyncBatchNorm": (nn.SyncBatchNorm, {}, {}),
    "SyncBatchNormAct": (nn.SyncBatchNorm, {"activation": "relu", "activation_param": None}, {}),
}
FROZEN = [f"FrozenBatchNorm{n}d" for n in (1, 2, 3)]


def shown(signature):
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def test_no_class_is_left_out():
    classes = {n for n in fastbn.__all__ if isinstance(getattr(fastbn, n), type) and "BatchNorm" in n}
    assert classes - {"BatchNormFunction"} == {*CLASSES, *FROZEN}


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_those_of_torch(name):
    theirs, added, _ = CLASSES[name]
    expected = shown(inspect.signature(theirs))
    keyword = inspect.Parameter.KEYWORD_ONLY
    if "bias" not in inspect.signature(theirs).parameters:  # torch before 2.13
        expected.append(("bias", keyword, True))
    expected += [(parameter, keyword, default) for parameter, default in added.items()]
    assert shown(inspect.signature(getattr(fastbn, name))) == expected


@pytest.mark.parametrize("n", [1, 2, 3])
def test_signatures_of_drop_ins_are_equal(n):
    theirs = inspect.signature(getattr(nn, f"BatchNorm{n}d"))
    if "bias" not in theirs.parameters:
        pytest.skip("torch's batch norm has no `bias` here")
    ours = inspect.signature(getattr(fastbn, f"BatchNorm{n}d"))
    assert shown(ours) == shown(theirs)
    annotated = {name: p.annotation for name, p in theirs.parameters.items() if p.annotation is not p.empty}
    assert {
        name: ours.parameters[name].annotation for name in annotated
    } == annotated  # torch has none of device, dtype
    assert ours.return_annotation == theirs.return_annotation


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_ones_take_the_parameters_that_mean_something(name):
    ours = inspect.signature(getattr(fastbn, name)).parameters
    theirs = inspect.signature(nn.BatchNorm2d).parameters
    assert list(ours) == ["num_features", "eps", "device", "dtype", "trainable"]
    for parameter in ("num_features", "eps", "device", "dtype"):
        assert (ours[parameter].kind, ours[parameter].default) == (theirs[parameter].kind, theirs[parameter].default)


@pytest.mark.parametrize("name", [*CLASSES, *FROZEN])
def test_skip_init(name):
    cls = getattr(fastbn, name)
    needed = CLASSES[name][2] if name in CLASSES else {}
    module = torch.nn.utils.skip_init(cls, 8, 1e-3, dtype=torch.float64, **needed)
    assert type(module) is cls and module.eps == 1e-3
    state = module.state_dict()
    assert state["weight"].shape == (8,) and state["running_var"].dtype == torch.float64
    assert all(t.device.type == "cpu" for t in state.values())


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments_mean_what_they_mean_in_torch(name):
    theirs, _, needed = CLASSES[name]
    given = [8, 1e-3, None, True, False] + ([None] if theirs is nn.SyncBatchNorm else []) + ["meta", torch.float64]
    ours = getattr(fastbn, name)(*given, bias=False, **needed)
    right = theirs(*given)
    assert ours.bias is None
    for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "running_mean"):
        assert getattr(ours, attribute) == getattr(right, attribute)
    assert (ours.weight.device, ours.weight.dtype) == (right.weight.device, right.weight.dtype)
