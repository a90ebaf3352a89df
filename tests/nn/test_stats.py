"""fastbn.update_bn: statistics of a whole data set, compared with numpy over all inputs of each batch norm."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import wide
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import fastbn

pytestmark = pytest.mark.cpu
modes = pytest.mark.parametrize("mode", ["train", "eval"])


class Net(nn.Module):
    """Two batch norms in a row that matter to each other, one on a branch, a dropout, one that is never called."""

    def __init__(self, bn1=nn.BatchNorm1d, bn2=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), bn2(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3), bn2(5, momentum=None)
        self.drop, self.unused = nn.Dropout(0.3), bn2(7)
        self.head, self.bn3 = nn.Linear(5, 4), bn1(4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.head(self.drop(x.mean((2, 3)))))


def batches(sizes=(7, 16, 5, 2), shift=True):
    """Each batch has a mean of its own, so that the spread between batches counts."""
    return [torch.randn(n, 3, 9, 8) + (i if shift else 0) for i, n in enumerate(sizes)]


def norms_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, _NormBase)}


def what_they_see(model, loader):
    """All values that each batch norm is given, (C, count) in float64, in the mode that the model is in."""
    seen, handles = {}, []
    for name, m in norms_of(model).items():

        def look(_, args, name=name):
            x = wide(args[0].double())
            seen.setdefault(name, []).append(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1))

        handles.append(m.register_forward_pre_hook(look))
    with torch.no_grad():
        for batch in loader:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(rows, 1) for name, rows in seen.items()}


def assert_statistics(model, seen, rtol=3e-7):
    """Of the type's rounding, and no more: running_mean and running_var are float32."""
    assert seen
    for name, rows in seen.items():
        m, spread = norms_of(model)[name], rows.std(1, ddof=1)
        mean_error = np.abs(wide(m.running_mean.double()) - rows.mean(1))
        var_error = np.abs(wide(m.running_var.double()) - rows.var(1, ddof=1))
        assert (mean_error <= rtol * (np.abs(rows.mean(1)) + spread)).all(), name
        assert (var_error <= rtol * spread**2).all(), name


KINDS = {
    "torch": lambda: Net(),
    "fastbn": lambda: fastbn.convert(Net()),
    "fused": lambda: fastbn.convert(Net(), fuse=True),
    "ghost": lambda: Net(
        lambda c, **kw: fastbn.GhostBatchNorm1d(c, virtual_batch_size=4, **kw),
        lambda c, **kw: fastbn.GhostBatchNorm2d(c, virtual_batch_size=4, **kw),
    ),
    "activation inside": lambda: Net(fastbn.BatchNormAct1d, fastbn.BatchNormAct2d),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_eval_mode_gives_the_statistics_of_what_eval_sees(kind):
    model, loader = KINDS[kind](), batches()
    model(loader[0])  # running statistics that are not the first ones
    fastbn.update_bn(loader, model, mode="eval")
    seen = what_they_see(model.eval(), loader)
    assert set(seen) == {"bn1", "bn2", "bn3"}
    assert_statistics(model, seen)


@kinds
def test_train_mode_gives_the_statistics_of_what_training_sees(kind):
    model, loader = KINDS[kind](), batches()
    model.drop.p = 0.0
    fastbn.update_bn(loader, model)
    assert_statistics(model, what_they_see(copy.deepcopy(model).train(), loader))
    assert model.bn1.num_batches_tracked == len(loader)


def test_as_torchs_but_for_the_weights_of_batches():
    """With batches of one size that have the same mean and variance torch's average is the same."""
    batch = torch.randn(6, 3, 9, 8)
    loader = [batch] * 4
    ours, torchs = Net(), None
    ours.drop.p = 0.0
    torchs = copy.deepcopy(ours)
    fastbn.update_bn(loader, ours)
    torch.optim.swa_utils.update_bn(loader, torchs)
    count = batch.numel() // 3 // (9 * 8) * (7 * 6)  # of bn1; unbiased for each batch there, once for all here
    factor = (4 * count / (4 * count - 1)) / (count / (count - 1))
    torch.testing.assert_close(ours.bn1.running_mean, torchs.bn1.running_mean)
    torch.testing.assert_close(ours.bn1.running_var, torchs.bn1.running_var * factor)
    assert ours.bn1.num_batches_tracked == torchs.bn1.num_batches_tracked == 4


@modes
def test_uneven_batches_count_by_their_values(mode):
    bn, data = fastbn.BatchNorm1d(3), torch.randn(101, 3) * 7 + 1e3
    for sizes in ([101], [100, 1], [50, 51], [2] * 50 + [1]):
        model = nn.Sequential(copy.deepcopy(bn))
        loader = [*data.split(sizes)]
        if mode == "train" and sizes[-1] == 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                fastbn.update_bn(loader, model, mode=mode)
            continue
        fastbn.update_bn(loader, model, mode=mode)
        assert_statistics(model, {"0": wide(data.double()).T})


@modes
def test_leaves_modes_momentum_and_what_is_never_called(mode):
    model = KINDS["fused"]()
    model.eval()
    model.bn2.train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    fastbn.update_bn(batches(), model, mode=mode)
    assert [m.training for m in model.modules()] == modes
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, None)
    after = model.state_dict()
    for name, value in before.items():
        same = not name.startswith(("bn1.running", "bn2.running", "bn3.running", *(f"bn{i}.num" for i in (1, 2, 3))))
        assert torch.equal(after[name], value) == same, name
    assert not any(m._forward_pre_hooks for m in model.modules())


