"""Models trained with synchronized batch norm become local ones: fold, convert(sync=False), revert."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbn

pytestmark = pytest.mark.cpu


def layers():
    return nn.ModuleDict(
        {
            "1d": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()),
            "2d": nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
            "3d": nn.Sequential(nn.Conv3d(6, 4, 1), nn.BatchNorm3d(4), nn.ReLU()),
        }
    )


def inputs(kind, n=5):
    return torch.randn(n, 6, *[3] * {"1d": 0, "2d": 2, "3d": 3}[kind])


def trained(convert):
    model = convert(layers())
    for _ in range(2):
        for kind, branch in model.items():
            branch[1].eval() if type(branch[1]) is nn.SyncBatchNorm else None  # on a CPU torch's cannot train
            branch(inputs(kind))
            nn.init.uniform_(branch[1].running_var, 0.5, 1.5)
            nn.init.uniform_(branch[1].weight, 0.5, 1.5)
    return model.eval()


SYNCHRONIZED = {
    "fastbn": fastbn.SyncBatchNorm.convert_sync_batchnorm,
    "fastbn, converted before": lambda m: fastbn.SyncBatchNorm.convert_sync_batchnorm(fastbn.convert(m)),
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "torch, convert(sync=True)": lambda m: fastbn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(m), sync=True),
}
kinds = pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
synchronized = pytest.mark.parametrize("made", SYNCHRONIZED)


@synchronized
@kinds
def test_convert_makes_them_local(kind, made):
    model, x = trained(SYNCHRONIZED[made]), inputs(kind)
    bn, expected, state = model[kind][1], model[kind](x), copy.deepcopy(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert fastbn.convert(model, sync=False) is model
    assert model[kind][1] is bn and type(bn) is getattr(fastbn, f"BatchNorm{kind}")
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(model[kind](x), expected)
    assert set(vars(bn)) == set(vars(fastbn.BatchNorm2d(4)))
    model.train()[kind](x).sum().backward()
    with pytest.raises(ValueError, match="expected"):
        bn(torch.randn(2, 4, 1, 1, 1, 1))


@synchronized
@kinds
def test_fold_in_eval(kind, made):
    model, x = trained(SYNCHRONIZED[made]), inputs(kind)
    expected = model[kind](x)
    folded = fastbn.fold(model[kind])
    assert fastbn.report(folded).folded == {"1": "0"}
    torch.testing.assert_close(folded(x), expected)


@kinds
@pytest.mark.parametrize("made", list(SYNCHRONIZED)[:2])
def test_revert_makes_what_was_there(kind, made):
    model = trained(SYNCHRONIZED[made])
    bn = fastbn.revert(pickle.loads(pickle.dumps(copy.deepcopy(model))))[kind][1]
    assert type(bn) is getattr(nn, f"BatchNorm{kind}") and set(vars(bn)) == set(vars(nn.BatchNorm2d(4)))


def test_revert_of_what_was_torchs():
    for made in (fastbn.SyncBatchNorm(4), trained(SYNCHRONIZED["torch, convert(sync=True)"])["2d"][1]):
        bn = fastbn.revert(made)
        assert type(bn) is nn.SyncBatchNorm and bn.process_group is None
    twice = fastbn.SyncBatchNorm.convert_sync_batchnorm(fastbn.SyncBatchNorm.convert_sync_batchnorm(layers()))
    assert type(fastbn.revert(twice)["3d"][1]) is nn.BatchNorm3d


@pytest.mark.parametrize("n", [1, 2, 3])
def test_activations_stay(n):
    act = getattr(fastbn, f"BatchNormAct{n}d")
    bn, x = act(4, activation="silu"), torch.randn(3, 4, *[2] * n)
    expected = bn.eval()(x)
    fastbn.SyncBatchNorm.convert_sync_batchnorm(bn)
    assert type(bn) is fastbn.SyncBatchNormAct
    assert type(fastbn.convert(bn, sync=False)) is act and "process_group" not in vars(bn)
    torch.testing.assert_close(bn(x), expected, rtol=0, atol=0)


def test_convert_leaves_synchronized_ones_unless_asked():
    model = trained(SYNCHRONIZED["torch"])
    fastbn.convert(model)
    assert type(model["2d"][1]) is nn.SyncBatchNorm
    fastbn.convert(trained(SYNCHRONIZED["fastbn"]))
    assert type(fastbn.convert(trained(SYNCHRONIZED["fastbn"]))["2d"][1]) is fastbn.SyncBatchNorm


def test_fused_before_and_after():
    model = trained(lambda m: fastbn.SyncBatchNorm.convert_sync_batchnorm(fastbn.convert(m, fuse=True)))
    x = inputs("2d")
    expected = model["2d"](x)
    fastbn.convert(model, sync=False, fuse=True)
    assert set(fastbn.report(model).fused) == {"1d.1", "2d.1", "3d.1"}
    torch.testing.assert_close(model["2d"](x), expected)


def test_tools_that_list_norm_classes_find_them():
    """As optimizers do that leave norm parameters without weight decay."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    for made in ("fastbn", "torch, convert(sync=True)"):
        model = SYNCHRONIZED[made](layers())
        assert all(isinstance(branch[1], norms) for branch in model.values())
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()), "DDP refuses those on CPUs"
    assert isinstance(fastbn.SyncBatchNorm(3), norms)
    y = fastbn.SyncBatchNorm(3)(torch.randn(4, 3)), fastbn.SyncBatchNorm(3)(torch.randn(4, 3, 2, 2, 2))
    assert [t.dim() for t in y] == [2, 5]
