"""torch.compile(backend="fastbn") on a GPU, compared with torch's modules."""

import copy

import pytest
import torch

pytestmark = pytest.mark.cuda

SMALL = (8, 6, 14, 14)


def test_compiled_with_reduce_overhead_keeps_running_statistics():
    """backend="fastbn" under CUDA graphs, whose replays update buffers in place."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(6, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3)
    ).cuda()
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend="fastbn", mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(SMALL, device="cuda")
        for m in (compiled, model):
            m(x).sum().backward()
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-3)
