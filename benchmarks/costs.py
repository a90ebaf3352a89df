"""Costs of fastbn outside of its kernels: a call, an import, memory beyond the tensors.

Imports and memory are measured in fresh processes, which run this file as a script:

    costs.py import
    costs.py memory PEER DTYPE LAYOUT
"""

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peers import PEERS, Peer
from suite import Case, make_tensors
from timing import Protocol, measure

CALL = Case("call", (2, 4, 2, 2), torch.float32, "contiguous")
MEMORY_SHAPE = (32, 64, 112, 112)
STATUS = Path("/proc/self/status")


def call_records(peers: list[str], seconds: float, rng: random.Random) -> Iterator[dict[str, object]]:
    """Time of a module call on a tensor so small that call overhead dominates, on one thread."""
    tensors = make_tensors(CALL, seed=0)
    x, dy = tensors.x, tensors.dy
    calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}, "eval": {}}
    for variant, peer in variants(peers).items():
        module = peer(tensors.module)
        inputs = (x, module.weight, module.bias)
        y, values = module(x), x.detach()
        frozen = peer(tensors.module).eval().requires_grad_(False)
        calls["forward"][variant] = lambda module=module: module(x)
        # the same graph over and over: backward alone, without the forward that made it
        calls["backward"][variant] = lambda y=y, inputs=inputs: torch.autograd.grad(y, inputs, dy, retain_graph=True)
        calls["eval"][variant] = lambda frozen=frozen, values=values: frozen(values)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, functions in calls.items():
            seconds_of = measure(functions, Protocol(seconds, most_rounds=1000), rng)
            yield {"kind": "call", **CALL.fields(), "pass": name, "threads": 1, "seconds": seconds_of}
    finally:
        torch.set_num_threads(threads)


def variants(peers: list[str]) -> dict[str, Peer]:
    """The peers by name, and fastbn a second time: how far the two differ is the noise."""
    return {**{name: PEERS[name] for name in peers}, "fastbn again": PEERS["fastbn"]}


def _fresh_process(*arguments: str) -> float:
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def import_record(times: int = 3) -> dict[str, object]:
    seconds = [_fresh_process("import") for _ in range(times)]
    return {"kind": "import", "seconds": statistics.median(seconds)}


def memory_records() -> Iterator[dict[str, object]]:
    """Most memory held beyond x, y, dy, dx in a forward and backward pass, as a part of these four."""
    if not STATUS.exists():  # another system than Linux
        return
    todo = [
        (peer, dtype, layout)
        for peer in ("fastbn", "torch")
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last")
    ]
    with ThreadPoolExecutor(2) as pool:  # waiting for processes: bytes, not seconds, so they may overlap
        extras = pool.map(lambda arguments: _fresh_process("memory", *arguments), todo)
        for (peer, dtype, layout), extra in zip(todo, extras, strict=True):
            case = Case("memory", MEMORY_SHAPE, getattr(torch, dtype), layout)
            yield {"kind": "memory", **case.fields(), "peer": peer, "extra": extra}


def _import_time() -> float:
    start = time.perf_counter()
    import fastbn  # noqa: F401

    return time.perf_counter() - start


def _extra_memory(peer: str, dtype: str, layout: str) -> float:
    # The peak of resident memory, as the system counts it, has every byte touched, whoever allocated it:
    # torch's allocator, malloc, mmap. It covers the whole life of the process, so nothing before the pass may
    # hold more than the pass does: y and dx (100 or 200 MB) exceed what importing torch needs for a moment.
    case = Case("memory", MEMORY_SHAPE, getattr(torch, dtype), layout)
    tensors = make_tensors(case, seed=0)
    module = PEERS[peer](tensors.module)
    small = make_tensors(Case("memory", (2, MEMORY_SHAPE[1], 2, 2), case.dtype, layout), seed=0)
    module(small.x).backward(small.dy)  # code, threads and parameter gradients are there from now on

    before = resident("VmRSS")
    y = module(tensors.x)
    y.backward(tensors.dy)
    return (resident("VmHWM") - before - 2 * case.nbytes) / (4 * case.nbytes)


def resident(field: str) -> int:
    """Bytes of this process, from a line such as ``VmHWM: 1234 kB``: VmRSS is now, VmHWM the most so far."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print({"import": _import_time, "memory": _extra_memory}[what](*rest))
