"""Small cases for the benchmark, and one measurement as records."""

import json
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEAD = {
    "kind": "environment", "csrc": "ab" * 32, "fastbn": "0", "torch": "2", "cpu": "x", "threads": 1, "cores": 2,
    "pace": "quick", "seed": 0, "missing": {"jax": "no"}, "not_asked": ["apex groupbn"], "capability": "avx2",
    "date": "2026-01-01T00:00:00", "cache_bytes": 1 << 25,
    "build": {"compiler": "g++ 1"},
}  # fmt: skip
SHAPES = [(8, 5, 2), (16, 3, 1)]
QUICK = 0.002


def printed(console):
    return console.file.getvalue()


def small_case(suite, **changed):
    return suite.Case(**{"suite": "resnet50", "shape": (2, 8, 5, 5), "dtype": torch.float32, "layout": "contiguous",
                         **changed})  # fmt: skip


def measured(case, peers=("fastbn", "torch"), sets=1):
    from comparing import measure_case
    from timing import Protocol

    records = measure_case(case, list(peers), Protocol(QUICK, least_rounds=3, most_rounds=5), seed=0, sets=sets)
    return [json.loads(json.dumps(record)) for record in records]
