"""Running statistics under torch.utils.checkpoint, and with several micro-batches in a step."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fastbn

pytestmark = pytest.mark.cpu
modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = fastbn.MaskedBatchNorm1d(6)

    def forward(self, x):
        return self.bn(x, torch.full((len(x),), x.size(2) - 1))


BLOCKS = {
    "batch norm": lambda: fastbn.convert(nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU())),
    "cumulative": lambda: fastbn.BatchNorm1d(6, momentum=None),
    "fused": lambda: fastbn.convert(nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), fuse=True),
    "activation inside": lambda: fastbn.BatchNormAct1d(6),
    "ghost": lambda: fastbn.GhostBatchNorm1d(6, virtual_batch_size=4),
    "masked": Padded,
}


def step(block, reentrant):
    """Outputs and gradients of two steps; reentrant None: without checkpointing."""
    torch.manual_seed(0)
    results = []
    for _ in range(2):
        x = torch.randn(10, 6, 9, requires_grad=True)
        y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
        results += [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]
    return results


@modes
@pytest.mark.parametrize("kind", BLOCKS)
def test_statistics_are_updated_once(kind, reentrant):
    plain = BLOCKS[kind]()
    block, twice = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = step(plain, None)
    with fastbn.update_stats_once():
        found = step(block, reentrant)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(block.state_dict(), plain.state_dict(), rtol=0, atol=0)
    step(twice, reentrant)  # as torch's: this is what has to be asked for
    counters = [[t.item() for n, t in m.state_dict().items() if "num_batches" in n] for m in (twice, plain)]
    assert counters[0] == [2 * n for n in counters[1]]


@modes
def test_a_model_of_which_a_part_is_checkpointed(reentrant):
    plain = nn.Sequential(*(BLOCKS["batch norm"]() for _ in range(3)), nn.BatchNorm1d(6))
    plain = fastbn.convert(plain)
    model, x = copy.deepcopy(plain), torch.randn(4, 6, 12, requires_grad=True)
    plain(x).sum().backward()
    with fastbn.update_stats_once():
        model[3](checkpoint_sequential(model[:3], 2, x, use_reentrant=reentrant)).sum().backward()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_only_within_the_context_and_only_in_backward():
    bn, x = fastbn.BatchNorm1d(6), torch.randn(4, 6, requires_grad=True)
    with pytest.raises(OSError, match="lost"), fastbn.update_stats_once():
        bn(x), bn(x)
        assert bn.num_batches_tracked == 2
        with fastbn.update_stats_once():
            pass
        checkpoint(bn, x, use_reentrant=False).sum().backward()
        assert bn.num_batches_tracked == 3, "the outer context is still open"
        raise OSError("lost")
    checkpoint(bn, x, use_reentrant=False).sum().backward()
    assert bn.num_batches_tracked == 5, "closed"


def test_compiled_checkpoints_update_once_by_themselves():
    """What torch.compile recomputes in backward is what has no side effects."""
    torch._dynamo.reset()
    plain, x = fastbn.BatchNorm1d(6), torch.randn(8, 6)
    bn, grads = copy.deepcopy(plain), []
    compiled = torch.compile(lambda t: checkpoint(bn, t, use_reentrant=False), backend="aot_eager", fullgraph=True)
    for call in (plain, compiled):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(bn.state_dict(), plain.state_dict())
    torch._dynamo.reset()


def test_a_closed_form_without_the_context():
    """Two updates with 1 - sqrt(1 - m) are one with m."""
    once, twice = fastbn.BatchNorm1d(6, momentum=0.1), fastbn.BatchNorm1d(6, momentum=1 - 0.9**0.5)
    x = torch.randn(4, 6, requires_grad=True)
    once(x)
    checkpoint(twice, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close([*twice.buffers()][:2], [*once.buffers()][:2])


def test_momentum_of_gradient_accumulation():
    """After k micro-batches with 1 - (1 - m)^(1/k), what was there before counts as after one batch with m."""
    k, m = 4, 0.1
    bn = fastbn.BatchNorm1d(6, momentum=1 - (1 - m) ** (1 / k))
    nn.init.constant_(bn.running_mean, 100.0)
    batch = torch.randn(32, 6)
    for micro in batch.chunk(k):
        bn(micro - micro.mean(0))
    torch.testing.assert_close(bn.running_mean, torch.full((6,), 100.0 * (1 - m)))


def prefer_recompute(context, operator, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_batch_norm(context, operator, *args, **kwargs):
    is_batch_norm = str(operator) in ("fastbn.forward.default", "fastbn.ghost_forward.default")
    return CheckpointPolicy.MUST_SAVE if is_batch_norm else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {
    "not selective": {},
    "recompute": {"context_fn": partial(create_selective_checkpoint_contexts, prefer_recompute)},
    "save": {"context_fn": partial(create_selective_checkpoint_contexts, save_batch_norm)},
}
BATCH_NORMS = {
    "plain": lambda: fastbn.BatchNorm1d(6),
    "cumulative": lambda: fastbn.BatchNorm1d(6, momentum=None),
    "act": lambda: fastbn.BatchNormAct1d(6, activation="silu"),
    "ghost": lambda: fastbn.GhostBatchNorm1d(6, virtual_batch_size=5),
    "synchronized": lambda: fastbn.SyncBatchNorm(6),
}


@pytest.mark.parametrize("last", [True, False], ids=["last", "not last"])
@pytest.mark.parametrize("early_stop", [True, False], ids=["early stop", "to the end"])
@pytest.mark.parametrize("contexts", SELECTIVE)
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_counter_and_statistics_go_together(kind, contexts, early_stop, last):
    """However often a checkpoint repeats a batch, and wherever it stops: statistics are those of the counter."""
    bn, x = BATCH_NORMS[kind](), torch.randn(10, 6, 9)
    right = copy.deepcopy(bn)
    block = bn if last else nn.Sequential(bn, nn.Tanh())
    with set_checkpoint_early_stop(early_stop):
        y = checkpoint(block, x.requires_grad_(), use_reentrant=False, **SELECTIVE[contexts])
        y.square().sum().backward()
    right(x)
    if bn.num_batches_tracked != right.num_batches_tracked:
        right(x)
    torch.testing.assert_close(bn.state_dict(), right.state_dict())
