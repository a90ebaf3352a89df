"""Records of a run flow in, tables flow out; nothing here measures.

Usage: report.py [results/latest.jsonl]
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from suite import PASSES

Record = dict
LATEST = Path(__file__).with_name("results") / "latest.jsonl"
LATEST_GPU = LATEST.with_name("gpu-benchmark.jsonl")
SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16",
    "contiguous": "contig", "channels_last": "ch_last",
}  # fmt: skip
BIG = 10e6
# Average load at the start of a run above which its times mean little.
BUSY = 0.5


def make_console() -> Console:
    """In a log file there is no width to fit into."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def seconds(record: Record, variant: str) -> float:
    return record["seconds"][variant]["median"]


def speedup(record: Record, peer: str = "torch") -> float:
    return seconds(record, peer) / seconds(record, "fastbn")


def noise(record: Record) -> float:
    """How far the two measurements of the same thing are apart."""
    return abs(math.log(seconds(record, "fastbn again") / seconds(record, "fastbn")))


def of_limit(record: Record) -> float:
    """Time of the least traffic at the speed of a copy (two tensors moved), as a part of fastbn's time."""
    tensors = record.get("tensors") or PASSES[record["pass"]]
    return seconds(record, "copy") * tensors / 2 / seconds(record, "fastbn")


def of_fresh_limit(record: Record) -> float:
    """The same at the speed of torch's clone and add, which page-fault as fastbn's outputs do."""
    fresh = seconds(record, "clone") + (seconds(record, "add") if record["pass"] == "forward+backward" else 0)
    return fresh / seconds(record, "fastbn")


def against_clone(record: Record) -> float:
    return seconds(record, "fastbn") / seconds(record, "clone")


def against_fastest(record: Record) -> float:
    """Time of the fastest peer over fastbn's."""
    peers = (v for v in record["seconds"] if v.startswith("torch"))
    return min(seconds(record, peer) for peer in peers) / seconds(record, "fastbn")


def against_plain(record: Record) -> float:
    """Time of the fused forward pass over that of fastbn's batch norm alone."""
    return seconds(record, "fastbn") / seconds(record, "fastbn plain")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def name_of(record: Record) -> str:
    return f"{tuple(record['shape'])} {SHORT[record['dtype']]} {SHORT[record['layout']]}"


def select(records: list[Record], **fields: object) -> list[Record]:
    return [r for r in records if all(r.get(name) == value for name, value in fields.items())]


# --- one line for each case, while the run goes on ---


def header() -> str:
    """Titles of the lines that :func:`case_line` makes."""
    titles = "".join(f" |{name:>16} ms torch/ limit" for name in PASSES)
    return f"{'shape':<16} {'type':<5}{'layout':<8}{'MB':>6}{titles} | /clone noise"


def case_line(records: list[Record]) -> str:
    """Of each pass: fastbn's time, torch's time over it, and its part of the copy limit.
    At the end: the forward pass over the time of x.clone(), and the largest noise."""
    first = records[0]
    shape, megabytes = ",".join(map(str, first["shape"])), first["tensor_bytes"] / 1e6
    line = f"{shape:<16} {SHORT[first['dtype']]:<5}{SHORT[first['layout']]:<8}{megabytes:>6.1f}"
    for record in records:
        milliseconds = seconds(record, "fastbn") * 1e3
        line += f" |{milliseconds:>19.3f} {speedup(record):>6.2f} {of_limit(record):>5.0%}"
    return f"{line} |{against_clone(first):>7.2f} {max(map(noise, records)):>5.0%}"


def fused_line(records: list[Record]) -> str:
    """Of each ending: fastbn's time of forward and backward, the faster peer's over it, and its part of the copy
    limit. At the end the forward pass of BN + ReLU over that of BN alone."""
    first = records[0]
    shape, megabytes = ",".join(map(str, first["shape"])), first["tensor_bytes"] / 1e6
    line = f"{shape:<16} {SHORT[first['dtype']]:<5}{SHORT[first['layout']]:<8}{megabytes:>6.1f}"
    for record in select(records, **{"pass": "forward+backward"}):
        milliseconds = seconds(record, "fastbn") * 1e3
        line += (
            f" | {record['ending']:>8}{milliseconds:>10.3f} {against_fastest(record):>6.2f} {of_limit(record):>5.0%}"
        )
    (alone,) = select(records, ending="relu", **{"pass": "forward"})
    return f"{line} | /plain {against_plain(alone):.2f} noise {max(map(noise, records)):.0%}"


# --- summaries ---


