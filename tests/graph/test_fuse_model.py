"""fastbn.convert(fuse=True): state_dict, copies, pickles, classes, optimizers and reports of a fused model."""

import copy
import io
import pickle

import pytest
import torch
from fusing import RELU, RESNET, Bottleneck, ResNet, assert_same_steps, conv, images
from torch import nn
from torch.nn import functional as F

import fastbn
from fastbn.nn.modules import BatchNorm2d

pytestmark = pytest.mark.cpu


def test_state_dicts_load_both_ways():
    plain, fused = ResNet(), fastbn.convert(ResNet(), fuse=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]
    fused.load_state_dict(plain.state_dict())
    x = images(dtype=torch.float32)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    other = ResNet()
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other.eval()(x), plain(x))


def test_nothing_moves_and_revert_puts_everything_back():
    model = ResNet()
    model.layer1[0].bn1.register_forward_hook(lambda m, args, y: None)
    before = {name: (m, type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    text = repr(model)
    fastbn.convert(model, fuse=True)
    assert isinstance(model, ResNet) and isinstance(model.layer1[0], Bottleneck)
    assert type(model.layer1[0]).__name__ == "Bottleneck"
    assert model.forward_features(images(dtype=torch.float32)).shape == (4, 6, 5, 5)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is tensors[name]
    assert fastbn.revert(model) is model
    for name, m in model.named_modules():
        module, kind, attributes = before[name]
        assert m is module and type(m) is kind and m.__dict__ == attributes
    assert repr(model) == text
    with pytest.raises(ValueError, match="report"):
        fastbn.report(model)


def test_twice_and_after_a_plain_convert():
    model = fastbn.convert(fastbn.convert(ResNet()), fuse=True)
    x = images(dtype=torch.float32)
    model(x)
    assert fastbn.report(model).fused == RESNET
    classes, text = [type(m) for m in model.modules()], str(fastbn.report(model))
    fastbn.convert(model, fuse=True)
    assert [type(m) for m in model.modules()] == classes and str(fastbn.report(model)) == text
    assert isinstance(model.bn1, BatchNorm2d)


@pytest.mark.parametrize("carry", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies_and_pickles(carry):
    model = fastbn.convert(ResNet().double(), fuse=True)
    model(images())
    if carry == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[carry](
            model
        )
    assert type(twin) is type(model) and isinstance(twin, ResNet)
    reference = fastbn.revert(copy.deepcopy(twin))
    assert_same_steps(twin, reference, images())
    if carry != "copy":
        assert twin.bn1.weight is not model.bn1.weight
    assert str(fastbn.report(twin)) == str(fastbn.report(model))
    assert type(fastbn.revert(twin)) is ResNet


def test_ordered_slices_and_walks_of_a_fused_sequential():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    x = images()
    torch.testing.assert_close(ours[:2](x), model[:2](x))
    torch.testing.assert_close(ours[1:](x), model[1:](x))
    ours.append(nn.Tanh())
    torch.testing.assert_close(ours(x), model(x).tanh())
    del ours[2]
    torch.testing.assert_close(ours(x), torch.tanh(model[3](model[1](model[0](x)))))


def test_compile_export_and_traces_see_the_original():
    model = ResNet().eval()
    ours, x = fastbn.convert(copy.deepcopy(model), fuse=True), images(dtype=torch.float32)
    expected = model(x)
    graphs = []
    compiled = torch.compile(ours, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert F.relu in targets and torch.ops.fastbn.batch_norm.default in targets
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(ours, x, check_trace=False)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), expected)


def test_functional_calls_and_per_sample_gradients():
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 1)).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def grads(m):
        def loss(params, x):
            return torch.func.functional_call(m, params, (x,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(m.named_parameters()), x)

    torch.testing.assert_close(grads(ours), grads(model))


def test_an_optimizer_made_before_keeps_working_and_losses_agree():
    models = [ResNet().double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    fastbn.convert(models[0], fuse=True)
    for _ in range(10):
        x, losses = images(8), []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(8) % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-7, atol=1e-9)


def test_classes_that_cannot_have_a_quiet_subclass():
    registry = []

    class Registered(nn.Module):
        def __init_subclass__(cls):
            registry.append(cls)

    class Net(Registered):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(self.bn(x))

    report = fastbn.report(fastbn.convert(Net(), fuse=True))
    assert registry == [Net] and report.left == {"bn": "Net defines __init_subclass__"}


def test_scripted_and_wrapped_modules():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    model = nn.Sequential(scripted, nn.DataParallel(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())))
    ours = fastbn.convert(model, fuse=True)
    assert ours(images(dtype=torch.float32)).min() == 0
    assert fastbn.report(ours).fused == {"1.module.0": RELU}


def test_the_report():
    model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)), fuse=True)
    assert "after the model's first call" in fastbn.report(model).left["1"]
    model(images(dtype=torch.float32))
    assert str(fastbn.report(model)).splitlines() == [
        "batch norms: 2 swapped, 1 fused, 0 folded, 1 left",
        "  1  fused   batch_norm + relu",
        "  3  left    its output is returned",
    ]
    assert fastbn.report(copy.deepcopy(model)).fused == {}, "a copy has to be called itself"
    with pytest.raises(TypeError, match="report"):
        fastbn.report(3)


def test_a_batch_norm_without_tensors_is_not_recognized():
    """Without parameters and statistics there is nothing to know it by; it is fused all the same."""
    model = nn.Sequential(conv(), nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.ReLU()).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, images())
    assert "captured" in fastbn.report(ours).left["1"]


@pytest.mark.parametrize(
    "model", [nn.BatchNorm2d(3), nn.Linear(2, 2), nn.Sequential(), nn.Identity(), nn.Module()], ids=str
)
def test_models_with_nothing_to_fuse(model):
    kind = type(model)
    fastbn.convert(model, fuse=True)
    assert not fastbn.report(model).fused and type(fastbn.revert(model)) is kind
