"""Measures the cases of a run on a GPU, for run.py --device cuda.

Module calls are what is timed, of modules that do not count their batches: counting is a kernel of its own (2 us),
and the same for everybody.
"""

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from check import Reference
from comparing import checked_runners, last_line
from costs import variants
from gpu_timing import Batch, Gpu, sets_for
from models import measure_model
from networks import NETWORKS
from peers import PEERS, ModuleRunner, Peer, backend_of_torch, parameters_of
from records import OURS, Record
from report_gpu import case_line
from session import Unit
from suite import GPU_PASSES, Case, Tensors, gpu_cases, make_tensors
from timing import Protocol, Times, measure

# For a comparison, in graphs and eager; few, because the batches in them are long.
SECONDS = {"quick": 0.06, "full": 0.6}
# torch.compile takes part where compiling it fits into the time: seconds a shape, type and layout.
COMPILED = ("torch.compile", "torch.compile cooperative")
COMPILED_TYPES = (torch.bfloat16,)
BIG_COPY = 1 << 30


def passes(sets: list[Tensors], peer: Peer) -> dict[str, Batch]:
    module = peer(sets[0].module)
    parameters = parameters_of(module)
    values = [t.x.detach() for t in sets]
    done: list[tuple[torch.Tensor, Tensors]] = []

    def backward() -> list[object]:
        if not done:  # the forward passes, once and not in a capture
            done.extend((module(t.x), t) for t in sets)
        return [torch.autograd.grad(y, (t.x, *parameters), t.dy, retain_graph=True) for y, t in done]

    batches: dict[str, Batch] = {"forward": lambda: [module(t.x) for t in sets], "backward": backward}
    if not getattr(module, "trains_only", False):
        frozen = peer(sets[0].module).eval().requires_grad_(False)
        batches["eval"] = lambda: [frozen(x) for x in values]
    return batches


def copies(sets: list[Tensors], tensors: int) -> Batch:
    """Copies that move as many bytes as a pass that reads and writes so many tensors."""
    elements = sets[0].x.numel() * tensors // 2
    pairs = [[torch.empty(elements, dtype=t.x.dtype, device=t.x.device).normal_() for _ in range(2)] for t in sets]
    return lambda: [destination.copy_(source) for source, destination in pairs]


