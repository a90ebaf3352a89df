"""Small models with fastbn's or torch's batch norms, and a comparison of one training step of the two."""

import torch
from torch import nn

import fastbn


class Net(nn.Module):
    """Convolution, batch norm, ReLU, pooling, batch norm on (N, C): both kinds of shape in one model."""

    def __init__(self, two=nn.BatchNorm2d, one=nn.BatchNorm1d, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn2 = two(5, **kwargs)
        self.bn1 = one(5, **kwargs)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.bn2(self.conv(x)))
        return self.fc(self.bn1(x.mean((2, 3))))


def nets(**kwargs):
    ours, torchs = Net(fastbn.BatchNorm2d, fastbn.BatchNorm1d, **kwargs), Net(**kwargs)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def images(batch=4, requires_grad=False):
    return torch.randn(batch, 3, 6, 6).requires_grad_(requires_grad)


def assert_same_step(ours, torchs, x):
    """Output, gradients and buffers after one forward and backward of each."""
    results = []
    for model in (ours, torchs):
        leaf = x.detach().clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        owner = getattr(model, "_orig_mod", model)
        results.append([y, leaf.grad, {n: p.grad for n, p in owner.named_parameters()}, owner.state_dict()])
        owner.zero_grad()
    if isinstance(getattr(ours, "_orig_mod", ours), torch.fx.GraphModule):  # has only buffers in use
        results[1][3] = {name: value for name, value in results[1][3].items() if name in results[0][3]}
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
