"""The paper's two networks in small, with fastbn's batch norms or without.

`Perceptron` is the network of its section 4.1. `Inception` has the modules of its section 4.2 and appendix: branches of
1x1, 1x1 -> 3x3, 1x1 -> 3x3 -> 3x3 (in place of 5x5) and pooling -> 1x1; modules with stride 2 have no 1x1 branch and
pass the maximum through. Batch norm stands before each nonlinearity, and what it follows has no bias.
"""

from dataclasses import dataclass

import torch
from torch import nn

import fastbn


@dataclass(frozen=True)
class Variant:
    norm: bool = True
    activation: str = "relu"
    gain: float = 1.0  # of the initial weights of convolutions
    dropout: float = 0.0  # before the last layer
    per_activation: bool = False  # in the last module: statistics for each place, not for each channel
    response_norm: bool = False  # local response normalization after the first convolution


class Perceptron(nn.Module):
    """Hidden layers of sigmoids. ``inputs``: of the last hidden layer's sigmoids, as the last forward left them."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], norm: bool, std: float) -> None:
        super().__init__()
        layers = []
        for width in hidden:
            linear = nn.Linear(inputs, width, bias=not norm)
            layers.append(nn.Sequential(linear, fastbn.BatchNorm1d(width)) if norm else nn.Sequential(linear))
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 10))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            self.inputs = layer(x)
            x = torch.sigmoid(self.inputs)
        return self.layers[-1](x)


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
    if not variant.norm:
        nn.init.zeros_(conv.bias)
        return nn.Sequential(conv, nn.ReLU() if variant.activation == "relu" else nn.Sigmoid())
    if side:
        shape = (outputs, side, side)
        norm = fastbn.BatchNormAct1d(outputs * side * side, activation=variant.activation)
        return nn.Sequential(conv, nn.Flatten(), norm, nn.Unflatten(1, shape))
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
    """A first convolution with stride 2, a module for each of the strides, the mean over all places, a linear layer."""

    def __init__(self, variant: Variant, side: int, width: int, strides: list[int]) -> None:
        layers, channels, side = [convolution(1, 2 * width, 3, variant, 2)], 2 * width, (side - 1) // 2 + 1
        if variant.response_norm:
            layers.append(nn.LocalResponseNorm(5))
        for number, stride in enumerate(strides, 1):
            side = (side - 1) // stride + 1
            last = variant.per_activation and number == len(strides)
            layers.append(Module(channels, width, variant, stride, side if last else 0))
            channels = layers[-1].outputs
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(variant.dropout), nn.Linear(channels, 10)]
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)  # a quarter faster at these sizes


def make_inception(variant: Variant, plan: dict, images: torch.Tensor, seed: int) -> Inception:
    torch.manual_seed(seed)
    return Inception(variant, images.shape[-1], plan["width"], plan["strides"])