def copy_record(gpu: Gpu, rng: random.Random) -> Record:
    """The bandwidth of a copy so large that its launch overhead is negligible."""
    source, destination = (torch.empty(BIG_COPY // 4, device=gpu.device).normal_() for _ in range(2))
    times = measure({"copy": lambda: destination.copy_(source)}, Protocol(0.3), rng, gpu.sample)
    return {"kind": "big copy", "bytes": 2 * BIG_COPY, "seconds": times}


def per_call(times: Times, calls: int) -> Times:
    """Times of batches as times of one of their calls."""

    def divided(key: str, value: object) -> object:
        if key == "error":  # is relative
            return value
        return [float(f"{v / calls:.4g}") for v in value] if isinstance(value, list) else value / calls

    return {name: {key: divided(key, value) for key, value in time.items()} for name, time in times.items()}


def measure_case(gpu: Gpu, case: Case, peers: list[str], seconds: float, seed: int) -> Iterator[Record]:
    """A record for each pass, and one for each peer that does not take part; or one that memory was exhausted."""
    rng = random.Random(seed)
    count = sets_for(case.nbytes, gpu.cache_bytes())
    try:
        sets = [make_tensors(case, seed + i, gpu.device) for i in range(count)]
        for tensors in sets:
            tensors.module.num_batches_tracked = None
        # torch.compile is not checked here: it would compile once more for it
        unchecked = [name for name in peers if name in COMPILED]
        checked = [name for name in peers if name not in unchecked]
        runners, records = checked_runners(case, sets, checked, Reference(sets[0]), "cuda")
        yield from records
        if "fastbn" not in runners:
            return
        names = [name for name in runners if PEERS[name].runner is ModuleRunner]
        names += [name for name in unchecked if case.dtype in COMPILED_TYPES]
        alone = {name: runner.calls() for name, runner in runners.items() if name not in names}
        yield from time_passes(gpu, case, sets, variants(names), alone, seconds, rng)
    except torch.OutOfMemoryError as error:
        yield {"kind": "skipped", **case.fields(), "error": str(error).splitlines()[0]}


def time_passes(
    gpu: Gpu, case: Case, sets: list[Tensors], chosen: dict[str, Peer], alone: dict, seconds: float, rng: random.Random
) -> Iterator[Record]:
    """``alone`` are calls that no CUDA graph can hold: only eager times of theirs can be had, of forward and eval."""
    count = len(sets)
    batches = {name: passes(sets, peer) for name, peer in chosen.items()}
    for name, tensors in GPU_PASSES.items():
        eager = {variant: batch[name] for variant, batch in batches.items() if name in batch}
        replays: dict[str, Callable[[], object]] = {"copy": gpu.captured(copies(sets, tensors))}
        for variant, batch in list(eager.items()):
            try:
                replays[variant] = gpu.captured(batch)
            except Exception as error:
                if variant in OURS:
                    raise
                yield {"kind": "failed", **case.fields(), "peer": variant, "pass": name, "error": last_line(error)}
                del eager[variant], batches[variant]
        protocol = Protocol(seconds, most_rounds=40)
        graph = measure(replays, protocol, rng, gpu.sample)
        del replays
        for other, calls in alone.items():
            if name in calls:
                eager[other] = lambda call=calls[name]: [call() for _ in range(count)]
        whole = measure(eager, dataclasses.replace(protocol, least_rounds=3, seconds=seconds / 2), rng, gpu.wall_sample)
        yield {
            "kind": "gpu", **case.fields(), "pass": name, "sets": count, "torch_backend": backend_of_torch(sets[0]),
            "graph": per_call(graph, count), "eager": per_call(whole, count),
        }  # fmt: skip


def line_of(records: list[Record]) -> str:
    measured = [record for record in records if record["kind"] == "gpu"]
    return case_line(measured) if measured else ""


def gpu_units(arguments: argparse.Namespace, peers: list[str], make_gpu: Callable[[], Gpu] = Gpu) -> list[Unit]:
    """The most important cases first, because the time may not suffice for all."""
    gpu = make_gpu()
    rng = random.Random(arguments.seed)
    units = [Unit("big copy", lambda: [copy_record(gpu, rng)], always=True)]
    todo = list(gpu_cases([getattr(torch, name) for name in arguments.dtypes], arguments.layouts, arguments.batch))

    def measured(case: Case, seed: int) -> Iterator[Record]:
        yield from measure_case(gpu, case, peers, SECONDS[arguments.pace], seed)
        gpu.release()

    if "resnet50" in arguments.suites:
        for number, case in enumerate(todo, 1):
            units.append(Unit(str(case), partial(measured, case, arguments.seed + 1000 * number), line=line_of))
    if "model" in arguments.suites:
        for name in NETWORKS:
            work = partial(measure_model, name, 64, 224, Protocol(10.0, most_rounds=20), rng, "cuda")
            units.append(Unit(f"model {name}", work, 30))
    return units


def compile_all(arguments: argparse.Namespace, share: int, shares: int) -> None:
    """Runs torch.compile for every `shares`-th case, so that its cache on disk has them for the benchmark."""
    torch.cuda.set_stream(torch.cuda.Stream())
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    todo = [case for case in gpu_cases(dtypes, arguments.layouts, arguments.batch) if case.dtype in COMPILED_TYPES]
    for case in todo[share::shares]:
        tensors = make_tensors(case, 0, Gpu.device)
        tensors.module.num_batches_tracked = None
        for batch in passes([tensors], PEERS["torch.compile"]).values():
            batch()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
