"""Random programs of convolutions, batch norms, activations and adds give the same results fused and unfused."""

import copy
import random

import pytest
import torch
from fusing import assert_same_steps, images
from torch import nn
from torch.nn import functional as F

import fastbn

pytestmark = pytest.mark.cpu

ACTIVATIONS = [
    F.relu, torch.sigmoid, torch.tanh, F.silu, F.relu6, lambda z: F.leaky_relu(z, 0.3), lambda z: F.elu(z, 0.7),
    lambda z: F.relu(z, inplace=True), torch.relu_, lambda z: z.sigmoid_(),
]  # fmt: skip
SUMS = [
    lambda a, b: a + b, lambda a, b: b + a, torch.add, lambda a, b: a.add_(b), lambda a, b: torch.add(a, b, alpha=2),
    lambda a, b: a + b.mean(0, keepdim=True),
]  # fmt: skip
OTHERS = [
    lambda z: z * 2, lambda z: z.view(z.size(0), -1).view_as(z), lambda z: z.transpose(2, 3), lambda z: z.mul_(0.5),
    lambda z: z.detach() * 0.1 + z,
]  # fmt: skip


class Program(nn.Module):
    """A list of instructions on a list of values; it may use each of its batch norms more than once."""

    def __init__(self, seed):
        super().__init__()
        dice = random.Random(seed)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.instructions = [self.instruction(dice) for _ in range(dice.randrange(4, 12))]
        self.outputs = dice.randrange(1, 4)

    def instruction(self, dice):
        """(kind, function or number, how far back its operands are, whether it holds in training alone)"""
        kind = dice.choices(["norm", "act", "sum", "conv", "other"], [5, 5, 4, 2, 1])[0]
        what = {
            "norm": range(4), "conv": range(3), "act": ACTIVATIONS, "sum": SUMS, "other": OTHERS,
        }[kind]  # fmt: skip
        back = [dice.choice([1, 1, 1, 2, 3]) for _ in range(2)]
        return kind, dice.choice(what), back, dice.random() < 0.1

    def forward(self, x):
        values = [x * 1]
        for kind, what, (first, second), only_in_training in self.instructions:
            if only_in_training and not self.training:
                continue
            a, b = (values[-min(n, len(values))] for n in (first, second))
            if kind == "norm":
                values.append(self.norms[what](a))
            elif kind == "conv":
                values.append(self.convs[what](a))
            else:
                values.append(what(a, b) if kind == "sum" else what(a))
        return tuple(values[-self.outputs :])


class Programs(nn.Module):
    """Several in one capture."""

    def __init__(self, seeds):
        super().__init__()
        self.programs = nn.ModuleList(Program(seed) for seed in seeds)

    def forward(self, x):
        return tuple(y for program in self.programs for y in program(x))


def is_differentiable(program):
    """In-place operations may change what autograd has kept: torch raises then, and there is nothing to compare."""
    try:
        for training in (True, False):
            x = images().requires_grad_()
            sum(y.sum() for y in copy.deepcopy(program).double().train(training)(x)).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(60, 180, 60))])
def test_random_programs(first):
    seeds = [seed for seed in range(first, first + 60) if is_differentiable(Program(seed))]
    assert len(seeds) > 20
    model = Programs(seeds).double()
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    assert_same_steps(ours, model, images(), steps=2)
    assert len(fastbn.report(ours).fused) >= 5
