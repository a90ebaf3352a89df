"""In: sizes, and which of the paper's variants. Out: its two networks in small, with fastbn's batch norms or without.

`Perceptron` is the network of its section 4.1. `Inception` has the modules of its section 4.2 and appendix: branches of
1x1, 1x1 -> 3x3, 1x1 -> 3x3 -> 3x3 (in place of 5x5) and pooling -> 1x1; modules with stride 2 have no 1x1 branch and
pass the maximum through. Batch norm stands before each nonlinearity, and what it precedes has no bias.
"""

from dataclasses import dataclass

import torch
from torch import nn

import fastbn

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Variant:
    norm: bool = True
    activation: str = "relu"
    gain: float = 1.0  # of the initial weights of convolutions
    dropout: float = 0.0  # before the last layer
    per_activation: bool = False  # in the last module: statistics for each place, not for each channel


class Perceptron(nn.Module):
    """Hidden layers of sigmoids. ``inputs``: of the last hidden layer's sigmoids, as the last forward left them."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], norm: bool, std: float) -> None:
        super().__init__()
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in hidden:
            self.linears.append(nn.Linear(inputs, width, bias=not norm))
            self.norms.append(fastbn.BatchNorm1d(width) if norm else nn.Identity())
            inputs = width
        self.last = nn.Linear(inputs, 10)
        for linear in (*self.linears, self.last):
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            self.inputs = norm(linear(x))
            x = torch.sigmoid(self.inputs)
        return self.last(x)


class PerActivation(nn.Module):
    """Batch norm as for a fully connected layer, then the activation."""

    def __init__(self, channels: int, side: int, activation: str) -> None:
        super().__init__()
        self.norm = fastbn.BatchNormAct1d(channels * side * side, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flatten(1)).view_as(x)


def convolution(inputs: int, outputs: int, size: int, variant: Variant, stride: int = 1, side: int = 0) -> nn.Module:
    """Convolution, batch norm if the variant has it, activation. ``side``: of the output, where statistics are for
    each place."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=not variant.norm)
    if variant.activation == "relu":
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        nn.init.xavier_normal_(conv.weight)
    with torch.no_grad():
        conv.weight *= variant.gain
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if not variant.norm:
        return nn.Sequential(conv, ACTIVATIONS[variant.activation]())
    if side:
        return nn.Sequential(conv, PerActivation(outputs, side, variant.activation))
    return nn.Sequential(conv, fastbn.BatchNormAct2d(outputs, activation=variant.activation))


class Module(nn.Module):
    """Branches beside each other. Four with ``width`` outputs each; with stride 2, two such, and the input's maximum.

    The 1x1 convolutions that read the same input are computed as one, which is the same and costs less.
    """

    def __init__(self, inputs: int, width: int, variant: Variant, stride: int = 1, side: int = 0) -> None:
        super().__init__()
        self.width = width
        large = side * stride
        self.ones = convolution(inputs, (3 if stride == 1 else 2) * width, 1, variant, side=large)
        self.three = convolution(width, width, 3, variant, stride, side)
        self.twice = nn.Sequential(
            convolution(width, width, 3, variant, side=large), convolution(width, width, 3, variant, stride, side)
        )
        if stride == 1:
            self.pool = nn.Sequential(nn.AvgPool2d(3, 1, padding=1), convolution(inputs, width, 1, variant, side=side))
        else:
            self.pool = nn.MaxPool2d(3, stride, padding=1)
        self.outputs = 4 * width if stride == 1 else 2 * width + inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three, twice, *one = self.ones(x).split(self.width, 1)
        return torch.cat([*one, self.three(three), self.twice(twice), self.pool(x)], 1)


class Inception(nn.Sequential):
    """A first convolution with stride 2, a module for each of ``strides``, the mean over all places, a linear layer."""

    def __init__(self, variant: Variant, side: int, width: int = 8, strides: tuple[int, ...] = (1, 2, 1)) -> None:
        layers, channels, side = [convolution(1, 2 * width, 3, variant, 2)], 2 * width, (side - 1) // 2 + 1
        for number, stride in enumerate(strides, 1):
            side = (side - 1) // stride + 1
            last = variant.per_activation and number == len(strides)
            layers.append(Module(channels, width, variant, stride, side if last else 0))
            channels = layers[-1].outputs
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if variant.dropout:
            layers.append(nn.Dropout(variant.dropout))
        super().__init__(*layers, nn.Linear(channels, 10))
        self.to(memory_format=torch.channels_last)  # a quarter faster at these sizes
