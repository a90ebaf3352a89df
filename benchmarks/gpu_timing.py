"""How batches of calls are timed on a GPU.

A batch calls on so many sets of tensors in turn that none is left in the second-level cache when it comes again, and
keeps every output until its end, because a buffer that is written over and over would stay in the cache, too.

graph   the batch captured in a CUDA graph: the time of the kernels, whoever launches them
eager   the batch as Python runs it, until the GPU is done: what a loop that does nothing else pays
"""

import gc
import math
import time
from collections.abc import Callable

import torch

Batch = Callable[[], list[object]]
# The GPU waits for this many cycles (0.1 ms at 2 GHz) while the host queues the calls that are timed.
WAIT_CYCLES = 200_000
# The sets of tensors together are this many times as large as the cache.
CACHES = 3
MOST_SETS = 48


class Gpu:
    """The current CUDA device. A test puts another class in its place."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.release()
        # a capture and the autograd graph in it have to use one stream
        torch.cuda.set_stream(self.stream)

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def captured(self, batch: Batch) -> Callable[[], object]:
        for _ in range(2):  # compiles, loads and selects kernels, which a capture must not
            batch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also collect garbage and empty the allocator, thousands of times in a run
        gc.disable()
        graph.capture_begin()
        try:
            kept = batch()
        finally:
            graph.capture_end()
            gc.enable()
        del kept  # its memory belongs to the graph
        return graph.replay

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / repeats

    def wall_sample(self, call: Callable[[], object], repeats: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    def release(self) -> None:
        """Frees memory between cases; gc.freeze makes the later collections fast."""
        gc.collect()
        gc.freeze()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def sets_for(tensor_bytes: int, cache_bytes: int) -> int:
    """The number of sets of an input and an output; at least two, so that calls alternate."""
    return max(2, min(MOST_SETS, math.ceil(CACHES * cache_bytes / (2 * tensor_bytes))))
