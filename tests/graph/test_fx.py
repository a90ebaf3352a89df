"""torch.fx: a batch norm of fastbn is a leaf of the traced graph, as torch's is, with its state and mode."""

import copy

import pytest
import torch
from torch import fx, nn

import fastbn

pytestmark = pytest.mark.cpu

MODULES = {
    "BatchNorm2d": fastbn.BatchNorm2d(4),
    "BatchNormAct2d": fastbn.BatchNormAct2d(4),
    "SyncBatchNorm": fastbn.SyncBatchNorm(4),
    "SyncBatchNormAct": fastbn.SyncBatchNormAct(4),
    "GhostBatchNorm2d": fastbn.GhostBatchNorm2d(4, virtual_batch_size=2),
    "FrozenBatchNorm2d": fastbn.FrozenBatchNorm2d(4),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_norm_is_a_leaf(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), copy.deepcopy(MODULES[name]), nn.ReLU())
    traced = fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "call_module", "output"]
    assert traced.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(4, 3, 5, 5)
    for training in (True, False, True):
        twin = copy.deepcopy(model).train(training)
        torch.testing.assert_close(traced.train(training)(x), twin(x))
        torch.testing.assert_close(traced.state_dict(), twin.state_dict())
        model.load_state_dict(twin.state_dict())


class TwoInputs(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, other):
        return self.norm(x, other)


def test_modules_of_two_inputs():
    x, other = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    model = TwoInputs(fastbn.BatchNormAct2d(4))
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["norm"]
    torch.testing.assert_close(traced(x, other), model(x, other))
    masked = TwoInputs(fastbn.MaskedBatchNorm1d(4))
    lengths, x = torch.tensor([3, 5]), torch.randn(2, 4, 5)
    torch.testing.assert_close(fx.symbolic_trace(masked)(x, lengths), masked(x, lengths))


@pytest.mark.parametrize("fuse", [False, True])
def test_part_of_a_traced_model_in_eval(fuse):
    model = fastbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), fuse=fuse)
    model(torch.randn(4, 3, 5, 5) * 3 + 2)
    traced = fx.symbolic_trace(model)
    before = copy.deepcopy(traced.state_dict())
    x = torch.randn(4, 3, 5, 5)
    traced.get_submodule("1").eval()
    torch.testing.assert_close(traced(x), model.eval()(x))
    torch.testing.assert_close(traced.state_dict(), before)


def test_the_names_that_feature_extraction_asks_for():
    """As torchvision's create_feature_extractor: a tracer that names nodes after the module that it is in."""
    names = {}

    class Tracer(fx.Tracer):
        def create_proxy(self, *args, **kwargs):
            proxy = super().create_proxy(*args, **kwargs)
            names[proxy.node.name] = proxy.node.target
            return proxy

    Tracer().trace(fastbn.convert(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())))
    assert "0.1" in names.values()
