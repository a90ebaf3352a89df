"""A ResNet-18 compiled by Inductor, with torch's batch norms and with fastbn's, beside both in eager mode.

One training step (forward, loss, backward) and one eval pass, medians of rounds in which all variants take turns.
The first run compiles for minutes; later ones find what it left in Inductor's cache.

Usage: compile_resnet.py [--seconds S] [--threads T] [--batch N] [--size PIXELS]
"""

import argparse
import copy
import random

import torch
from timing import Protocol, measure
from torch import nn

import fastbn


class Block(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ActBlock(Block):
    """The same with ReLU and add in fastbn's modules, which a compiler sees as one operation."""

    def __init__(self, channels_in, channels, stride):
        super().__init__(channels_in, channels, stride)
        self.bn1, self.bn2 = fastbn.BatchNormAct2d(channels), fastbn.BatchNormAct2d(channels)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.shortcut(x))


def resnet18(Block=Block):
    """He et al. 2016, table 1."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels_in = 64
    for i, channels in enumerate((64, 128, 256, 512)):
        layers += [Block(channels_in, channels, 1 if i == 0 else 2), Block(channels, channels, 1)]
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def variants(model, training):
    ours, fused = fastbn.convert(copy.deepcopy(model)), fastbn.convert(copy.deepcopy(model), fuse=True)
    found = {
        "torch": model,
        "fastbn": ours,
        "fastbn fused": fused,
        "torch compiled": torch.compile(copy.deepcopy(model), fullgraph=True),
        "fastbn compiled": torch.compile(copy.deepcopy(ours), fullgraph=True),
        "BatchNormAct compiled": torch.compile(fastbn.convert(resnet18(ActBlock)), fullgraph=True),
    }
    if not training:
        found["folded, compiled"] = torch.compile(fastbn.fold(copy.deepcopy(model).eval()), fullgraph=True)
    return found


def step(model, x):
    def run():
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def without_gradients(model, x):
    def run():
        with torch.no_grad():
            model(x)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each of the two comparisons")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--passes", nargs="+", choices=("train", "eval"), default=["train", "eval"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    for name in arguments.passes:
        make = step if name == "train" else without_gradients
        training = name == "train"
        calls = {who: make(model.train(training), x) for who, model in variants(resnet18(), training).items()}
        seconds = measure(calls, Protocol(arguments.seconds, least_rounds=3), random.Random(0))
        print(name, *(f"{who} {s['median'] * 1e3:.1f} ms" for who, s in seconds.items()), sep=", ")


if __name__ == "__main__":
    main()
