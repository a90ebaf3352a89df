"""The limits of memory: copies that are timed with the batch norms, in the same rounds and on the same tensors; and the
bandwidth of the machine, at the beginning and at the end of a run.

copy    into memory that is already there: the most that any kernel can reach, at two tensors moved
clone   a copy into a fresh tensor: pays for page faults where the allocator returns memory to the system
add     of two tensors into a fresh one: three tensors moved, as in the backward pass
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import torch
from suite import Tensors
from timing import Protocol, measure

# Bytes of one tensor: in the second-level cache, in the third, and in memory.
SIZES = [1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28]
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
# Where the system does not say it: of the largest processors.
UNKNOWN_CACHE = 64 << 20


def limits(sets: list[Tensors]) -> dict[str, Callable[[], object]]:
    """They use several sets in turns, so that their tensors are as cold as those of the batch norms."""
    turns = [(t.x.detach(), t.dy, torch.zeros_like(t.x, requires_grad=False)) for t in sets]
    copy, clone, add = (itertools.cycle(turns) for _ in range(3))

    def copied() -> torch.Tensor:
        x, _, destination = next(copy)
        return destination.copy_(x)

    def added() -> torch.Tensor:
        x, dy, _ = next(add)
        return torch.add(x, dy)

    return {"copy": copied, "clone": lambda: next(clone)[0].clone(), "add": added}


# The limits that each pass is shown against.
OF_PASS = {
    "forward": ("copy", "clone"),
    "forward+backward": ("copy", "clone", "add"),
    "eval": ("copy", "clone"),
}


def cache_bytes() -> int:
    """Of the largest cache that a core reads, in bytes."""
    try:
        sizes = [(entry / "size").read_text().strip() for entry in CACHE.glob("index*")]
        return max(int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError):
        return UNKNOWN_CACHE


def bandwidth_records(when: str, seconds: float, rng: random.Random) -> list[dict[str, object]]:
    """Bytes a second of a copy (two streams) and of an addition into memory that is there (three)."""
    records = []
    for size in SIZES:
        a, b, c = (torch.ones(size // 4) for _ in range(3))
        calls = {"copy": lambda c=c, a=a: c.copy_(a), "three streams": lambda a=a, b=b, c=c: torch.add(a, b, out=c)}
        times = measure(calls, Protocol(seconds, least_rounds=5), rng)
        rates = {name: n * size / times[name]["median"] for name, n in (("copy", 2), ("three streams", 3))}
        records.append({"kind": "bandwidth", "when": when, "bytes": size, "rates": rates, "seconds": times})
    return records
