"""Records of a run flow in, text flows out: a line for each case while the run goes on, and tables at its end.

Usage: report.py [results/latest.jsonl]
"""

import sys
from collections.abc import Callable
from pathlib import Path

from figures import FIGURES
from records import (
    LATEST,
    OURS,
    SHORT,
    Record,
    against_clone,
    against_fastest,
    against_plain,
    backends_of_torch,
    batches_of,
    compared,
    geometric_mean,
    groups_of,
    load,
    name_of,
    network_mean,
    noise,
    of_fresh_limit,
    of_limit,
    peers_of,
    resnet50,
    seconds,
    select,
    speedup,
    warm,
    with_fresh,
)  # fmt: skip
from rich.console import Console
from rich.table import Table
from suite import PASSES

# Average load at the start of a run above which its times mean little.
BUSY = 0.5


def make_console() -> Console:
    """In a log file there is no width to fit into."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


# --- one line for each case, while the run goes on ---


def header() -> str:
    """Titles of the lines that :func:`case_line` makes."""
    titles = "".join(f" |{name:>16} ms torch/ limit" for name in PASSES)
    return f"{'shape':<16} {'type':<5}{'layout':<8}{'MB':>6}{titles} | /clone noise"


def case_line(records: list[Record]) -> str:
    """Of each pass: fastbn's time, torch's time over it, and its part of the copy limit.
    At the end: the forward pass over the time of x.clone(), and the largest noise."""
    measured = compared([r for r in records if r["kind"] in ("case", "fused")])
    if not measured:
        return ""
    first = measured[0]
    shape, megabytes = ",".join(map(str, first["shape"])), first["tensor_bytes"] / 1e6
    line = f"{shape:<16} {SHORT[first['dtype']]:<5}{SHORT[first['layout']]:<8}{megabytes:>6.1f}"
    if first["kind"] == "fused":
        return line + _fused_part(measured)
    for record in measured:
        milliseconds = seconds(record, "fastbn") * 1e3
        line += f" |{milliseconds:>19.3f} {speedup(record):>6.2f} {of_limit(record):>5.0%}"
    cold = " cold" if first["inputs"] == "cold" else ""
    clone = f"{against_clone(first):.2f}" if with_fresh([first]) else ""
    return f"{line} |{clone:>7} {max(map(noise, measured)):>5.0%}{cold}"


def _fused_part(records: list[Record]) -> str:
    """fastbn's time of forward and backward, the faster peer's over it, and its part of the copy limit. At the end the
    forward pass over that of BN alone."""
    line = ""
    for record in records:
        milliseconds = seconds(record, "fastbn") * 1e3
        what = f"{record['ending']} {record['pass']}"
        line += f" | {what:>25}{milliseconds:>9.3f} {against_fastest(record):>6.2f} {of_limit(record):>5.0%}"
    plain = [f"/plain {against_plain(r):.2f} " for r in records if r["pass"] == "forward"]
    return f"{line} | {''.join(plain)}noise {max(map(noise, records)):.0%}"


# --- summaries ---


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def resnet50_table(records: list[Record], batch: int) -> Table:
    cases = resnet50(records, batch)
    columns = []
    for name in PASSES:
        columns += [f"{name}\ntorch/fastbn", "copy\nlimit", "fresh\nlimit"]
    title = f"ResNet-50's batch norms at batch {batch}: geometric means over the shapes, and sums over the network"
    table = _table(title, "cases", *columns)

    def add(title: str, chosen: list[Record], mean: Callable[[list[Record], Callable], float]) -> None:
        cells = []
        for name in PASSES:
            of_pass = select(chosen, **{"pass": name})
            if not of_pass:
                cells += [""] * 3
                continue
            cells += [f"{mean(of_pass, speedup):.2f}"]
            fresh = with_fresh(of_pass)
            cells += [f"{mean(of_pass, of_limit):.0%}", f"{mean(fresh, of_fresh_limit):.0%}" if fresh else ""]
        table.add_row(title, *cells)

    def plain(chosen: list[Record], ratio: Callable[[Record], float]) -> float:
        return geometric_mean(map(ratio, chosen))

    for dtype, layout in groups_of(cases):
        add(f"{SHORT[dtype]} {SHORT[layout]}", select(cases, dtype=dtype, layout=layout), plain)
    add("all", cases, plain)
    table.add_section()
    for dtype, layout in groups_of(cases):
        add(f"network, {SHORT[dtype]} {SHORT[layout]}", select(cases, dtype=dtype, layout=layout), network_mean)
    return table


def peers_table(records: list[Record]) -> Table | None:
    """Everybody's time over fastbn's: geometric means over the cases that a peer took part in."""
    chosen = [r for r in records if r["kind"] in ("case", "fused") and r["suite"] != "scaling"]
    others = peers_of(chosen)
    if not others:
        return None
    table = _table("Time over fastbn's, geometric means (cases)", "cases", *others)
    kinds = dict.fromkeys((r["suite"], r.get("ending", ""), r.get("inputs", "warm"), r["pass"]) for r in chosen)
    for suite, ending, inputs, name in kinds:
        rows = [r for r in select(chosen, suite=suite, **{"pass": name})
                if r.get("ending", "") == ending and r.get("inputs", "warm") == inputs]  # fmt: skip
        cells = []
        for peer in others:
            ratios = [speedup(r, peer) for r in rows if peer in r["seconds"]]
            cells.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "")
        table.add_row(" ".join(filter(None, (suite, ending, name, inputs if inputs == "cold" else ""))), *cells)
    return table


def absent(records: list[Record]) -> list[str]:
    """Who was not compared, or not in all cases, and why: a line each."""
    lines = [f"{name}: not there ({why})" for head in select(records, kind="environment")
             for name, why in head["missing"].items()]  # fmt: skip
    lines += [f"{name}: not asked for" for head in select(records, kind="environment") for name in head["not_asked"]]
    errors: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        if r["kind"] in ("unsupported", "failed", "wrong") and "peer" in r:
            # one line for all that is wrong, whose numbers differ in each case
            why = r["error"] if r["kind"] == "unsupported" else ""
            errors.setdefault((r["peer"], r["kind"], why), []).append(r["error"])
    return lines + [f"{peer}: {kind} in {len(all_)} cases ({all_[0]})" for (peer, kind, _), all_ in errors.items()]


def bandwidth_table(records: list[Record]) -> Table | None:
    found = select(records, kind="bandwidth")
    if not found:
        return None
    ends = list(dict.fromkeys(r["when"] for r in found))
    names = list(found[0]["rates"])
    table = _table("Bandwidth, GB/s", "MB a tensor", *(f"{name}\n{when}" for when in ends for name in names))
    for size in dict.fromkeys(r["bytes"] for r in found):
        rows = [next(iter(select(found, when=when, bytes=size)), None) for when in ends]
        cells = [f"{row['rates'][name] / 1e9:.1f}" if row else "" for row in rows for name in names]
        table.add_row(f"{size / 1e6:.1f}", *cells)
    return table


def model_table(records: list[Record]) -> Table | None:
    found = select(records, kind="model")
    if not found:
        return None
    table = _table("Training step of a whole network, float32", "network", "variant", "images/s", "ms a step",
                   "torch/", "peak memory, MB")  # fmt: skip
    for r in found:
        images, _, side, _ = r["shape"]
        for variant, peak in r["peak_bytes"].items():
            time, of_torch = seconds(r, variant), seconds(r, "torch")
            cells = (
                f"{images / time:.1f}",
                f"{time * 1e3:.0f}",
                f"{of_torch / time:.3f}",
                f"{peak / 1e6:.0f}",
            )
            table.add_row(f"{r['model']}, {images} images of {side} x {side}", variant, *cells)
    return table


def accuracy_table(records: list[Record]) -> Table | None:
    found = select(records, kind="accuracy")
    if not found:
        return None
    peers = list(dict.fromkeys(r["peer"] for r in found))
    title = "Largest error against float64, over the largest value: of y / of dx"
    table = _table(title, "type", "mean", "std", *peers)
    for dtype, mean, std in dict.fromkeys((r["dtype"], r["mean"], r["std"]) for r in found):
        rows = {r["peer"]: r["errors"] for r in select(found, dtype=dtype, mean=mean, std=std)}
        cells = [f"{rows[p]['y']:.1e} / {rows[p]['dx']:.1e}" if p in rows else "" for p in peers]
        table.add_row(SHORT[dtype], f"{mean:g}", f"{std:g}", *cells)
    return table


def scaling_table(records: list[Record]) -> Table | None:
    found = compared(warm(records, kind="case", suite="scaling"))
    if not found:
        return None
    table = _table("Time for each element, ns: fastbn / torch / copy of x", "elements", *(
        f"{SHORT[dtype]} {name}" for dtype, _ in groups_of(found) for name in PASSES))  # fmt: skip
    for shape in dict.fromkeys(tuple(r["shape"]) for r in found):
        elements, cells = 1, []
        for size in shape:
            elements *= size
        for dtype, _ in groups_of(found):
            for name in PASSES:
                row = next(
                    (r for r in select(found, dtype=dtype, **{"pass": name}) if tuple(r["shape"]) == shape), None
                )
                variants = ("fastbn", "torch", "copy")
                cells.append(" / ".join(f"{seconds(row, v) / elements * 1e9:.3f}" for v in variants) if row else "")
        table.add_row(f"{elements:.1e}", *cells)
    return table


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
    batches = batches_of(records)
    tables = [bandwidth_table, peers_table, scaling_table, model_table, accuracy_table]
    for table in (*(resnet50_table(records, batch) for batch in batches), *(make(records) for make in tables)):
        if table is not None:
            console.print("\n", table)
    if batches:
        console.print(
            "copy limit: part of the speed of a copy into memory that is there, moving the least bytes\n"
            "fresh limit: part of the speed of clone and add into fresh outputs, which page-fault\n"
        )
    if backends := backends_of_torch(records):
        console.print(f"eager torch ran these of its kernels: {', '.join(backends)}")
    for line in absent(records):
        console.print(f"not compared: {line}", soft_wrap=True)
    console.print(figures_table(records))


def show_wrong(console: Console, records: list[Record]) -> None:
    if wrong := select(records, kind="wrong"):
        console.print(f"[red]{len(wrong)} results are wrong and were not timed, the first:[/]")
        what = name_of(wrong[0]) if "layout" in wrong[0] else wrong[0]["model"]
        console.print(f"{wrong[0]['peer']}, {what}: {wrong[0]['error']}", soft_wrap=True)
    for record in select(records, kind="failed"):
        who = record.get("peer", "")
        if not who or who in OURS:
            console.print(f"[red]failed:[/] {record.get('unit', who)}: {record['error']}", soft_wrap=True)


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
    records = load(Path(sys.argv[1]) if len(sys.argv) > 1 else LATEST)
    console = make_console()
    for record in select(records, kind="environment"):
        show_environment(console, record)
    console.print(header(), soft_wrap=True)
    by_case: dict[tuple, list[Record]] = {}
    for record in records:
        if record["kind"] in ("case", "fused"):
            key = name_of(record), record["suite"], record.get("ending"), record["inputs"]
            by_case.setdefault(key, []).append(record)
    for group in by_case.values():
        console.print(case_line(group), soft_wrap=True)
    show_summary(console, records)
    show_wrong(console, records)


if __name__ == "__main__":
    main()
