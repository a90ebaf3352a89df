"""Modules that lack an attribute (old checkpoints, hand-written states) give torch's result or AttributeError."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastbn

pytestmark = pytest.mark.cpu
ATTRIBUTES = (
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "momentum", "eps", "affine",
    "track_running_stats", "num_features",
)  # fmt: skip
MODES = {"eval": (False, True), "train": (True, True), "train without statistics": (True, False)}


def made(n=2):
    bn = getattr(nn, f"BatchNorm{n}d")(4)
    for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        nn.init.uniform_(t, 0.5, 1.5)
    return bn


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), made(), nn.ReLU()).eval()


def without(module, name="num_batches_tracked"):
    for child in module.modules():
        if hasattr(child, "running_var") and hasattr(child, name):
            delattr(child, name)
    return module


def outcome(f):
    try:
        return f()
    except AttributeError as error:
        return "has no attribute" in str(error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_missing_attribute_matters_where_it_does_in_torch(n, name, mode):
    x = torch.randn(6, 4, *[3] * n)
    theirs = made(n)
    theirs.training, theirs.track_running_stats = MODES[mode]
    ours = fastbn.convert(copy.deepcopy(theirs))
    expected, found = (outcome(lambda m=m: without(m, name)(x)) for m in (theirs, ours))
    assert (found is True) == (expected is True)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


OURS = {
    "act": lambda: fastbn.BatchNormAct2d(4),
    "ghost": lambda: fastbn.GhostBatchNorm2d(4, virtual_batch_size=2),
    "sync": lambda: fastbn.SyncBatchNorm(4),
    "sync act": lambda: fastbn.SyncBatchNormAct(4),
}


@pytest.mark.parametrize("kind", OURS)
def test_other_classes_need_no_counter_in_eval(kind):
    x, bn = torch.randn(4, 4, 3, 3), OURS[kind]().eval()
    expected = bn(x)
    torch.testing.assert_close(without(bn)(x), expected, rtol=0, atol=0)
    with pytest.raises(AttributeError, match="num_batches_tracked"):
        bn.train()(x)


TOOLS = {
    "convert": lambda m: fastbn.convert(m),
    "fuse": lambda m: fastbn.convert(m, fuse=True),
    "convert_sync_batchnorm": lambda m: fastbn.SyncBatchNorm.convert_sync_batchnorm(m),
    "fold": lambda m: fastbn.fold(m),
    "freeze": lambda m: fastbn.freeze(m),
    "freeze, trainable": lambda m: fastbn.freeze(m, trainable=True),
    "revert": lambda m: fastbn.revert(fastbn.convert(m, fuse=True)),
}


@pytest.mark.parametrize("deleted_first", [True, False], ids=["deleted first", "deleted later"])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_take_models_without_the_counter(tool, deleted_first):
    base, x = model(), torch.randn(2, 3, 5, 5)
    expected = base(x)
    changed = TOOLS[tool](without(base)) if deleted_first else without(TOOLS[tool](base))
    torch.testing.assert_close(changed(x), expected)


@pytest.mark.parametrize("name", ["num_batches_tracked", "momentum", "affine", "track_running_stats"])
def test_freeze_needs_only_what_it_keeps(name):
    base, x = model(), torch.randn(2, 3, 5, 5)
    expected = base(x)
    torch.testing.assert_close(fastbn.freeze(without(base, name)).train()(x), expected)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_tools_that_need_statistics_say_so(name):
    with pytest.raises(ValueError, match="1 has no running statistics"):
        fastbn.freeze(without(model(), name))
    folded = fastbn.fold(without(model(), name))
    assert fastbn.report(folded).left == {"1": "it has no running statistics"}
    with torch.no_grad(), pytest.raises(AttributeError, match=name):  # by the model's own forward
        fastbn.update_bn(
            [torch.randn(2, 3, 5, 5)], nn.Sequential(nn.BatchNorm2d(3), without(model(), name)), mode="eval"
        )


def test_freeze_of_pruned_parameters_changes_nothing():
    base = model()
    prune.l1_unstructured(base[1], "weight", 0.5)
    with pytest.raises(ValueError, match="weight and bias of 1 should be parameters of its own.*prune.remove"):
        fastbn.freeze(base)
    assert type(base[1]) is nn.BatchNorm2d
    x = torch.randn(2, 3, 5, 5)
    expected = base(x)
    torch.testing.assert_close(fastbn.freeze(base, trainable=True)(x), expected)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_update_bn_without_the_counter(mode):
    """In eval nothing counts batches; a pass in training mode does, and so it fails as a training step of torch's."""
    loader = [torch.randn(6, 3, 5, 5) for _ in range(3)]
    whole = model()
    lacking = without(fastbn.convert(copy.deepcopy(whole)))
    if mode == "train":
        with pytest.raises(AttributeError, match="num_batches_tracked"):
            fastbn.update_bn(loader, lacking, mode=mode)
        return
    for m in (whole, lacking):
        fastbn.update_bn(loader, m, mode=mode)
    assert whole[1].num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(lacking[1], name), getattr(whole[1], name))