@modes
def test_nothing_changes_when_the_loader_raises(mode):
    model = fastbn.convert(Net()).eval()
    model.train()(batches()[0])
    model.eval()
    before = copy.deepcopy(model.state_dict())

    class Broken:
        passes = 0

        def __iter__(self):
            yield from batches()
            Broken.passes += 1
            if mode == "train" or Broken.passes == 2:
                raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        fastbn.update_bn(Broken(), model, mode=mode)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m.training or m._forward_pre_hooks for m in model.modules())


def test_loaders_that_torchs_takes():
    model, seen = Net(), []
    for make in (lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x, "label"]):
        twin = copy.deepcopy(model)
        twin.drop.p = 0.0
        fastbn.update_bn([make(x) for x in batches(shift=False, sizes=(4, 4))][:1] * 2, twin, "cpu")
        seen.append(twin.bn1.num_batches_tracked.item())
    assert seen == [2, 2, 2]
    data = torch.utils.data.TensorDataset(torch.randn(20, 3, 9, 8), torch.zeros(20))
    fastbn.update_bn(torch.utils.data.DataLoader(data, batch_size=8), model, mode="eval")
    assert model.bn1.num_batches_tracked == 3


def test_progress_wraps_every_pass():
    passes = []

    def progress(loader):
        passes.append(0)
        for batch in loader:
            passes[-1] += 1
            yield batch

    model = Net()
    fastbn.update_bn(batches(), model, progress=progress)
    assert passes == [4]
    passes.clear()
    fastbn.update_bn(batches(), model, mode="eval", progress=progress)
    assert passes == [4] * 4, "three batch norms, and a pass that finds that the fourth is never called"


def test_a_compiled_model():
    """Its code looks for no hooks, so that it has to be run eagerly."""
    torch._dynamo.reset()
    model = fastbn.convert(Net()).eval()
    compiled, loader = torch.compile(model, backend="eager"), batches((4, 4))
    with torch.no_grad():  # all that code depends on is as it will be in update_bn
        compiled(loader[0])
    fastbn.update_bn(loader, compiled, mode="eval")
    assert_statistics(model, what_they_see(copy.deepcopy(model).eval(), loader))
    torch._dynamo.reset()


def test_half_precision_statistics_are_rounded_once():
    model = nn.Sequential(fastbn.BatchNorm1d(3)).to(torch.bfloat16)
    data = (torch.randn(999, 3) + 3).bfloat16()
    fastbn.update_bn(data.split(10), model, mode="eval")
    torch.testing.assert_close(model[0].running_mean, data.double().mean(0).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(model[0].running_var, data.double().var(0).bfloat16(), rtol=0, atol=0)


def test_padded_sequences_count_valid_positions_only():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = fastbn.MaskedBatchNorm1d(3)

        def forward(self, x):
            return self.bn(x, mask=torch.tensor([4, 1, 0]))

    x, model = torch.randn(3, 3, 4), Masked()
    fastbn.update_bn([x], model)
    valid = torch.cat([x[0], x[1][:, :1]], 1).double()
    torch.testing.assert_close(model.bn.running_mean.double(), valid.mean(1))
    torch.testing.assert_close(model.bn.running_var.double(), valid.var(1))


def test_bad_arguments():
    model, loader = Net(), batches()
    with pytest.raises(TypeError, match=r"update_bn: expected a torch.nn.Module, got list"):
        fastbn.update_bn(model, loader)
    with pytest.raises(ValueError, match="mode should be one of train, eval, not 'test'"):
        fastbn.update_bn(loader, model, mode="test")
    with pytest.raises(ValueError, match="loader is an iterator"):
        fastbn.update_bn(iter(loader), model, mode="eval")
    with pytest.raises(RuntimeError, match="no batch norm saw any data"):
        fastbn.update_bn([], model)
    with pytest.raises(ValueError, match="0 is a lazy batch norm"):
        fastbn.update_bn(loader, nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match="0 saw one value per channel"):
        fastbn.update_bn([torch.randn(1, 3)], nn.Sequential(nn.BatchNorm1d(3)), mode="eval")
    nothing_to_do = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))
    fastbn.update_bn([], nothing_to_do)


SHARES = {"uneven": (4, 5), "in DDP": (4, 5), "one rank has none": (5, 5)}  # where rank 0 ends, and rank 1
RANK = """
import os, sys, torch, fastbn
from torch import distributed, nn
import test_stats
rank, path = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
states = {}
for mode in ("train", "eval"):
    for share, (first, second) in test_stats.SHARES.items():
        torch.manual_seed(0)
        model, data = fastbn.convert(test_stats.Net()), test_stats.batches((6, 3, 9, 4, 2))
        model.drop.p = 0.0
        states[mode, share] = model.state_dict()
        if share == "in DDP":
            model = nn.parallel.DistributedDataParallel(model)
        fastbn.update_bn((data[:first], data[first:second])[rank], model, mode=mode)
torch.save(states, f"{path}.{rank}")
distributed.destroy_process_group()
os._exit(0)  # as in ranks.py: how an interpreter with threads of Gloo ends is not this test's subject
"""


def test_two_ranks_get_what_one_gets(tmp_path):
    """The same bits on both, and up to rounding those of one process with all of the data."""
    meeting = tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(meeting)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [r.wait(timeout=120) for r in ranks] == [0, 0]
    states = [torch.load(f"{meeting}.{rank}") for rank in range(2)]
    for mode, share in states[0]:
        torch.manual_seed(0)
        alone, data = fastbn.convert(Net()), batches((6, 3, 9, 4, 2))
        alone.drop.p = 0.0
        fastbn.update_bn(data, alone, mode=mode)
        first, second = (s[mode, share] for s in states)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, alone.state_dict(), rtol=1e-6, atol=1e-6)
        assert first["bn3.num_batches_tracked"] == 5
