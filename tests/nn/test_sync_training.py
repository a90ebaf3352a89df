"""Synchronized batch norm under conversion, DDP, FSDP2, join and torchrun, compared with one process."""

import copy
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import fastbn

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Net(nn.Module):
    def __init__(self, batch_norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), batch_norm(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), batch_norm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def made(seed=0, dtype=torch.float64, batch_norm=nn.BatchNorm2d):
    torch.manual_seed(seed)
    return Net(batch_norm).to(dtype)


def batch_of(step, samples=6, dtype=torch.float64):
    torch.manual_seed(100 + step)
    return torch.randn(samples, 3, 6, 5, dtype=dtype) * 2 + 1, torch.randint(4, (samples,))


def reference(steps=3, **kinds):
    """A state after some steps of one process on whole batches, and its losses."""
    model = made(**kinds)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = batch_of(step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def train(model, module, steps=3):
    """The same by two ranks, half of the batch each; the losses are means of theirs."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = (t.chunk(2)[dist.get_rank()] for t in batch_of(step))
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(total := loss.detach().clone())
        losses.append(total.item() / 2)
    return module.state_dict(), losses


def assert_same_training(found, right):
    assert found[1] == pytest.approx(right[1], rel=1e-9)
    assert found[0].keys() == right[0].keys()
    for name, t in right[0].items():
        torch.testing.assert_close(found[0][name], t, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def check_ddp():
    # ranks begin differently: DDP sends them the parameters and buffers of rank 0
    module = fastbn.SyncBatchNorm.convert_sync_batchnorm(made(seed=dist.get_rank()))
    with torch.no_grad():
        module.stem[1].running_mean.fill_(dist.get_rank() * 7)
    model = DistributedDataParallel(module)
    assert module.stem[1].running_mean.eq(0).all(), "buffers were not broadcast"
    return train(model, module)


def test_ddp_is_one_process_on_the_whole_batch(pair):
    right = reference()
    for found in pair.run(check_ddp):
        assert_same_training(found, right)


def check_ddp_of_converted():
    """Batch norms of their own: those of rank 0 count, as everywhere under DDP."""
    module = fastbn.convert(made(seed=dist.get_rank()))
    other = DistributedDataParallel(made(seed=dist.get_rank()))
    (state, losses), right = train(DistributedDataParallel(module), module), train(other, other.module)
    assert_same_training((state, losses), right)
    fused = fastbn.convert(made(seed=dist.get_rank()), fuse=True)
    assert_same_training(train(DistributedDataParallel(fused), fused), right)


def test_ddp_wraps_converted_models(pair):
    pair.run(check_ddp_of_converted)


def check_fsdp(sync):
    from torch.distributed.fsdp import fully_shard

    module = made()
    module = fastbn.SyncBatchNorm.convert_sync_batchnorm(module) if sync else fastbn.convert(module)
    for part in (module.stem, module.block, module):
        fully_shard(part)
    state, losses = train(module, module)
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}, losses


def check_fsdp_of_torchs():
    from torch.distributed.fsdp import fully_shard

    module = made()
    for part in (module.stem, module.block, module):
        fully_shard(part)
    state, losses = train(module, module)
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}, losses


def test_fsdp2(pair):
    right = reference()
    for found in pair.run(check_fsdp, True):
        assert_same_training(found, right)
    for found, right in zip(pair.run(check_fsdp, False), pair.run(check_fsdp_of_torchs), strict=True):
        assert_same_training(found, right)


def check_join():
    """Rank 1 has one batch fewer."""
    rank = dist.get_rank()
    model = DistributedDataParallel(fastbn.convert(made()))
    other = DistributedDataParallel(made())
    for m in (model, other):
        with m.join():
            for step in range(3 - rank):
                x, y = batch_of(2 * step + rank)
                nn.functional.cross_entropy(m(x), y).backward()
    for (name, ours), right in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, right.grad, msg=lambda m, n=name: f"{n}: {m}")

    # A synchronized one cannot go on alone: all ranks raise, none hangs.
    model = DistributedDataParallel(fastbn.SyncBatchNorm.convert_sync_batchnorm(made()))
    steps = 0
    with pytest.raises(RuntimeError, match=r"[Ee]xhausted|uneven|join"), model.join(throw_on_early_termination=True):
        for step in range(3 - rank):
            x, y = batch_of(2 * step + rank)
            nn.functional.cross_entropy(model(x), y).backward()
            steps += 1
    # Or it goes on with no samples, which is a batch too.
    module = fastbn.SyncBatchNorm.convert_sync_batchnorm(made())
    model = DistributedDataParallel(module)
    for step in range(3):
        x, y = batch_of(step)
        x, y = (x, y) if rank == 0 or step < 2 else (x[:0], y[:0])
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert module.stem[1].num_batches_tracked == 3
    assert all(p.grad.isfinite().all() for p in module.parameters())
    return steps


def test_uneven_inputs(pair):
    assert pair.run(check_join) == [2, 2]


def check_conversion_of_running_models():
    """Fused forwards run unfused once their batch norms are synchronized, and are right."""
    model = made()
    fused = fastbn.convert(copy.deepcopy(model), fuse=True)
    fused(batch_of(0)[0])
    for bn in (fused.stem[1], fused.block[1]):
        bn.reset_running_stats()
    fastbn.SyncBatchNorm.convert_sync_batchnorm(fused)
    fastbn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = batch_of(1)[0].chunk(2)[dist.get_rank()]
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.state_dict(), model.state_dict())
    both = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(both, x)
    right = made()(torch.cat(both)).chunk(2)[dist.get_rank()]
    torch.testing.assert_close(model(x), right)


def test_fused_models_can_be_synchronized(pair):
    pair.run(check_conversion_of_running_models)


# ---- conversion, in one process ------------------------------------------------------------------------------------


def classes(model):
    return [type(m) for m in model.modules() if "BatchNorm" in type(m).__name__]


def test_convert_sync_batchnorm_keeps_everything():
    act = fastbn.BatchNormAct2d(8, activation="silu")
    model = nn.Sequential(
        nn.BatchNorm1d(8, momentum=None), fastbn.BatchNorm3d(8, eps=0.5), nn.SyncBatchNorm(8), act, nn.Linear(8, 8)
    )
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[1].eval()
    parts, tensors = list(model), {k: id(t) for k, t in (*model.named_parameters(), *model.named_buffers())}
    group = object()
    assert fastbn.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    assert list(model) == parts
    assert {k: id(t) for k, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert classes(model) == [fastbn.SyncBatchNorm] * 3 + [fastbn.SyncBatchNormAct]
    assert all(m.process_group is group for m in list(model)[:4])
    assert model[0].momentum is None and model[1].eps == 0.5 and not model[1].training and act.activation == "silu"
    model[0](torch.randn(3, 8))  # nobody to share a batch with: a local batch norm
    assert calls == [1] and model[0].num_batches_tracked == 1
    assert "activation='silu'" in repr(act) and "SyncBatchNorm(8, eps=0.5" in repr(model[1])
    fastbn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert model[0].process_group is None
    single = nn.BatchNorm2d(3)
    assert fastbn.SyncBatchNorm.convert_sync_batchnorm(single) is single and type(single) is fastbn.SyncBatchNorm


def test_what_is_not_converted_is_named():
    class Mine(nn.BatchNorm2d):
        pass

    parametrized = nn.BatchNorm2d(4)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(Mine(4), nn.LazyBatchNorm2d(), parametrized)
    before = classes(model)
    with pytest.warns(UserWarning) as caught:
        fastbn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert classes(model) == before
    named = [re.match(r"convert_sync_batchnorm: (\d) is not synchronized: (\w+)", str(w.message)) for w in caught]
    assert [n.groups() for n in named] == [("0", "Mine"), ("1", "LazyBatchNorm2d"), ("2", "ParametrizedBatchNorm2d")]


def test_convert_takes_torchs_synchronized_ones_when_told():
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4))
    assert classes(fastbn.convert(model)) == [nn.SyncBatchNorm, fastbn.BatchNorm2d]
    assert classes(fastbn.convert(model, sync=True)) == [fastbn.SyncBatchNorm, fastbn.BatchNorm2d]
    assert model[0].process_group is None
    assert classes(fastbn.revert(model)) == [nn.SyncBatchNorm, nn.BatchNorm2d]


def test_it_is_what_tools_look_for():
    module = fastbn.SyncBatchNorm(4)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm), "torch.optim.swa_utils.update_bn looks for it"
    assert not isinstance(module, nn.SyncBatchNorm), "which DDP refuses on CPUs"
    assert not isinstance(fastbn.SyncBatchNormAct(4), nn.modules.batchnorm._BatchNorm), "it would lose its activation"
    for make in (fastbn.SyncBatchNorm, fastbn.SyncBatchNormAct):
        module = make(4, bias=False, momentum=0.3)
        again = copy.deepcopy(module)
        torch.manual_seed(0)
        x = torch.randn(5, 4, 3)
        torch.testing.assert_close(again(x), module(x))
        assert module.bias is None and module.state_dict().keys() == again.state_dict().keys()
        plain = nn.BatchNorm1d(4)
        make(4).load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


# ---- the example of the README -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_runs_under_torchrun():
    text = (ROOT / "docs" / "ranks.md").read_text()
    command = re.search(r"^torchrun (--\S+ )+(benchmarks/\S+\.py)$", text, re.MULTILINE)
    assert command is not None, "docs/ranks.md has no line that starts torchrun"
    arguments = command[0].split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments[:-1], str(ROOT / arguments[-1]), "--steps", "20"],
        cwd=ROOT / "tests", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(n) for n in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) >= 2 and losses[-1] < losses[0], done.stdout
