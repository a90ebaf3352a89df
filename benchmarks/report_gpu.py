"""What a run on a GPU prints: a line for each case while it goes on, and the tables at its end.

Usage: report_gpu.py [results/gpu-benchmark.jsonl]
"""

import sys
from collections.abc import Callable
from pathlib import Path

from figures import Figure, Measured
from records import LATEST_GPU, SHORT, Record, geometric_mean, select
from report import show_file, show_table
from rich.console import Console
from suite import GPU_PASSES
from tables import Table, absent, figures_table, model_table

# A tensor this large is timed long enough for launches not to count.
LARGE = 200e6
OURS = ("fastbn", "fastbn again")


def median(record: Record, variant: str, how: str = "graph") -> float:
    return record[how][variant]["median"]


def peers_of(record: Record) -> list[str]:
    return [name for name in record["graph"] if name not in (*OURS, "copy")]


def speedup(record: Record, peer: str, how: str = "graph") -> float:
    return median(record, peer, how) / median(record, "fastbn", how)


def over_fastest(record: Record) -> float:
    """Against the fastest peer of the case."""
    return min(speedup(record, peer) for peer in peers_of(record))


def least_bytes(record: Record) -> int:
    return record["tensor_bytes"] * GPU_PASSES[record["pass"]]


def bandwidth(records: list[Record]) -> float:
    """Bytes a second of the run's big copy."""
    (big,) = select(records, kind="big copy")
    return big["bytes"] / big["seconds"]["copy"]["median"]


def of_limit(chosen: list[Record], bytes_a_second: float, variant: str = "fastbn") -> float:
    """Time of the least traffic / time, summed over the batch norms of a network."""
    least = sum(r["count"] * least_bytes(r) for r in chosen) / bytes_a_second
    return least / sum(r["count"] * median(r, variant) for r in chosen)


def of_copy(chosen: list[Record]) -> float:
    """The same against copies of as many bytes, launched in the same way."""
    return sum(r["count"] * median(r, "copy") for r in chosen) / sum(r["count"] * median(r, "fastbn") for r in chosen)


def name_of(record: Record) -> str:
    return f"{tuple(record['shape'])} {SHORT[record['dtype']]} {SHORT[record['layout']]} {record['pass']}"


def header() -> str:
    titles = "".join(f" |{name:>10} us /copy  GB/s torch/ compile/" for name in GPU_PASSES)
    return f"{'shape':<16} {'type':<5}{'layout':<8}{'MB':>6}{titles}"


def case_line(records: list[Record]) -> str:
    """Of each pass, in graphs: fastbn's time, its part of the speed of a copy of as many bytes, its bandwidth counting
    the least bytes, and the times of torch and torch.compile over it."""
    first = records[0]
    shape = ",".join(map(str, first["shape"]))
    line = f"{shape:<16} {SHORT[first['dtype']]:<5}{SHORT[first['layout']]:<8}{first['tensor_bytes'] / 1e6:>6.1f}"
    for record in records:
        time = median(record, "fastbn")
        peers = [f"{speedup(record, p):.2f}" if p in record["graph"] else "" for p in ("torch", "torch.compile")]
        line += f" |{time * 1e6:>13.1f} {of_copy([record]):>5.0%} {least_bytes(record) / time / 1e9:>5.0f}"
        line += f" {peers[0]:>6} {peers[1]:>8}"
    return line


def network_table(records: list[Record]) -> Table:
    titles = [
        f"{name}: {title}" for name in GPU_PASSES for title in ("of limit", "of copies", "torch", "compile", "eager")
    ]
    table = Table("ResNet-50's batch norms, in CUDA graphs and cold", ["cases", *titles])
    bytes_a_second = bandwidth(records)
    cases = select(records, kind="gpu")
    for dtype, layout, batch in dict.fromkeys((r["dtype"], r["layout"], r["shape"][0]) for r in cases):
        cells = []
        for name in GPU_PASSES:
            chosen = [r for r in select(cases, dtype=dtype, layout=layout, **{"pass": name}) if r["shape"][0] == batch]

            def mean(peer: str, how: str = "graph", chosen: list[Record] = chosen) -> str:
                ratios = [speedup(r, peer, how) for r in chosen if peer in r["graph"]]
                return f"{geometric_mean(ratios):.2f}" if ratios else ""

            cells += [f"{of_limit(chosen, bytes_a_second):.0%}", f"{of_copy(chosen):.0%}"] if chosen else ["", ""]
            cells += [mean("torch"), mean("torch.compile"), mean("torch", "eager")]
        table.rows.append([f"{SHORT[dtype]} {SHORT[layout]} N={batch}", *cells])
    return table


