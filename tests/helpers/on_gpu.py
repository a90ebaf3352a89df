"""Shapes for every kind of plan, and one training step, for the tests that only a GPU can run."""

import inputs
import pytest
import torch

from fastbn.functional import batch_norm

SMALL = (8, 6, 14, 14)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# Resident and streaming, one block a channel and groups of them, both access patterns.
KINDS = {
    "small": (8, 16, 14, 14),
    "one channel a block": (32, 256, 14, 14),
    "groups": (64, 64, 56, 56),
    "wide": (64, 3, 225, 225),
    "matrix": (4096, 100),
    "many channels": (2, 3000, 7, 7),
}
kinds = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS.keys())
layouts = pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)


def step(x, dy, weight, bias, mean=None, var=None, train=True):
    """Everything that a training step computes, as one tuple."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = batch_norm(leaves[0], mean, var, leaves[1], leaves[2], train)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def problem(shape, layout=inputs.contiguous, dtype=torch.float32, device="cuda"):
    x, dy = layout(shape, dtype=dtype, device=device), layout(shape, dtype=dtype, device=device)
    weight, bias = torch.rand(2, shape[1], device=device) + 0.5
    return x, dy, weight, bias


def assert_same_bits(found, expected, when):
    for i, (ours, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, right), f"result {i} differs {when}"
