"""fastbn.fold: a folded model has the same outputs in eval, and what cannot be folded is reported and unchanged."""

import copy
import pickle

import pytest
import torch
from fusing import ResNet
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fastbn
from fastbn.graph.fold import FoldedBatchNorm

pytestmark = pytest.mark.cpu

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (5, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv3d": (nn.Conv3d(4, 6, 2, stride=2), nn.BatchNorm3d, (2, 4, 4, 5, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (3, 4, 6, 6)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d, (3, 6, 6, 6)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (3, 4, 6, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d, (5, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d, (3, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose2d(6, 12, 3, groups=3, bias=False), nn.BatchNorm2d, (3, 6, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, groups=2, dilation=2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d, (7, 4)),
    "linear no bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (7, 4)),
}
OPTIONS = [{}, {"affine": False}, {"eps": 0.3}]


def trained(model, *shapes):
    """Statistics and parameters that are nowhere trivial; in eval mode, float64."""
    model = model.double().train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None:
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    for _ in range(3):
        model(*(torch.randn(shape, dtype=torch.float64) * 2 + 1 for shape in shapes))
    return model.eval()


def fold(model, *shapes, folded, convert=lambda m: m):
    """Fold a copy, compare it with the model, and return it. folded: {batch norm: layer}."""
    model = trained(model, *shapes)
    ours = fastbn.fold(convert(copy.deepcopy(model)))
    assert fastbn.report(ours).folded == folded
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)
    return ours


CONVERSIONS = {"torch": lambda m: m, "converted": fastbn.convert, "fused": lambda m: fastbn.convert(m, fuse=True)}
conversions = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@conversions
def test_layers(name, options, convert):
    layer, kind, shape = LAYERS[name]
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    model = nn.Sequential(copy.deepcopy(layer), kind(channels, **options), nn.LeakyReLU(0.2, inplace=True))
    ours = fold(model, shape, folded={"1": "0"}, convert=convert)
    assert type(ours) is nn.Sequential and type(ours[1]) is FoldedBatchNorm and type(ours[0]) is type(layer)
    assert list(ours.state_dict()) == ["0.weight", "0.bias"] and ours[2](torch.tensor(-1.0)) == -0.2


@conversions
def test_a_resnet(convert):
    names = {"bn1": "conv1", "layer1.0.downsample.1": "layer1.0.downsample.0"}
    names |= {f"layer1.{i}.bn{k}": f"layer1.{i}.conv{k}" for i in (0, 1) for k in (1, 2, 3)}
    ours = fold(ResNet(), (4, 6, 5, 5), folded=names, convert=convert)
    assert not fastbn.report(ours).left and type(ours) is ResNet
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.jit.trace(ours, x)):
        torch.testing.assert_close(twin(x), ours(x))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))


def test_what_cannot_be_folded_stays_fused():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    ours = fold(model, (3, 4, 6, 6), folded={"5": "4"}, convert=CONVERSIONS["fused"])
    assert fastbn.report(ours).fused == {"2": "batch_norm + relu"}
    assert fastbn.report(ours).left == {"2": "follows 1 (ReLU), which has no weights to take it in"}
    assert type(ours[2]) is fastbn.BatchNorm2d
    assert str(fastbn.report(ours)).splitlines()[0] == "batch norms: 1 swapped, 1 fused, 1 folded, 1 left"


class Of(nn.Module):
    def __init__(self, forward, **children):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        for name, child in children.items():
            setattr(self, name, child)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def conditional(self, x):
    y = self.bn(self.conv(x))
    return y if y.sum() > 0 else -y


LEFT = {
    "the output is used twice": (lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), "used 2 times"),
    "the layer is called twice": (lambda self, x: self.bn(self.conv(x)) + self.conv(x), "more than one place"),
    "the batch norm is called twice": (lambda self, x: self.bn(self.conv(x)) + self.bn(x), "more than one place"),
    "the weight is used": (lambda self, x: self.bn(self.conv(x)) + self.conv.weight.sum(), "shares"),
    "the statistics are used": (lambda self, x: self.bn(self.conv(x)) + self.bn.running_mean.sum(), "shares"),
    "in the wrong order": (lambda self, x: self.conv(self.bn(x)), "no weights"),
    "something between": (lambda self, x: self.bn(self.conv(x) * 2), "no weights"),
    "all parameters are used": (lambda self, x: self.bn(self.conv(x)) + sum(p.sum() for p in self.parameters()), "see"),
    "it does not trace": (conditional, "torch.fx"),
    "nobody calls it": (lambda self, x: self.conv(x) * 2, "no forward"),
}


@pytest.mark.parametrize("name", LEFT)
@conversions
def test_left_as_it_was(name, convert):
    forward, why = LEFT[name]
    ours = fold(Of(forward), (3, 4, 5, 5), folded={}, convert=convert)
    assert why in fastbn.report(ours).left["bn"]


def block(**changes):
    return Of(lambda self, x: self.bn(self.conv(x)), **changes)


def hooked(where):
    model = block()
    model.get_submodule(where).register_forward_hook(lambda m, args, y: y * 2)
    return model


def another_name():
    model = block()
    model.other = model.conv
    return model


def tied():
    model = block(second=nn.Conv2d(4, 4, 1))
    model.second.weight = model.conv.weight
    return model