def _network(layout: str, batch: int, pass_: str, share: Callable) -> Callable[[list[Record]], Measured]:
    """The worse of the two types that the figure is stated for."""

    def measured(records: list[Record]) -> Measured:
        found = []
        for dtype in ("bfloat16", "float32"):
            of_pass = select(records, kind="gpu", dtype=dtype, layout=layout, **{"pass": pass_})
            chosen = [r for r in of_pass if r["shape"][0] == batch]
            if len(chosen) == 12:
                found.append((share(chosen, records), f"{SHORT[dtype]}"))
        return min(found, default=None) and (min(found)[0], ", ".join(f"{name} {value:.1%}" for value, name in found))

    return measured


def _limit(chosen: list[Record], records: list[Record]) -> float:
    return of_limit(chosen, bandwidth(records))


def _copy(chosen: list[Record], _: list[Record]) -> float:
    return of_copy(chosen)


def _large(records: list[Record]) -> Measured:
    chosen = [r for r in select(records, kind="gpu", layout="contiguous") if r["tensor_bytes"] >= LARGE]
    chosen = [r for r in chosen if r["pass"] != "eval"]
    worst = min(chosen, key=lambda r: of_limit([r], bandwidth(records)), default=None)
    return worst and (of_limit([worst], bandwidth(records)), f"worst of {len(chosen)}: {name_of(worst)}")


def _training(records: list[Record]) -> list[Record]:
    """Forward and backward of each bfloat16 case as one record: the times added."""
    by_case: dict[tuple, list[Record]] = {}
    for r in select(records, kind="gpu", dtype="bfloat16"):
        if r["pass"] != "eval":
            by_case.setdefault((tuple(r["shape"]), r["layout"]), []).append(r)
    joined = []
    for pair in by_case.values():
        if len(pair) == 2:
            names = [name for name in pair[0]["graph"] if name in pair[1]["graph"]]
            graph = {name: {"median": sum(median(r, name) for r in pair)} for name in names}
            joined.append({**pair[0], "pass": "forward+backward", "graph": graph})
    return joined


def _mean_over_fastest(records: list[Record]) -> Measured:
    chosen = _training(records)
    return (geometric_mean(map(over_fastest, chosen)), f"{len(chosen)} cases") if chosen else None


def _slowest(records: list[Record]) -> Measured:
    worst = min(select(records, kind="gpu"), key=over_fastest, default=None)
    return worst and (over_fastest(worst), name_of(worst))


FIGURES = [
    *(
        Figure(f"{what}, batch {batch}: {pass_} of {'limit' if share is _limit else 'copies'}, worse of bf16, f32",
               True, target, ".2f", _network(layout, batch, pass_, share))
        for what, layout, batch, share, targets in (
            ("NCHW", "contiguous", 256, _limit, (0.90, 0.90)),
            ("NCHW", "contiguous", 128, _limit, (0.83, 0.85)),
            ("NCHW", "contiguous", 32, _copy, (0.90, 0.90)),
            ("NHWC", "channels_last", 128, _limit, (0.75, 0.75)),
        )
        for pass_, target in zip(("forward", "backward"), targets, strict=True)
    ),
    Figure("NCHW tensors of 200 MB and more, single shapes: of limit", True, 0.95, ".2f", _large),
    Figure("bf16 training: fastest of torch, torch.compile / fastbn, mean", True, 1.6, ".2f", _mean_over_fastest),
    Figure("slowest single case: fastest / fastbn", True, 0.95, ".2f", _slowest),
]  # fmt: skip


def show_gpu_summary(console: Console, records: list[Record]) -> None:
    if not select(records, kind="big copy"):
        return
    console.print(f"\ncopy of 1 GiB: {bandwidth(records) / 1e9:.0f} GB/s counting both ways")
    if select(records, kind="gpu"):
        show_table(console, network_table(records))
        console.print(
            "of limit: time of the least bytes at the speed of that copy / time, of the network's 53 batch norms\n"
            "of copies: time of copies of as many bytes, in graphs too / time\n"
            "torch, compile, eager (both without a graph): time of torch and torch.compile / fastbn's, means\n"
        )
    for table in (model_table(records), figures_table(records, FIGURES)):
        if table.rows:
            show_table(console, table)
    for line in absent(records):
        console.print(f"not compared: {line}", soft_wrap=True)
    for record in select(records, kind="skipped"):
        console.print(f"[red]skipped:[/] {tuple(record['shape'])} {record['dtype']} {record['error']}")
    for record in select(records, kind="left out"):
        console.print(f"[red]{len(record['cases'])} cases were left out for want of time[/]")


if __name__ == "__main__":
    show_file(Path(*sys.argv[1:2] or [LATEST_GPU]), ("gpu",), header(), case_line, show_gpu_summary)
