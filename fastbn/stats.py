"""`update_bn`: running statistics over a whole data set.

The input of each batch norm is reduced to count, mean and sum of squared deviations in float64, batch by batch, and
merged by Chan's formula (Chan, Golub, LeVeque 1983). The result is that of one batch with all of the data.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from . import ops
from .arguments import check_memory, check_module
from .nn.masked import MaskedBatchNorm1d

MODES = ("train", "eval")


class _Pool:
    """Moments of the values so far: count, and float64 (C,) mean and sum of squared deviations from the mean."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = self.batches = 0
        self.mean, self.m2 = torch.zeros(2, channels, dtype=torch.float64, device=device)

    def merge(self, count: int, batches: int, mean: Tensor, m2: Tensor) -> None:
        """Merge the moments of more values into this, in place."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count, self.batches = total, self.batches + batches

    def see(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        count = values.numel() // values.size(1)
        _, moments = ops.forward(values, None, None, None, 1.0)
        self.merge(count, 1, moments[0], moments[1] * count)


# The batch norms of a model by name, and the moments of their inputs.
Norms: TypeAlias = dict[str, Any]
Pools: TypeAlias = dict[str, _Pool]


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    mode: str = "train",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    process_group: Any | None = None,
) -> None:
    """Set the running statistics of every batch norm to mean and unbiased variance of its input over all the data.

    A running average weights recent batches more, and was taken with older weights of the model; this computes the
    exact statistics (Ioffe & Szegedy 2015, algorithm 2, lines 7 to 12). All values have the same weight, whatever the
    sizes of the batches, so that differences between the means of batches are part of the variance. It works for
    torch.nn's and fastbn's modules, converted, fused or compiled (they run eagerly meanwhile). FrozenBatchNorm modules
    do not change, nor do batch norms that no batch reaches.

    The input of a batch norm depends on the batch norms before it. There are two modes:

    - "train", one pass over the data: the model runs in training mode, as in the paper. Batch norms normalize with the
      statistics of their batch, and dropout is active.
    - "eval", one pass for every batch norm, in the order of their calls: the model runs in eval mode, and the batch
      norms before it normalize with the statistics that they have just been given. The result is exact for the model
      as it is used in eval, and takes as many passes as there are batch norms (one more if some are never called). A
      batch norm that is called twice in a forward normalizes with its old statistics in its own pass.

    Afterwards num_batches_tracked is the number of batches (of all ranks). Training modes of modules and momentum do
    not change. If an exception is raised, the statistics do not change either.

    Args:
        loader: an iterable of batches, which are tensors, or tuples or lists whose first element is one, as for
            ``torch.optim.swa_utils.update_bn``. In mode "eval" it is iterated many times.
        model: any module. It is called with the tensor alone.
        device: where to move the tensor first; None leaves it where it is.
        mode: "train" or "eval".
        progress: a function that wraps the loader, such as ``tqdm.tqdm`` or ``rich.progress.track``.
        process_group: of torch.distributed; None for all ranks, if it is initialized. Every rank has to call this with
            its own part of the data, and gets the statistics of all the data. Ranks may have different numbers of
            batches, unless the model's forward communicates (FSDP, synchronized batch norm).

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: the mode is unknown, the loader is an iterator in mode "eval", a batch norm is lazy, or one has seen
            one value per channel in all.
        RuntimeError: no batch norm has seen any data, or ranks differ in which batch norm they call next.
    """
    check_module(model, "update_bn")
    if mode not in MODES:
        raise ValueError(f"fastbn.update_bn: mode should be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "eval" and iter(loader) is loader:
        raise ValueError(
            "fastbn.update_bn: loader is an iterator, which ends after one pass, and mode 'eval' makes one for each "
            "batch norm; give a DataLoader, a list or the like"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # without replicas and without broadcasts of buffers
    norms = {name: m for name, m in model.named_modules() if _is_counted(m)}
    for name, m in norms.items():
        if is_lazy(m.running_mean):
            raise ValueError(f"fastbn.update_bn: {name} is a lazy batch norm; run the model on one batch first")
    if not norms:
        return
    for name, m in norms.items():
        check_memory(**{f"{name}.{buffer}": t for buffer, t in m._buffers.items()})
    batches = functools.partial(_run, loader, model, device, progress)
    with _unchanged_if_it_raises(norms.values()), _modes_kept(model), _eagerly():
        model.train(mode == "train")
        if mode == "train":
            pools = _merged(_collect(norms, batches), process_group)
        else:
            pools = _one_by_one(norms, batches, process_group)
        if not any(pool.count for pool in pools.values()):
            raise RuntimeError(
                "fastbn.update_bn: no batch norm saw any data: the loader is empty, or the model does not call them"
            )
        if mode == "train":
            _store(norms, pools)


def _one_by_one(norms: Norms, batches: Callable[[], None], group: Any | None) -> Pools:
    """Mode "eval": compute and store statistics in the order of calls. Returns the pools of all that were called."""
    waiting, done = dict(norms), Pools()
    while waiting:
        pools = _merged(_collect(waiting, batches, only_first=True), group)
        seen = {name: pool for name, pool in pools.items() if pool.count}
        if len(seen) > 1:
            raise RuntimeError(f"fastbn.update_bn: which batch norm comes next differs between ranks: {sorted(seen)}")
        if not seen:
            break
        _store(norms, seen)
        done.update(seen)
        waiting.pop(*seen)
    return done


def _is_counted(module: nn.Module) -> bool:
    if not isinstance(module, _NormBase) or isinstance(module, _InstanceNorm):
        return False
    return all(getattr(module, name, None) is not None for name in ("running_mean", "running_var"))


def _collect(norms: Norms, batches: Callable[[], None], only_first: bool = False) -> Pools:
    """Run the batches and pool the inputs of norms. only_first: of the one that is called first, alone."""
    pools = {name: _Pool(m.num_features, m.running_mean.device) for name, m in norms.items()}
    first: list[str] = []

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if only_first and not first:
            first.append(name)
        if only_first and name != first[0]:
            return
        if isinstance(module, MaskedBatchNorm1d):
            pools[name].see(module.valid(*args, **kwargs))
        else:
            pools[name].see(args[0] if args else kwargs["input"])

    # Where a batch norm has hooks, the model's own forward runs, not the fused one.
    handles = [m.register_forward_pre_hook(functools.partial(see, name), with_kwargs=True) for name, m in norms.items()]
    try:
        batches()
    finally:
        for handle in handles:
            handle.remove()
    return pools


def _run(
    loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None,
) -> None:  # fmt: skip
    for batch in loader if progress is None else progress(loader):
        input = batch[0] if isinstance(batch, (tuple, list)) else batch
        model(input if device is None else input.to(device))


def _merged(pools: Pools, group: Any | None) -> Pools:
    """Merge the pools of all ranks in the order of ranks, with one collective: the same bits on every rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return pools
    device = next(iter(pools.values())).mean.device
    counts = torch.tensor([[p.count, p.batches] for p in pools.values()], dtype=torch.float64, device=device)
    row = torch.cat([counts.flatten(), *(t.to(device) for p in pools.values() for t in (p.mean, p.m2))])
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(rows, row, group)
    merged = {name: _Pool(p.mean.numel(), p.mean.device) for name, p in pools.items()}
    sizes = [p.mean.numel() for p in pools.values() for _ in range(2)]
    for row in rows:
        counts, *moments = row.split([2 * len(pools), *sizes])
        for i, pool in enumerate(merged.values()):
            count, batches = counts[2 * i : 2 * i + 2].tolist()
            mean, m2 = (t.to(pool.mean.device) for t in moments[2 * i : 2 * i + 2])
            pool.merge(int(count), int(batches), mean, m2)
    return merged


def _store(norms: Norms, pools: Pools) -> None:
    for name, pool in pools.items():
        if pool.count == 0:
            continue
        if pool.count == 1:
            raise ValueError(f"fastbn.update_bn: {name} saw one value per channel, which has no variance")
        module = norms[name]
        module.running_mean.copy_(pool.mean)
        module.running_var.copy_(pool.m2 / (pool.count - 1))
        if (counter := getattr(module, "num_batches_tracked", None)) is not None:
            counter.fill_(pool.batches)


@contextlib.contextmanager
def _unchanged_if_it_raises(norms: Iterable[nn.Module]) -> Iterator[None]:
    kept = [(t, t.clone()) for m in norms for t in m._buffers.values() if t is not None]
    try:
        yield
    except BaseException:
        for t, before in kept:
            t.copy_(before)
        raise


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    kept = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in kept:
            m.training = training


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Compiled code does not call hooks, so it runs eagerly. Without torch._dynamo imported nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