def outer():
    """The layer of an inner module is also called from outside."""
    return Of(lambda self, x: self.inner(x) + self.inner.conv(x), inner=block())


def with_a_parametrization():
    model = block()
    parametrize.register_parametrization(model.conv, "weight", nn.Tanh())
    return model


SPECIAL = {
    "a hook on the layer": (lambda: hooked("conv"), "hooks"),
    "a hook on the batch norm": (lambda: hooked("bn"), "hooks"),
    "weight norm": (lambda: block(conv=nn.utils.weight_norm(nn.Conv2d(4, 4, 1))), "hooks"),
    "a parametrization": (with_a_parametrization, "no weights"),
    "two names": (another_name, "more than one place"),
    "tied weights": (tied, "shares"),
    "a call from outside": (outer, "more than one place"),
    "statistics of the batch": (lambda: block(bn=nn.BatchNorm2d(4, track_running_stats=False)), "running statistics"),
    "a subclass of the layer": (lambda: block(conv=type("Mine", (nn.Conv2d,), {})(4, 4, 1)), "no weights"),
    "a subclass of batch norm": (lambda: block(bn=type("Mine", (nn.BatchNorm2d,), {})(4)), "Mine is not"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SPECIAL)
@conversions
def test_special_modules_are_left(name, convert):
    make, why = SPECIAL[name]
    model = trained(make(), (3, 4, 5, 5))
    before = dict(model.named_parameters())
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = model(x)
    ours = fastbn.fold(convert(model))
    assert not fastbn.report(ours).folded and why in "".join(fastbn.report(ours).left.values()), fastbn.report(ours)
    assert all(p is before[n] for n, p in ours.named_parameters())
    torch.testing.assert_close(ours(x), expected)


def test_a_batch_norm_that_trains_is_left():
    model = block().eval()
    model.bn.train()
    assert fastbn.report(fastbn.fold(model)).left == {"bn": "it is in training mode"}


def test_what_a_folded_model_refuses():
    """Never wrong: a linear layer's features are not the channels of a 3D input, and there is nothing to train."""
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (7, 4))
    assert model(torch.randn(2, 4, 4, dtype=torch.float64)).shape == (2, 4, 4)
    fastbn.fold(model)
    with pytest.raises(ValueError, match="2D, not 3D"):
        model(torch.randn(2, 4, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(torch.randn(2, 4, dtype=torch.float64))
    conv = fastbn.fold(trained(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (7, 4, 4)))
    with pytest.raises(ValueError, match="3D, not 2D"):
        conv(torch.randn(4, 4, dtype=torch.float64))


def test_the_tensors_of_before_are_not_written_to():
    """A state_dict taken before holds the same tensors: it must stay the original's."""
    model = trained(block(), (3, 4, 5, 5))
    state, copied = model.state_dict(), copy.deepcopy(model.state_dict())
    model.conv.weight.requires_grad_(False)
    fastbn.fold(model)
    torch.testing.assert_close(state, copied, rtol=0, atol=0)
    assert not model.conv.weight.requires_grad and not torch.equal(model.conv.weight, state["conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_in_float64_whatever_the_dtype(dtype):
    model = trained(block(), (3, 4, 5, 5)).to(dtype)
    wide = copy.deepcopy(model).double()
    fastbn.fold(model)
    scale = wide.bn.weight / torch.sqrt(wide.bn.running_var + wide.bn.eps)
    assert torch.equal(model.conv.weight, (wide.conv.weight * scale[:, None, None, None]).to(dtype))
    assert torch.equal(model.conv.bias, ((wide.conv.bias - wide.bn.running_mean) * scale + wide.bn.bias).to(dtype))


def test_weights_that_would_overflow_are_left():
    model = block().half().eval()
    model.bn.running_var.fill_(1e-7)
    model.bn.eps = 0.0
    model.bn.weight.data.fill_(60000.0)
    model.conv.weight.data.fill_(300.0)
    before = model.conv.weight
    assert "float16" in fastbn.report(fastbn.fold(model)).left["bn"] and model.conv.weight is before


def test_training_mode_and_other_things_are_errors():
    with pytest.raises(ValueError, match="eval"):
        fastbn.fold(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(TypeError, match="fold"):
        fastbn.fold(3)


def test_twice():
    model = trained(block(), (3, 4, 5, 5))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = model(x)
    assert fastbn.fold(fastbn.fold(model)) is model
    assert fastbn.report(model).folded == {"bn": "conv"}
    torch.testing.assert_close(model(x), expected)
    fused = fastbn.convert(model, fuse=True)
    torch.testing.assert_close(fused(x), expected)


def test_a_functional_residual_block():
    model = Of(lambda self, x: F.relu(self.bn(self.conv(x)) + x))
    fold(model, (3, 4, 5, 5), folded={"bn": "conv"}, convert=CONVERSIONS["fused"])


def test_what_a_forward_reads_of_a_batch_norm_is_there_after_the_fold():
    fold(Of(lambda self, x: self.bn(self.conv(x)) * (self.bn.num_features == 4)), (3, 4, 5, 5), folded={"bn": "conv"})


def test_a_compiled_model():
    model = trained(block(), (3, 4, 5, 5))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = model(x)
    compiled = fastbn.fold(torch.compile(model, backend="eager"))
    torch.testing.assert_close(compiled(x), expected)
    assert list(fastbn.report(compiled).folded) == ["_orig_mod.bn"]
