"""In: data and a model. Out: the model with the statistics of all of the data in its batch norms (`update_bn`).

Each batch norm's input is reduced to count, mean and sum of squared deviations in float64, batch by batch, and merged
by Chan's formula (Chan, Golub, LeVeque 1983): the result is that of one batch with all of the data in it.
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
    """Moments of the values seen so far: count, and (C,) float64 mean and sum of squared deviations from it."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = self.batches = 0
        self.mean, self.m2 = torch.zeros(2, channels, dtype=torch.float64, device=device)

    def merge(self, count: int, batches: int, mean: Tensor, m2: Tensor) -> None:
        """In place; a side without values adds nothing."""
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


# Batch norms by their names in the model, and what each of them saw.
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
    """Give every batch norm in ``model`` the mean and the unbiased variance of its input over all of ``loader``'s data.

    A running average forgets what it saw, and lags behind the weights; this does neither (Ioffe & Szegedy 2015,
    algorithm 2, lines 7 to 12). Whatever the sizes of the batches, all values count alike, and so the spread of the
    batches' means is part of the variance. For torch.nn's and fastbn's modules, converted, fused or compiled (this
    runs them eagerly); those of FrozenBatchNorm stay as they are, and so do those that no batch reaches.

    What a batch norm's input is depends on those before it, and there are two answers:

    - mode "train", one pass: the model runs in training mode, as in the paper, so that batch norms before it normalize
      with the statistics of their batch, and dropout drops.
    - mode "eval", one pass for every batch norm, in the order in which they are called: the model runs in eval mode,
      and batch norms before it normalize with what they have just been given. These are exactly the statistics of what
      a model sees when it is used, at the price of as many passes as it has batch norms (and one more if some of them
      are never called). A batch norm that is called twice in a forward still normalizes as before in its own pass.

    Args:
        loader: an iterable of batches: tensors, or tuples or lists that begin with one, as
            ``torch.optim.swa_utils.update_bn`` takes them. In mode "eval" it is iterated many times.
        model: any module. It is called with the tensor alone.
        device: where to move the tensor first; None leaves it.
        mode: "train" or "eval".
        progress: called with the loader, returns what to iterate instead: ``tqdm.tqdm`` and ``rich.progress.track``
            show a progress bar.
        process_group: of torch.distributed; None stands for all ranks, if it is initialized. Every rank must call this,
            with data of its own, and all get the statistics of all of the data. Ranks may have any number of batches,
            but where the model itself communicates in its forward (FSDP's, or one with synchronized batch norm).

    Afterwards num_batches_tracked is the number of batches (of all ranks), modes are as before, and momentum was never
    touched. If anything raises, the statistics are as before, too.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a mode that is not there, an iterator in mode "eval", a lazy batch norm, a batch norm that saw one
            value per channel in all.
        RuntimeError: no batch norm saw any data, or ranks differ in which one they call next.
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
        model = model.module  # its replicas, and its broadcasts of buffers, are for training steps
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
    """In the order of calls, each with all those before it done. Returns the pools of all that were called."""
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
    """Pools of the inputs of norms, by name; only_first: of the one that is called before the others."""
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

    # a fused forward gives way to the model's own where a batch norm has hooks
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
    """The pools of all ranks, merged in the order of ranks, by one collective: the same bits everywhere."""
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
    """Compiled code may not look for hooks. Who has not imported torch._dynamo has compiled nothing."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
