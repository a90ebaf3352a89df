"""Processes of one torch.distributed group that run functions of tests, started once for many tests."""

import datetime
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing


class RankFailed(AssertionError):
    """What a rank raised, with its traceback as text."""


class Ranks:
    """`size` processes with one thread each; closed by `close`, or started anew after one of them has failed."""

    def __init__(self, size, backend="gloo", timeout=30):
        self.size, self.backend, self.timeout = size, backend, timeout
        self._processes = []

    def run(self, function, *arguments):
        """[function(*arguments) in rank 0, 1, ...]; function is at the top of its module."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                ok, result = pipe.recv() if pipe.poll(2 * self.timeout + 60) else (False, "no answer in time")
            except EOFError:
                self._processes[rank].join(5)  # its pipe ends before it does
                ok, result = False, f"ended with status {self._processes[rank].exitcode}"
            results.append(result)
            if not ok:
                errors.append(f"rank {rank} of {self.size}: {result}")
        if errors:
            self.close()
            raise RankFailed("\n".join(errors))
        return results

    def _start(self):
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{Path(self._folder.name) / 'store'}"
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, self.backend, store, self.timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self):
        for pipe in self._pipes if self._processes else ():
            pipe.close()  # which ends its process, unless it hangs
        for process in self._processes:
            process.join(5)
            process.kill()
        if self._processes:
            self._folder.cleanup()
        self._processes = []


def _serve(pipe, rank, size, backend, store, timeout):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(20150211)
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # an interpreter that has torch takes most of a second to end
