"""The targets of fastbn on two threads of a CPU, and how they are computed from the records of a run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from records import (
    Record,
    against_clone,
    against_fastest,
    against_plain,
    compared,
    geometric_mean,
    name_of,
    noise,
    resnet50,
    seconds,
    select,
    speedup,
    warm,
    with_fresh,
)  # fmt: skip

# A tensor larger than this is not in any cache.
BIG = 10e6
# Suites whose single cases must not be slow.
SINGLE = ("resnet50", "small", "odd", "1d", "3d")

# A figure's value and a word on where it comes from, or None where it was not measured.
Measured = tuple[float, str] | None


@dataclass(frozen=True)
class Figure:
    name: str
    at_least: bool  # otherwise at most
    target: float
    style: str  # how its numbers are written
    measure: Callable[[list[Record]], Measured]

    def reached(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


def _mean_speedup(pass_: str) -> Callable[[list[Record]], Measured]:
    def measured(records: list[Record]) -> Measured:
        chosen = select(resnet50(records), **{"pass": pass_})
        if not chosen:
            return None
        noises = statistics.median(map(noise, chosen))
        return geometric_mean(map(speedup, chosen)), f"{len(chosen)} cases, median noise {noises:.1%}"

    return measured


def _fused(epilogue: str | None, ratio: Callable[[Record], float]) -> Callable[[list[Record]], Measured]:
    """epilogue None: all of them."""

    def measured(records: list[Record]) -> Measured:
        chosen = compared(select(records, kind="fused", **{"pass": "forward+backward"}))
        chosen = [r for r in chosen if epilogue in (None, r["epilogue"])]
        if not chosen:
            return None
        worst = min(chosen, key=ratio)
        detail = f"{len(chosen)} cases, least {ratio(worst):.2f} {name_of(worst)}"
        return geometric_mean(map(ratio, chosen)), detail

    return measured


def _fused_forward(records: list[Record]) -> Measured:
    chosen = select(records, kind="fused", epilogue="relu", **{"pass": "forward"})
    worst = max(chosen, key=against_plain, default=None)
    mean = chosen and geometric_mean(map(against_plain, chosen))
    return worst and (mean, f"mean of {len(chosen)}, most {against_plain(worst):.2f} {name_of(worst)}")


def _slowest(records: list[Record]) -> Measured:
    chosen = [r for suite in SINGLE for r in compared(warm(records, kind="case", suite=suite))]
    record = min(chosen, key=speedup, default=None)
    return record and (speedup(record), f"{record['pass']} {name_of(record)}, noise {noise(record):.0%}")


def _worst_against_clone(records: list[Record]) -> Measured:
    chosen = [r for r in select(with_fresh(resnet50(records)), **{"pass": "forward"}) if r["tensor_bytes"] > BIG]
    worst = max(chosen, key=against_clone, default=None)
    mean = chosen and geometric_mean(map(against_clone, chosen))
    return worst and (against_clone(worst), f"{name_of(worst)}; geometric mean {mean:.2f}")


def _call(pass_: str) -> Callable[[list[Record]], Measured]:
    def measured(records: list[Record]) -> Measured:
        for record in select(records, kind="call", **{"pass": pass_}):
            ours, theirs = (seconds(record, peer) * 1e6 for peer in ("fastbn", "torch"))
            return ours / theirs, f"{ours:.2f} against {theirs:.2f} us, noise {noise(record):.0%}"
        return None

    return measured


def _import(records: list[Record]) -> Measured:
    return next(((r["seconds"], "in a fresh process") for r in select(records, kind="import")), None)


def _memory(records: list[Record]) -> Measured:
    ours, theirs = ([r["extra"] for r in select(records, kind="memory", peer=peer)] for peer in ("fastbn", "torch"))
    return (max(ours), f"worst of {len(ours)} cases; torch {max(theirs):.2%}") if ours and theirs else None


FIGURES = [
    Figure("training forward: torch / fastbn, mean", True, 2.8, ".2f", _mean_speedup("forward")),
    Figure("forward+backward: torch / fastbn, mean", True, 2.7, ".2f", _mean_speedup("forward+backward")),
    Figure("eval: torch / fastbn, mean", True, 1.35, ".2f", _mean_speedup("eval")),
    Figure("slowest single case: torch / fastbn", True, 0.95, ".2f", _slowest),
    Figure("training forward over 10 MB: fastbn / clone", False, 1.3, ".2f", _worst_against_clone),
    Figure("BN + ReLU, forward+backward: torch / fastbn, mean", True, 3.5, ".2f", _fused("relu", speedup)),
    Figure("BN + add + ReLU, the same", True, 3.5, ".2f", _fused("add+relu", speedup)),
    Figure("both: the faster of torch and torch.compile / fastbn", True, 2.5, ".2f", _fused(None, against_fastest)),
    Figure("BN + ReLU, forward: fastbn fused / fastbn BN alone", False, 1.05, ".2f", _fused_forward),
    Figure("call on (2,4,2,2), forward: fastbn / torch", False, 0.7, ".2f", _call("forward")),
    Figure("call on (2,4,2,2), backward: fastbn / torch", False, 0.8, ".2f", _call("backward")),
    Figure("call on (2,4,2,2), eval: fastbn / torch", False, 0.8, ".2f", _call("eval")),
    Figure("import fastbn after torch, seconds", False, 0.15, ".3f", _import),
    Figure("memory beyond x, y, dy, dx", False, 0.02, ".2%", _memory),
]
