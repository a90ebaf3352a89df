"""The cases of a run on a GPU: shapes flow in, records flow out. run.py --device cuda calls it.

Module calls are what is timed, of modules that do not count their batches: counting is a kernel of its own (2 us),
and the same for everybody.
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Iterator

import torch
from check import Mismatch, verify
from costs import variants
from gpu_timing import Batch, Gpu, sets_for
from peers import PEERS, Peer
from report_gpu import case_line, header
from suite import GPU_PASSES, Case, Tensors, gpu_cases, make_tensors
from timing import Protocol, measure

# For a comparison, in graphs and eager; few, because the batches in them are long.
SECONDS = {"quick": 0.02, "normal": 0.06, "full": 0.6}
# torch.compile takes part where compiling it fits into the time: seconds a shape, type and layout.
COMPILED_TYPES = (torch.bfloat16,)
BIG_COPY = 1 << 30


def passes(sets: list[Tensors], peer: Peer) -> dict[str, Batch]:
    module, frozen = peer(sets[0].module), peer(sets[0].module).eval().requires_grad_(False)
    values = [t.x.detach() for t in sets]
    done: list[tuple[torch.Tensor, Tensors]] = []

    def backward() -> list[object]:
        if not done:  # the forward passes, once and not in a capture
            done.extend((module(t.x), t) for t in sets)
        return [torch.autograd.grad(y, (t.x, module.weight, module.bias), t.dy, retain_graph=True) for y, t in done]

    return {
        "forward": lambda: [module(t.x) for t in sets],
        "backward": backward,
        "eval": lambda: [frozen(x) for x in values],
    }


def copies(sets: list[Tensors], tensors: int) -> Batch:
    """Copies that move as many bytes as a pass that reads and writes so many tensors."""
    elements = sets[0].x.numel() * tensors // 2
    pairs = [[torch.empty(elements, dtype=t.x.dtype, device=t.x.device).normal_() for _ in range(2)] for t in sets]
    return lambda: [destination.copy_(source) for source, destination in pairs]


def copy_record(gpu: Gpu, rng: random.Random) -> dict[str, object]:
    """The bandwidth that everything is held against: of a copy so large that its launch counts for nothing."""
    source, destination = (torch.empty(BIG_COPY // 4, device=gpu.device).normal_() for _ in range(2))
    times = measure({"copy": lambda: destination.copy_(source)}, Protocol(0.3), rng, gpu.sample)
    return {"kind": "big copy", "bytes": 2 * BIG_COPY, "seconds": times}


def backend_of_torch(tensors: Tensors) -> str:
    """Which of its kernels torch chooses: Native or Cudnn."""
    m = tensors.module
    try:
        chosen = torch._C._select_batch_norm_backend(
            tensors.x, m.weight, m.bias, m.running_mean, m.running_var, True, m.eps
        )
    except (AttributeError, TypeError) as error:
        return f"unknown ({error})"
    return chosen.name


def per_call(times: dict[str, dict[str, float]], calls: int) -> dict[str, dict[str, float]]:
    return {name: {key: value / calls for key, value in time.items()} for name, time in times.items()}


def measure_case(gpu: Gpu, case: Case, peers: list[str], seconds: float, seed: int) -> Iterator[dict[str, object]]:
    """A record for each pass; or one that says that a result is wrong, or that memory did not suffice."""
    rng = random.Random(seed)
    count = sets_for(case.nbytes, gpu.cache_bytes())
    sets = [make_tensors(case, seed + i, gpu.device) for i in range(count)]
    for tensors in sets:
        tensors.module.num_batches_tracked = None
    names = [name for name in peers if name != "torch.compile" or case.dtype in COMPILED_TYPES]
    chosen = variants(names)
    try:  # fastbn alone: torch.compile would compile once more for it
        verify(sets[0], PEERS["fastbn"])
    except Mismatch as error:
        yield {"kind": "wrong", **case.fields(), "error": f"fastbn: {error}"}
        return
    batches = {name: passes(sets, peer) for name, peer in chosen.items()}
    for name, tensors in GPU_PASSES.items():
        eager = {variant: batch[name] for variant, batch in batches.items()}
        replays: dict[str, Callable[[], object]] = {v: gpu.captured(batch) for v, batch in eager.items()}
        replays["copy"] = gpu.captured(copies(sets, tensors))
        protocol = Protocol(seconds, most_rounds=40)
        graph = measure(replays, protocol, rng, gpu.sample)
        del replays
        whole = measure(eager, dataclasses.replace(protocol, least_rounds=3, seconds=seconds / 2), rng, gpu.wall_sample)
        yield {
            "kind": "gpu", **case.fields(), "pass": name, "sets": count, "torch_backend": backend_of_torch(sets[0]),
            "graph": per_call(graph, count), "eager": per_call(whole, count),
        }  # fmt: skip


def measure_all(
    arguments: argparse.Namespace, peers: list[str], console, progress, make_gpu: Callable[[], Gpu] = Gpu
) -> Iterator[dict[str, object]]:
    """Records as they are measured, the cases that decide most first; those that time did not allow are named."""
    start = time.perf_counter()
    gpu = make_gpu()
    yield copy_record(gpu, random.Random(arguments.seed))
    todo = list(gpu_cases([getattr(torch, name) for name in arguments.dtypes], arguments.layouts, arguments.batch))
    bar = progress.add_task("measuring", total=len(todo))
    console.print(f"{'':>9}{header()}", soft_wrap=True)
    for number, case in enumerate(todo, 1):
        if arguments.seconds and time.perf_counter() - start > arguments.seconds:
            console.print(f"no time left for {len(todo) - number + 1} of {len(todo)} cases")
            yield {"kind": "left out", "cases": [str(case) for case in todo[number - 1 :]]}
            return
        progress.update(bar, description=str(case))
        try:
            records = list(measure_case(gpu, case, peers, SECONDS[arguments.pace], arguments.seed + 1000 * number))
        except torch.OutOfMemoryError as error:
            records = [{"kind": "skipped", **case.fields(), "error": str(error).splitlines()[0]}]
        yield from records
        for record in records:
            if record["kind"] != "gpu":
                console.print(f"{case}: [red]{record['kind']}[/]: {record['error']}")
        if measured := [record for record in records if record["kind"] == "gpu"]:
            console.print(f"{number:>3}/{len(todo):<3}  {case_line(measured)}", soft_wrap=True)
        progress.advance(bar)
        gpu.release()


def compile_all(arguments: argparse.Namespace, share: int, shares: int) -> None:
    """Have torch.compile fill its cache on disk with every `shares`-th case, so that the benchmark need not wait."""
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
