"""What a run prints: a line for each case while it goes on, and the tables at its end.

Usage: report.py [results/latest.jsonl]
"""

import sys
from collections.abc import Callable
from pathlib import Path

from records import (
    LATEST,
    OURS,
    SHORT,
    Record,
    against_clone,
    against_fastest,
    against_plain,
    compared,
    noise,
    of_limit,
    seconds,
    select,
    speedup,
    with_fresh,
)  # fmt: skip
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from suite import PASSES
from summaries import absences, load, unit_of
from tables import Table, absent, remarks, tables_of

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
        what = f"{record['epilogue']} {record['pass']}"
        line += f" | {what:>25}{milliseconds:>9.3f} {against_fastest(record):>6.2f} {of_limit(record):>5.0%}"
    plain = [f"/plain {against_plain(r):.2f} " for r in records if r["pass"] == "forward"]
    return f"{line} | {''.join(plain)}noise {max(map(noise, records)):.0%}"


# --- summaries ---

COLOURED = {"yes": "[green]yes[/]", "no": "[red]no[/]"}


def show_table(console: Console, table: Table) -> None:
    shown = RichTable(title=table.title, title_justify="left")
    for number, name in enumerate(table.head):
        # titles may break: ten columns of two words each fit into a terminal
        left = number == 0 or name in ("detail", "reached", "variant")
        shown.add_column(name.replace(": ", ":\n"), justify="left" if left else "right")
    for row in table.rows:
        shown.add_row(*(COLOURED.get(cell, escape(cell)) for cell in row))
    console.print("\n", shown)


def show_summary(console: Console, records: list[Record]) -> None:
    for table in tables_of(records):
        show_table(console, table)
    for line in (*remarks(records), *(f"not compared: {line}" for line in absent(records))):
        console.print(escape(line), soft_wrap=True)


def show_wrong(console: Console, records: list[Record]) -> None:
    for wrong in select(absences(records), kind="wrong"):
        console.print(f"[red]{wrong['cases']} results of {wrong['peer']} are wrong and were not timed, the first:[/]")
        console.print(escape(f"{wrong['first']}: {wrong['error']}"), soft_wrap=True)
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


def show_file(path: Path, kinds: tuple[str, ...], title: str, line: Callable, summary: Callable) -> None:
    """Everything that was printed when the file was written."""
    records, console = load(path), make_console()
    for record in select(records, kind="environment"):
        show_environment(console, record)
    console.print(title, soft_wrap=True)
    by_case: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] in kinds:
            by_case.setdefault(unit_of(record), []).append(record)
    for group in by_case.values():
        console.print(line(group), soft_wrap=True)
    summary(console, records)
    show_wrong(console, records)


if __name__ == "__main__":
    show_file(Path(*sys.argv[1:2] or [LATEST]), ("case", "fused"), header(), case_line, show_summary)
