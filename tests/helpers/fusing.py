"""Models with batch norms that fuse, and the comparison of a fused model with the one that it was made from."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import fastbn

RELU, ADD_RELU, ADD = "batch_norm + relu", "batch_norm + add + relu", "batch_norm + add"


def images(n=4, c=6, size=5, dtype=torch.float64):
    return torch.randn(n, c, size, size, dtype=dtype)


def conv(groups=1, kernel=3):
    return nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=groups)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def assert_same_steps(ours, original, *inputs, steps=3, **kwargs):
    """Outputs, gradients, changed inputs and states of the two, in training, in eval and in training again."""
    for training in (True, False, True):
        results = []
        for model in (ours, original):
            model.train(training)
            torch.manual_seed(3)
            for _ in range(steps):
                model.zero_grad()
                leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
                used = [x * 1 if x.is_floating_point() else x for x in leaves]  # so that in-place operations may
                y = as_tuple(model(*used, **kwargs))
                sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in y).backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append([y, used, [x.grad for x in leaves], grads, model.state_dict()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def fuse(model, *inputs, fused, **kwargs):
    """Convert a copy, compare it with the model, and return it. fused: the patterns expected, by name."""
    model = model.double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, *(inputs or (images(),)), **kwargs)
    assert fastbn.report(ours).fused == fused
    return ours


class Of(nn.Module):
    """A module with the forward that a test gives it: (self, x)."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


class Branches(nn.Module):
    """Many small forwards in one capture, by name: {name: (self, x) -> tensor}."""

    def __init__(self, forwards, **children):
        super().__init__()
        self.forwards = forwards
        for name in forwards:
            setattr(self, name, simple(None, **{k: copy.deepcopy(m) for k, m in children.items()}))

    def forward(self, x):
        return tuple(y for name, f in self.forwards.items() for y in as_tuple(f(getattr(self, name), x)))


def simple(forward, **children):
    return Of(forward, conv=conv(), bn=nn.BatchNorm2d(6), **children)


class Bottleneck(nn.Module):
    """As in torchvision: one ReLU module for all, in place, and an add in place."""

    def __init__(self, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = conv(kernel=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = conv(kernel=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(kernel=1), nn.BatchNorm2d(6)) if downsample else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(True), Bottleneck())
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x):
        return self.layer1(self.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


RESNET = {
    "bn1": RELU,
    **{f"layer1.{i}.bn{k}": ADD_RELU if k == 3 else RELU for i in (0, 1) for k in (1, 2, 3)},
}
