"""Small cases for the benchmark, one measurement as records, and made-up records of a whole run."""

import json
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = [(8, 5, 2), (16, 3, 1)]
QUICK = 0.002
HEAD = {
    "kind": "environment", "csrc": "ab" * 32, "fastbn": "0", "torch": "2", "cpu": "x", "threads": 1, "cores": 2,
    "pace": "quick", "seed": 0, "missing": {"jax": "no"}, "not_asked": ["apex groupbn"], "capability": "avx2",
    "date": "2026-01-01T00:00:00", "cache_bytes": 1 << 25,
    "build": {"compiler": "g++ 1"},
}  # fmt: skip


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


def times(**seconds):
    names = {name: name.replace("_", " ").replace("compile", "torch.compile") for name in seconds}
    return {names[n]: {"median": s, "low": s, "high": s, "error": 0.0, "samples": [s] * 5} for n, s in seconds.items()}


def case(pass_="forward", shape=(32, 64, 56, 56), ours=1.0, suite="resnet50", dtype="float32", **more):
    tensors = {"forward": 1.0, "forward+backward": 2.5, "eval": 1.0}[pass_]
    seconds = times(fastbn=ours * tensors, fastbn_again=ours * tensors, torch=2 * tensors, copy=0.5, clone=1.0, add=1.5)
    nbytes = 4
    for size in shape:
        nbytes *= size
    return {"kind": "case", "suite": suite, "shape": list(shape), "dtype": dtype, "layout": "contiguous", "count": 2,
            "tensor_bytes": nbytes, "inputs": "warm", "pass": pass_, "torch_backend": "Native",
             "seconds": seconds, **more}  # fmt: skip


def some_records():
    passes = ("forward", "forward+backward", "eval")
    shapes = [(32, 64, 56, 56), (32, 512, 7, 7)]
    records = [HEAD, *(case(p, s, dtype=d) for s in shapes for d in ("float32", "bfloat16") for p in passes)]
    records += [case(p, inputs="cold", ours=0.5) for p in passes]
    records += [case(p, (n, 64, 9, 9), suite="scaling", dtype=d) for n in (2, 20, 200) for d in ("float32", "bfloat16")
                for p in passes]  # fmt: skip
    for name in ("forward", "forward+backward"):
        fused = times(fastbn=1.0, fastbn_again=1.0, fastbn_plain=1.0, torch=3.0, compile=2.0, copy=0.5, clone=1, add=1)
        records.append({**case(name), "kind": "fused", "suite": "fused", "epilogue": "relu", "seconds": fused})
    for peer in ("fastbn", "torch"):
        about = {"kind": "accuracy", "dtype": "float32", "layout": "contiguous", "std": 1.0, "peer": peer}
        records += [{**about, "mean": mean, "errors": {"y": 1e-7, "dx": 2e-7}} for mean in (0.0, 10.0, 1e4)]
    about = {"kind": "model", "suite": "model", "model": "ResNet-50", "shape": [8, 3, 96, 96], "dtype": "float32"}
    step = times(torch=1.0, convert=0.9, torch_again=1.0)
    records.append({**about, "seconds": step, "peak_bytes": {"torch": 5e8, "convert": 6e8}})
    rates = {"copy": 1e10, "three streams": 2e10}
    records.append({"kind": "bandwidth", "when": "begin", "bytes": 1 << 20, "rates": rates})
    records.append({"kind": "unsupported", "suite": "resnet50", "peer": "timm", "error": "no"})
    records.append({"kind": "done", "unit": "bandwidth at the begin"})
    return json.loads(json.dumps(records))
