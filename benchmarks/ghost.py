"""Ghost and frozen batch norm against the usual code for them: medians of rounds in which all variants take turns.

ghost: (N, C) in chunks, forward + backward, against torch.nn.BatchNorm1d called on one chunk after the other.
frozen: forward, and forward + backward, against the two tensor operations of torchvision's FrozenBatchNorm2d.

Usage: ghost.py [--seconds S] [--threads T]
"""

import argparse
import functools
import random

import torch
from timing import Protocol, measure
from torch import nn

import fastbn

GHOST = [(4096, 512, 128), (4096, 512, 256), (16384, 64, 128), (1024, 1024, 128)]  # N, C, samples in a chunk
FROZEN = [(16, 64, 56, 56), (16, 256, 14, 14)]


def loop_over_chunks(bn, virtual_batch_size):
    return lambda x: torch.cat([bn(chunk) for chunk in x.split(virtual_batch_size)])


class TwoOperations(nn.Module):
    """y = x * scale + shift, as torchvision writes it."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen

    def forward(self, x):
        f = self.frozen
        scale = (f.weight * (f.running_var + f.eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (f.bias.view(1, -1, 1, 1) - f.running_mean.view(1, -1, 1, 1) * scale)


def step(call, x, dy, parameters):
    return lambda: torch.autograd.grad(call(x), [x, *parameters], dy)


def show(title, seconds):
    ours, theirs = seconds["fastbn"]["median"], seconds["torch"]["median"]
    noise = seconds["fastbn again"]["median"] / ours
    print(
        f"{title:45} fastbn {ours * 1e3:.3f} ms  torch {theirs * 1e3:.3f} ms  {theirs / ours:.2f} x  noise {noise:.2f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="for each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    protocol, rng = Protocol(arguments.seconds), random.Random(0)
    for n, c, v in GHOST:
        ours, theirs = fastbn.GhostBatchNorm1d(c, virtual_batch_size=v), nn.BatchNorm1d(c)
        x, dy = torch.randn(n, c, requires_grad=True), torch.randn(n, c)
        calls = {"fastbn": ours, "fastbn again": ours, "torch": loop_over_chunks(theirs, v)}
        torch.testing.assert_close(*(step(calls[name], x, dy, [])()[0] for name in ("fastbn", "torch")))
        steps = {
            name: step(call, x, dy, [*(theirs if name == "torch" else ours).parameters()])
            for name, call in calls.items()
        }
        show(f"ghost {n} x {c} in chunks of {v}, step", measure(steps, protocol, rng))
    for shape in FROZEN:
        ours = fastbn.FrozenBatchNorm2d(shape[1])
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
        calls = {"fastbn": ours, "fastbn again": ours, "torch": TwoOperations(ours)}
        forwards = {name: functools.partial(call, x) for name, call in calls.items()}
        show(f"frozen {shape}, forward", measure(forwards, protocol, rng))
        show(f"frozen {shape}, step", measure({n: step(c, x, dy, []) for n, c in calls.items()}, protocol, rng))


if __name__ == "__main__":
    main()
