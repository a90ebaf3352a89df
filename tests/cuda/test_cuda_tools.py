"""Whole models on GPUs: graphed callables, compiled graphs, streams, devices; compared with plain calls."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbn

pytestmark = pytest.mark.cuda

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
KINDS = {
    "batch norm": lambda: fastbn.convert(network()),
    "fused": lambda: fastbn.convert(network(), fuse=True),
    "ghost": lambda: nn.Sequential(nn.Conv2d(6, 8, 3), fastbn.GhostBatchNorm2d(8, virtual_batch_size=3), nn.ReLU()),
    "frozen": lambda: fastbn.freeze(network()),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def network():
    return nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def batches(n=4, device="cuda"):
    return [torch.randn(8, 6, 14, 14, device=device) for _ in range(n)]


def step(call, owner, x):
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    grads = torch.autograd.grad(y.square().mean(), [leaf, *(p for p in owner.parameters() if p.requires_grad)])
    return [y.detach().clone(), *(g.clone() for g in grads)]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_graphed_callables(kind):
    """Warm-up and capture are forward passes as well: state is put back after them, and replays update it."""
    plain = KINDS[kind]().cuda()
    model = copy.deepcopy(plain)
    before = copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (batches(1)[0].requires_grad_(),))
    model.load_state_dict(before)
    for x in batches():
        assert_same(step(graphed, model, x), step(plain, plain, x))
    assert_same(model.state_dict(), plain.state_dict())


@kinds
def test_two_graphed_callables_in_turns(kind):
    models = [KINDS[kind]().cuda() for _ in range(2)]
    plains = [copy.deepcopy(m) for m in models]
    states = [copy.deepcopy(m.state_dict()) for m in models]
    example = batches(1)[0].requires_grad_()
    graphed = [torch.cuda.make_graphed_callables(m, (example,)) for m in models]
    for m, state in zip(models, states, strict=True):
        m.load_state_dict(state)
    streams = [torch.cuda.Stream() for _ in models]
    for x in batches():
        torch.cuda.synchronize()
        found = []
        for call, model, stream in zip(graphed, models, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(call, model, x))
        torch.cuda.synchronize()
        for results, plain in zip(found, plains, strict=True):
            assert_same(results, step(plain, plain, x))


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_reduce_overhead(kind, training):
    """torch.compile into CUDA graphs: recorded, then replayed, with other inputs each time."""
    torch._dynamo.reset()
    plain = KINDS[kind]().cuda().train(training)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for x in batches(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(step(compiled, model, x), step(plain, plain, x))
    assert_same(model.state_dict(), plain.state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_statistics_are_updated_once_under_checkpointing(reentrant):
    """Backward runs in a thread of its own here."""
    plain = fastbn.convert(network()).cuda()
    model, x = copy.deepcopy(plain), batches(1)[0]
    expected = step(plain, plain, x)
    with fastbn.update_stats_once():
        leaf = x.clone().requires_grad_()
        y = checkpoint(model, leaf, use_reentrant=reentrant)
        y.square().mean().backward()
    assert_same([y, leaf.grad, *(p.grad for p in model.parameters())], expected)
    assert_same(model.state_dict(), plain.state_dict())


def test_ghost_against_a_loop_over_chunks():
    for shape, size in (((4096, 512), 128), ((257, 64), 128), ((10, 8, 7, 7), 4)):
        cls, torchs = {2: (fastbn.GhostBatchNorm1d, nn.BatchNorm1d), 4: (fastbn.GhostBatchNorm2d, nn.BatchNorm2d)}[
            len(shape)
        ]
        ours, torchs = cls(shape[1], virtual_batch_size=size).cuda(), torchs(shape[1]).cuda()
        chunks = [*torch.arange(shape[0]).split(size)]
        if len(chunks[-1]) == 1 and len(shape) == 2:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        sizes = [len(c) for c in chunks]
        x = torch.randn(shape, device="cuda")
        expected = step(lambda t, m=torchs, s=sizes: torch.cat([m(c) for c in t.split(s)]), torchs, x)
        assert_same(step(ours, ours, x), expected)
        assert_same(ours.state_dict(), torchs.state_dict())


def test_update_bn():
    model, loader = fastbn.convert(network()), [x.cpu() for x in batches()]
    twin = copy.deepcopy(model).cuda()
    for m, device in ((model, None), (twin, "cuda")):
        fastbn.update_bn(loader, m, device, mode="eval")
    assert_same({n: t.cpu() for n, t in twin.state_dict().items()}, model.state_dict())


@two_devices
@kinds
def test_a_model_on_two_devices(kind):
    """The first half on one GPU, the second half on another, neither of them current for the other."""
    halves = [KINDS[kind](), nn.Conv2d(8, 6, 1), KINDS[kind]()]
    plain = nn.Sequential(*copy.deepcopy(halves)).cuda()
    first, second = nn.Sequential(*halves[:2]).cuda(), halves[2].to("cuda:1")

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(self.first(x).to("cuda:1")).to("cuda:0")

    split = Split()
    for x in batches():
        found, expected = step(split, split, x), step(plain, plain, x)
        assert_same([t.to("cuda:0") for t in found], expected)
    assert torch.cuda.current_device() == 0


@two_devices
def test_data_parallel():
    plain = fastbn.convert(network()).cuda().eval()
    parallel = nn.DataParallel(copy.deepcopy(plain), [0, 1])
    for x in batches():
        assert_same(parallel(x), plain(x))