def resnet50_table(records: list[Record]) -> Table | None:
    cases = select(records, kind="case", suite="resnet50")
    if not cases:
        return None
    table = Table(
        title="ResNet-50's batch norms: geometric means over the shapes, and sums over the network",
        title_justify="left",
    )
    table.add_column("cases")
    peers = [v for v in cases[0]["seconds"] if v not in ("fastbn", "fastbn again", "copy", "clone", "add")]
    for name in PASSES:
        for peer in peers:
            table.add_column(f"{name}\n{peer}/fastbn", justify="right")
        table.add_column("copy\nlimit", justify="right")
        table.add_column("fresh\nlimit", justify="right")

    def add(title: str, chosen: list[Record], mean: Callable[[list[Record], Callable], float]) -> None:
        cells = []
        for name in PASSES:
            of_pass = select(chosen, **{"pass": name})
            cells += [f"{mean(of_pass, lambda r, p=peer: speedup(r, p)):.2f}" for peer in peers]
            cells += [f"{mean(of_pass, of_limit):.0%}", f"{mean(of_pass, of_fresh_limit):.0%}"]
        table.add_row(title, *cells)

    def plain(chosen: list[Record], ratio: Callable[[Record], float]) -> float:
        return geometric_mean(map(ratio, chosen))

    def by_time(chosen: list[Record], ratio: Callable[[Record], float]) -> float:
        weights = [r["count"] * seconds(r, "fastbn") for r in chosen]
        return sum(w * ratio(r) for w, r in zip(weights, chosen, strict=True)) / sum(weights)

    groups = list(dict.fromkeys((r["dtype"], r["layout"]) for r in cases))
    for dtype, layout in groups:
        add(f"{SHORT[dtype]} {SHORT[layout]}", select(cases, dtype=dtype, layout=layout), plain)
    add("all", cases, plain)
    table.add_section()
    for dtype, layout in groups:
        add(f"network, {SHORT[dtype]} {SHORT[layout]}", select(cases, dtype=dtype, layout=layout), by_time)
    return table


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
        chosen = select(records, kind="case", suite="resnet50", **{"pass": pass_})
        if not chosen:
            return None
        noises = statistics.median(map(noise, chosen))
        return geometric_mean(map(speedup, chosen)), f"{len(chosen)} cases, median noise {noises:.1%}"

    return measured


def _fused(ending: str | None, ratio: Callable[[Record], float]) -> Callable[[list[Record]], Measured]:
    """ending None: all of them."""

    def measured(records: list[Record]) -> Measured:
        chosen = select(records, kind="fused", **{"pass": "forward+backward"})
        chosen = [r for r in chosen if ending in (None, r["ending"])]
        if not chosen:
            return None
        worst = min(chosen, key=ratio)
        detail = f"{len(chosen)} cases, least {ratio(worst):.2f} {name_of(worst)}"
        return geometric_mean(map(ratio, chosen)), detail

    return measured


def _fused_forward(records: list[Record]) -> Measured:
    chosen = select(records, kind="fused", ending="relu", **{"pass": "forward"})
    worst = max(chosen, key=against_plain, default=None)
    mean = chosen and geometric_mean(map(against_plain, chosen))
    return worst and (mean, f"mean of {len(chosen)}, most {against_plain(worst):.2f} {name_of(worst)}")


def _slowest(records: list[Record]) -> Measured:
    record = min(select(records, kind="case"), key=speedup, default=None)
    return record and (speedup(record), f"{record['pass']} {name_of(record)}, noise {noise(record):.0%}")


def _worst_against_clone(records: list[Record]) -> Measured:
    chosen = [r for r in select(records, kind="case", **{"pass": "forward"}) if r["tensor_bytes"] > BIG]
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


# What fastbn is held to, on two threads.
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


def figures_table(records: list[Record]) -> Table:
    table = Table(title="Figures to reach (means: geometric, ResNet-50 cases)", title_justify="left")
    table.add_column("figure")
    table.add_column("target", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("reached")
    table.add_column("detail")
    for figure in FIGURES:
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.target:{figure.style}}"
        if (measured := figure.measure(records)) is None:
            table.add_row(figure.name, bound, "not measured")
        else:
            value, detail = measured
            verdict = "[green]yes[/]" if figure.reached(value) else "[red]no[/]"
            table.add_row(figure.name, bound, f"{value:{figure.style}}", verdict, detail)
    return table


def show_summary(console: Console, records: list[Record]) -> None:
    if (table := resnet50_table(records)) is not None:
        console.print("\n", table)
        console.print(
            "copy limit: part of the speed of a copy into memory that is there, moving the least bytes\n"
            "fresh limit: part of the speed of clone and add into fresh outputs, which page-fault\n"
        )
    console.print(figures_table(records))
    if wrong := select(records, kind="wrong"):
        console.print(f"[red]{len(wrong)} cases are wrong and were not timed, the first:[/]")
        console.print(f"{name_of(wrong[0])}: {wrong[0]['error']}")


def show_environment(console: Console, record: Record) -> None:
    console.print(
        f"fastbn {record['fastbn']} ({record['capability']}), torch {record['torch']} "
        f"({record['torch_capability']}), {record['threads']} of {record['cores']} cores of {record['cpu']}, "
        f"huge pages: {record['huge_pages']}, load {record['load']}, csrc {record['csrc'][:12]}"
    )
    if record["load"] > BUSY:
        console.print("[red]other work is running on this machine: two threads that wait for each other then "
                      "measure the scheduler (8 ms and its multiples), not the kernels[/]")  # fmt: skip


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else LATEST
    records = [json.loads(line) for line in path.read_text().splitlines()]
    console = make_console()
    for record in select(records, kind="environment"):
        show_environment(console, record)
    console.print(header(), soft_wrap=True)
    by_case: dict[str, list[Record]] = {}
    for record in select(records, kind="case"):
        by_case.setdefault(name_of(record), []).append(record)
    for group in by_case.values():
        console.print(case_line(group), soft_wrap=True)
    show_summary(console, records)


if __name__ == "__main__":
    main()
