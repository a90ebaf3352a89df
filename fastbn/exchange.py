"""In: a process group, and what each of its ranks has to tell of every channel. Out: what all of them told.

Ranks of one machine on CPUs tell each other through memory that all of them have mapped, the others through the group.
Which way it is the ranks agree on with the group's own collectives, once, in the first exchange.
"""

import os
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from .ops import _C

FOLDER = Path("/dev/shm")  # memory with names, where there is such a thing
CHANNELS = 8192  # at once, for which a rank takes 512 KB

_choice = os.environ.get("FASTBN_SHARED_MEMORY") or "1"
if _choice not in ("0", "1"):
    raise ImportError(f"fastbn: FASTBN_SHARED_MEMORY should be 0 or 1, not {_choice!r}")
WANTED = _choice == "1"

_agreed = weakref.WeakKeyDictionary()

# Under the name that this torch does not warn of.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def through_group(values, ranks, group):
    """The tensors of all ranks, one after another, by the group's collective: (ranks, *values.shape)."""
    all_values = values.new_empty((ranks * values.size(0), *values.shape[1:]))
    _all_gather(all_values, values, group)
    return all_values.view(ranks, *values.shape)


def exchange_of(group):
    """The `_C.Exchange` of this rank, or None where the ranks of the group have no memory in common.

    The first call for a group is a collective of it. A group that is not Gloo's has none; neither do ranks one of which
    has FASTBN_SHARED_MEMORY=0 in its environment.
    """
    try:
        return _agreed[group]
    except KeyError:
        with _disable_current_modes():  # those who watch tensors have no business with these
            made = _agreed[group] = _agree(group)
        return made


def group_of(exchange):
    """The process group that an exchange is for."""
    for group, known in _agreed.items():
        if known is exchange:
            return group
    raise RuntimeError("SyncBatchNorm: the process group of the forward pass is gone")


def _agree(group):
    backend = group._get_backend(torch.device("cpu"))
    if backend.name() != "gloo":
        return None
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    path = _create(_C.Exchange.bytes(ranks, CHANNELS)) if rank == 0 and WANTED else None
    try:
        offer = [path]
        dist.broadcast_object_list(offer, dist.get_global_rank(group, 0), group)
        exchange = _join(offer[0], rank, ranks, backend.options._timeout.total_seconds()) if WANTED else None
        joined = [None] * ranks
        dist.all_gather_object(joined, exchange is not None, group)
    finally:
        if path is not None:
            os.unlink(path)  # whoever could open it has opened it
    return exchange if all(joined) else None


def _create(size):
    """The path of a new file whose memory is there; None if there is no place for it."""
    if not FOLDER.is_dir():
        return None
    try:
        file, path = tempfile.mkstemp(prefix="fastbn-", dir=FOLDER)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)  # where there is no room, touching it would be a signal
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(file)
    return path


def _join(path, rank, ranks, timeout):
    """This rank's end of the file that rank 0 offers; None if there is none that it can open."""
    if path is None:
        return None
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _C.Exchange(file, rank, ranks, CHANNELS, timeout)
    except RuntimeError:
        os.close(file)
        return None


@torch.library.impl("fastbn::gather", "CPU")
def _gather(values, ranks, group):
    _C.check_memory(values, "values")
    group = dist.distributed_c10d._resolve_process_group(group)
    exchange = exchange_of(group)
    return through_group(values, ranks, group) if exchange is None else exchange.gather(values)
