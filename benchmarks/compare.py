"""What became slower than in an older run, beyond the noise.

Two runs differ more by the clock and by other programs than by the code. So the time of fastbn divided by that of torch
in the same run is compared; where a run has no torch, by that of a copy.
"""

import math
from dataclasses import dataclass

from records import Record, key_of, seconds, warm
from report import show_table
from rich.console import Console
from summaries import unit_of
from tables import Table
from timing import noise

# What two runs of the same code may differ by beyond the noise that each sees in itself, because pages and caches fall
# differently: assumed, not measured.
FLOOR = 0.10

# Kinds of records with times of fastbn and of others.
COMPARED = ("case", "fused", "call")


@dataclass(frozen=True)
class Change:
    record: Record
    ratio: float  # the newer time over the older one, each divided by torch's or a copy's of its run
    allowed: float  # what it may differ from 1 by

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.allowed

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + self.allowed)


def changes(old: list[Record], new: list[Record]) -> list[Change]:
    """Of every measurement that both runs have."""
    before = {key_of(r): r for r in old if r["kind"] in COMPARED}
    found = []
    for record in new:
        if record["kind"] not in COMPARED or (earlier := before.get(key_of(record))) is None:
            continue
        both = record["seconds"].keys() & earlier["seconds"].keys()
        if (against := next((v for v in ("torch", "copy") if v in both), None)) is None:
            continue
        ratios = [seconds(r, "fastbn") / seconds(r, against) for r in (earlier, record)]
        noises = [noise(r["seconds"], against, "fastbn") for r in (earlier, record)]
        found.append(Change(record, ratios[1] / ratios[0], FLOOR + math.hypot(*noises)))
    return found


def compare(console: Console, old: list[Record], new: list[Record]) -> bool:
    """Print what changed. Whether anything got slower beyond the noise."""
    found = changes(old, new)
    slower = sorted((c for c in found if c.slower), key=lambda c: -c.ratio)
    faster = [c for c in found if c.faster]
    console.print(f"\n{len(found)} measurements are in both runs: {len(slower)} slower and {len(faster)} faster beyond "
                  f"the noise, {len(found) - len(slower) - len(faster)} the same")  # fmt: skip
    if slower:
        rows = [[f"{unit_of(c.record)} {c.record['pass']}", f"{c.ratio:.2f}", f"{c.allowed:.0%}"] for c in slower]
        title = "Slower than before, held against torch in each run"
        show_table(console, Table(title, ["case", "time / before", "noise"], rows))
    lost = {key_of(r) for r in warm(old, kind="case")} - {key_of(r) for r in new}
    if lost:
        console.print(f"{len(lost)} of the older run's cases were not measured this time")
    return bool(slower)
