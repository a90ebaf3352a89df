"""In: a function and a list of jobs, each a training of its own. Out: what each returned, in the order of the jobs.

A job runs in one thread, and as many of them at once as there are cores: no number depends on how many. With
one core, all runs in this process.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from data import Data, load
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_data: Data | None = None  # in a worker: loaded once


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(folder: Path | None) -> None:
    global _data
    torch.set_num_threads(1)
    _data = load(folder)


def _work(function: Callable, job: dict) -> object:
    return function(_data, **job)


class Workers(contextlib.AbstractContextManager):
    """``map`` is what experiments call; the bar moves after each job by its part of the experiment's cost."""

    def __init__(
        self, data: Data, folder: Path | None = None, count: int = 1, progress: Progress | None = None
    ) -> None:
        torch.set_num_threads(1)
        self.data, self.progress, self.task = data, progress, None
        self.cost = 0.0  # of the experiment that runs: about how many seconds on one core
        self.known: dict[str, dict] = {}  # what one experiment found and others use
        self.pool = None
        if count > 1:
            # a fork would inherit torch's threads in whatever state they are
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(folder,))

    def __exit__(self, *error: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, jobs: list[dict], share: float = 1.0) -> list:
        """``function(data, **job)`` of each. ``share``: of the experiment's cost, what all these jobs take together."""
        if self.pool:
            futures = [self.pool.submit(_work, function, job) for job in jobs]
            results = (future.result() for future in futures)
        else:
            results = (function(self.data, **job) for job in jobs)
        done = []
        for result in results:
            done.append(result)
            if self.progress:
                self.progress.advance(self.task, self.cost * share / len(jobs))
        return done


def progress_bar(console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
               TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    # jobs take seconds: a long memory makes the estimate steady
    return Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=300)
