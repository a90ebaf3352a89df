"""The records of a run (summaries.py has their files), and the ratios that are computed from them.

An environment comes first, then what each unit of work found and a record of kind "done".
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from suite import FUSED_PASSES, PASSES
from summaries import Record
from timing import noise as noise_of

RESULTS = Path(__file__).with_name("results")
LATEST = RESULTS / "latest.jsonl"
LATEST_GPU = RESULTS / "gpu-benchmark.jsonl"
# What README and docs/benchmarks.md show.
SHOWN = RESULTS / "cpu.jsonl"

SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16",
    "contiguous": "contig", "channels_last": "ch_last",
}  # fmt: skip
# Variants of a comparison that are copies, or fastbn's own.
LIMITS = ("copy", "clone", "add")
OURS = ("fastbn", "fastbn again", "fastbn plain")


def select(records: list[Record], **fields: object) -> list[Record]:
    return [r for r in records if all(r.get(name) == value for name, value in fields.items())]


def warm(records: list[Record], **fields: object) -> list[Record]:
    """Those of measurements that used the same tensors in every call."""
    return [r for r in select(records, **fields) if r.get("inputs", "warm") == "warm"]


def compared(records: list[Record]) -> list[Record]:
    """Those in which torch takes part: it may have failed, too."""
    return [r for r in records if "torch" in r["seconds"]]


def resnet50(records: list[Record], batch: int | None = None) -> list[Record]:
    """ResNet-50's batch norms at a batch, by default at the smallest one measured."""
    chosen = compared(warm(records, kind="case", suite="resnet50"))
    batch = batch or min(batches_of(records), default=0)
    return [r for r in chosen if r["shape"][0] == batch]


def batches_of(records: list[Record]) -> list[int]:
    """The batches at which ResNet-50's batch norms were measured."""
    return sorted({r["shape"][0] for r in compared(warm(records, kind="case", suite="resnet50"))})


def backends_of_torch(records: list[Record]) -> list[str]:
    """Which of its kernels eager torch chose."""
    return sorted({r["torch_backend"] for r in records if "torch_backend" in r})


def seconds(record: Record, variant: str) -> float:
    return record["seconds"][variant]["median"]


def peers_of(records: list[Record]) -> list[str]:
    """Everybody that some record compares with fastbn, torch first."""
    names = dict.fromkeys(v for r in records for v in r["seconds"] if v not in (*OURS, *LIMITS))
    return sorted(names, key=lambda name: name != "torch")


def speedup(record: Record, peer: str = "torch") -> float:
    return seconds(record, peer) / seconds(record, "fastbn")


def noise(record: Record, peer: str = "torch") -> float:
    """What the speed-up may be wrong by, as a part of it."""
    return noise_of(record["seconds"], peer, "fastbn")


def least_tensors(record: Record) -> int:
    """Tensors of the activation's size that the pass must read or write."""
    passes = FUSED_PASSES[record["epilogue"]] if record.get("epilogue") else PASSES
    return passes[record["pass"]]


def of_limit(record: Record, variant: str = "fastbn") -> float:
    """Time of the least traffic at the speed of a copy (two tensors moved), as a part of the variant's time."""
    return seconds(record, "copy") * least_tensors(record) / 2 / seconds(record, variant)


def of_fresh_limit(record: Record) -> float:
    """The same at the speed of torch's clone and add, which page-fault as fastbn's outputs do."""
    fresh = seconds(record, "clone") + (seconds(record, "add") if record["pass"] == "forward+backward" else 0)
    return fresh / seconds(record, "fastbn")


def with_fresh(records: list[Record]) -> list[Record]:
    """Records in which clone and add were timed, too."""
    return [r for r in records if "clone" in r["seconds"]]


def against_clone(record: Record) -> float:
    return seconds(record, "fastbn") / seconds(record, "clone")


def against_fastest(record: Record) -> float:
    """Time of the faster of eager torch and torch.compile over fastbn's."""
    peers = (v for v in record["seconds"] if v in ("torch", "torch.compile"))
    return min(seconds(record, peer) for peer in peers) / seconds(record, "fastbn")


def against_plain(record: Record) -> float:
    """Time of the fused forward pass over that of fastbn's batch norm alone."""
    return seconds(record, "fastbn") / seconds(record, "fastbn plain")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def network_mean(records: list[Record], ratio: Callable[[Record], float]) -> float:
    """Of a network with these batch norms as often as it has them: the ratio of the sums of times."""
    weights = [r["count"] * seconds(r, "fastbn") for r in records]
    return sum(w * ratio(r) for w, r in zip(weights, records, strict=True)) / sum(weights)


def groups_of(records: list[Record]) -> list[tuple[str, str]]:
    """Types and layouts, in the order measured."""
    return list(dict.fromkeys((r["dtype"], r["layout"]) for r in records))


def name_of(record: Record) -> str:
    return f"{tuple(record['shape'])} {SHORT[record['dtype']]} {SHORT[record['layout']]}"


def key_of(record: Record) -> tuple:
    """What two runs call the same measurement."""
    fields = ("kind", "suite", "dtype", "layout", "epilogue", "pass", "inputs", "model")
    return tuple(record.get(field) for field in fields) + tuple(record.get("shape", ()))
