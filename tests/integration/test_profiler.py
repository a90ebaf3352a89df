"""torch.profiler shows passes of every kind as fastbn::batch_norm and fastbn::batch_norm_backward, with sizes."""

import contextlib

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn import ops

pytestmark = pytest.mark.simt_quick

C = 3
SIZES = [4, C, 6, 5]


def modules():
    plain = [fastbn.BatchNorm2d(C), fastbn.BatchNormAct2d(C, activation="silu"), fastbn.SyncBatchNorm(C)]
    ghost = [fastbn.GhostBatchNorm2d(C, virtual_batch_size=2)]
    cases = [pytest.param(m, id=type(m).__name__) for m in [*plain, *ghost]]
    fused = fastbn.convert(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()), fuse=True)
    frozen = fastbn.FrozenBatchNorm2d(C, trainable=True)
    return [*cases, pytest.param(fused, id="fused"), pytest.param(frozen, id="frozen")]


def events(call):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    found = {}
    for event in recorded.events():
        found.setdefault(event.name, []).append(event)
    return found


class Watching(TorchDispatchMode):
    """Wants to see every operator, so that the extension leaves the call to operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("module", modules())
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Watching], ids=["extension", "operators"])
def test_passes_show_with_sizes(module, mode, device):
    module = module.to(device)
    x = torch.randn(SIZES, device=device, requires_grad=True)

    def step():
        with mode():
            y = module(x)
        y.sum().backward()

    step()  # the first call of a fused module captures its forward
    found = events(step)
    (forward,) = found["fastbn::batch_norm"]
    assert forward.input_shapes[:3] == [SIZES, [C], [C]]
    (backward,) = found["fastbn::batch_norm_backward"]
    assert backward.input_shapes[:3] == [SIZES, SIZES, [C]]


def test_parts_of_a_synchronized_pass_show(device):
    """The primitives between collectives, which a SyncBatchNorm of many ranks calls."""
    x = torch.randn(SIZES, device=device)
    batch_stats = ops.gather_stats(ops.stats(x).unsqueeze(0), 0.1, None, None, None)

    def passes():
        ops.forward(x, None, None, batch_stats, 1e-5)
        total = ops.backward_reduce(x, x, None, batch_stats, 1e-5)
        ops.backward_elemt(x, x, None, batch_stats, total, 1e-5, False)

    found = events(passes)
    assert [e.input_shapes[0] for e in found["fastbn::batch_norm"]] == [SIZES]
    assert [e.input_shapes[0] for e in found["fastbn::batch_norm_backward"]] == [SIZES] * 2


def test_forward_and_backward_belong_together(device):
    """The number by which the profiler draws a line from one to the other is that of the autograd node."""
    x = torch.randn(SIZES, device=device, requires_grad=True)
    bn = fastbn.BatchNorm2d(C).to(device)
    found = events(lambda: bn(x).sum().backward())
    (forward,), (node,) = found["fastbn::batch_norm"], found["FastBatchNormBackward"]
    assert forward.sequence_nr == node.sequence_nr >= 0
    with torch.no_grad():
        (alone,) = events(lambda: bn(x))["fastbn::batch_norm"]
    assert alone.sequence_nr == -1, "there is no backward pass that it belongs to"
