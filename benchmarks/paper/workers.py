"""Trainings on all cores, each in one thread: no number depends on the cores. A job is a function and plain arguments,
and is done once: whoever asks for it again, in this run or, after a stop, in the next, gets what it returned."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from networks import Variant

sys.path.append(str(Path(__file__).parents[1]))  # behind this folder, which has files of the same names
from files import replace_text

SHARED = ("data", "networks", "training", "sweep", "sigmoids")  # modules that trainings of others use


@functools.cache
def source_of(module: str) -> str:
    """What trains: of an experiment's file, what stands before its ``run``."""
    files = [Path(__file__).with_name(f"{name}.py") for name in (module, *SHARED)]
    return "".join(f.read_text().split("\ndef run(")[0] for f in files)


def begin() -> None:
    torch.set_num_threads(1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says when to stop


def work(function: Callable, images: Path, job: dict, path: Path) -> dict:
    """What the job returns, its CPU time, and whether an earlier run has done it."""
    with contextlib.suppress(OSError, ValueError):
        return {**json.loads(path.read_text()), "found": True}
    start = time.thread_time()
    done = json.dumps({"value": function(images, **job), "cpu_s": time.thread_time() - start})
    replace_text(path, done)
    return {**json.loads(done), "found": False}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Workers(contextlib.AbstractContextManager):
    def __init__(self, folder: Path, images: Path, depends: object, count: int = 1, total_s: float = 0.0) -> None:
        """``folder`` keeps what jobs returned. ``images``: the data's folder, which they get first. ``depends``: what
        numbers depend on besides code and arguments. ``total_s``: of all jobs, about; 0 shows no progress."""
        self.folder, self.images, self.depends, self.total_s = folder, images, depends, total_s
        self.done_s = self.found_s = self.cpu_s = 0.0
        self.start = self.shown = time.monotonic()
        self.known: dict[str, Future] = {}
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.pool: Executor
        if count > 1:
            # a fork would inherit torch's threads in whatever state they are
            self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin)
        else:
            self.pool = ThreadPoolExecutor(1, initializer=begin)

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable, job: dict, seconds: float) -> Future:
        arguments = {name: vars(v) if isinstance(v, Variant) else v for name, v in job.items()}
        what = [function.__module__, function.__name__, source_of(function.__module__), arguments, self.depends]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        with self.lock:
            if key in self.known:
                return self.known[key]
            future = self.pool.submit(work, function, self.images, job, self.folder / f"{key}.json")
            self.known[key] = future
        future.add_done_callback(lambda future: self.count(future, seconds))
        return future

    def count(self, future: Future, seconds: float) -> None:
        """Add a job that is done, and now and then show how much that is of all, and how long the rest may take."""
        if future.cancelled() or future.exception():
            return
        with self.lock:
            self.done_s += seconds
            self.found_s += seconds * future.result()["found"]
            self.cpu_s += future.result()["cpu_s"]
            now, fresh, terminal = time.monotonic(), self.done_s - self.found_s, sys.stdout.isatty()
            if self.total_s and fresh and now - self.shown > (0.5 if terminal else 20):
                self.shown, gone = now, now - self.start
                left = gone * max(0.0, self.total_s - self.done_s) / fresh
                text = f"{min(1.0, self.done_s / self.total_s):4.0%} done, {clock(gone)} gone, about {clock(left)} left"
                print(f"{text:<60}", end="\r" if terminal else "\n", flush=True)

    def map(self, function: Callable, jobs: dict, seeds: Iterable[int], seconds: float) -> dict:
        """``function(images, seed=seed, **job)`` of each named job and seed (added to the job's, if it has one): by
        name, what the seeds gave, dictionaries as lists by key. ``seconds``: what all of it takes together, about."""
        todo = [(name, {**job, "seed": job.get("seed", 0) + seed}) for name, job in jobs.items() for seed in seeds]
        futures = [(name, self.submit(function, job, seconds / len(todo))) for name, job in todo]
        found: dict = {name: [] for name in jobs}
        for name, future in futures:
            found[name].append(future.result()["value"])
        return {name: {key: [v[key] for v in values] for key in values[0]} if isinstance(values[0], dict) else values
                for name, values in found.items()}  # fmt: skip
