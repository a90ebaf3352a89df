"""Runs units of work and writes their records as they come, every repetition included; a summary at the end.

What a unit raises is recorded and does not stop the others; Ctrl-C keeps what was measured. Each unit ends with a
record of kind "done": after an interruption, the records of a unit without one are measured again. A run is resumed
from the file of repetitions, or from the summary where that file is gone.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from comparing import last_line
from records import Record
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from summaries import load, rounds_of, summarized, write

# Fields of the environment that have to be equal for a run to be resumed.
SAME = ("csrc", "fastbn", "torch", "cpu", "threads", "pace", "seed", "gpu")


@dataclass
class Unit:
    """Something to measure. Its records are written to the file together, or not at all."""

    name: str
    measure: Callable[[], Iterable[Record]]
    cost: float = 1.0  # about how many seconds, for the progress bar
    line: Callable[[list[Record]], str] | None = None  # its records as a line of the terminal
    always: bool = False  # short, so measured even if no time is left


class CannotResume(Exception):
    """The file to resume is of another machine, version or setting."""


def finished(path: Path) -> list[Record]:
    """The records of the units that a file of repetitions has finished; those that failed are left out."""
    records: list[Record] = []
    unit: list[Record] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            unit.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # it was being written when the run was stopped
                break
            raise CannotResume(f"{path}: line {number} is not JSON ({error})") from None
        if unit[-1]["kind"] in ("environment", "done"):
            if not any(unit_failed(r) for r in unit):
                records += unit
            unit = []
    return records


def unit_failed(record: Record) -> bool:
    return record["kind"] == "failed" and "peer" not in record


def resumed(output: Path, head: Record) -> list[Record]:
    """The records of a run with this environment: from the file of repetitions, or else from the summary."""
    rounds = rounds_of(output)
    path = rounds if rounds.exists() else output
    if not path.exists():
        return [head]
    records = finished(path) if path == rounds else [r for r in load(path) if not unit_failed(r)]
    if not records or records[0]["kind"] != "environment":
        raise CannotResume(f"{path}: does not begin with an environment")
    if different := [
        f"{k} {records[0].get(k)!r}, now {head.get(k)!r}" for k in SAME if records[0].get(k) != head.get(k)
    ]:
        raise CannotResume(f"{path}: was measured with {'; '.join(different)}")
    return records


class Session:
    def __init__(self, console: Console, output: Path, head: Record, resume: bool = False) -> None:
        """Begin a file, or go on with it. Raises :class:`CannotResume`."""
        self.console, self.output = console, output
        self.records = resumed(output, head) if resume else [head]
        self.interrupted = False
        output.parent.mkdir(parents=True, exist_ok=True)
        write(rounds_of(output), self.records)

    def run(self, units: list[Unit], seconds: float = 0, title: str = "") -> list[Record]:
        """Measure those that are not in the file yet, for ``seconds`` at most (0: all). Returns all records."""
        known = {record["unit"] for record in self.records if record["kind"] == "done"}
        left = [unit for unit in units if unit.name not in known]
        if len(left) < len(units):
            self.console.print(f"{len(units) - len(left)} of {len(units)} measurements are in the file already")
        start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                   TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
        with rounds_of(self.output).open("a") as file, Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        ) as progress:  # fmt: skip
            bar = progress.add_task("measuring", total=round(sum(unit.cost for unit in left), 1))
            if title and left:
                self.console.print(f"{'':>9}{title}", soft_wrap=True)
            try:
                out = []
                for number, unit in enumerate(left, 1):
                    if seconds and time.perf_counter() - start > seconds and not unit.always:
                        out.append(unit.name)
                        continue
                    progress.update(bar, description=unit.name)
                    self._measure(unit, f"{number:>3}/{len(left):<3}", file)
                    progress.advance(bar, unit.cost)
                if out:
                    optional = sum(not unit.always for unit in left)
                    self.console.print(f"no time left for {len(out)} of {optional} cases")
                    self._write([{"kind": "left out", "cases": out}], file)
            except KeyboardInterrupt:
                self.interrupted = True
                self.console.print("\ninterrupted: what follows is what was measured so far")
        write(self.output, summarized(self.records))
        return self.records

    def _write(self, records: list[Record], file) -> None:
        self.records += records
        file.write("".join(f"{json.dumps(record)}\n" for record in records))
        file.flush()

    def _measure(self, unit: Unit, number: str, file) -> None:
        start, records = time.perf_counter(), []
        try:
            for record in unit.measure():
                records.append(record)
        except Exception as error:  # one failure must not hide the rest
            records.append({"kind": "failed", "unit": unit.name, "error": last_line(error)})
        done = {"kind": "done", "unit": unit.name, "wall_s": round(time.perf_counter() - start, 3)}
        self._write([*records, done], file)
        for record in records:
            if record["kind"] in ("wrong", "failed", "skipped"):
                who = f" ({record['peer']})" if "peer" in record else ""
                self.console.print(f"{number}  {unit.name}{who}: [red]{record['kind']}[/]: {record['error']}")
        if unit.line and (line := unit.line(records)):
            self.console.print(f"{number}  {line}", soft_wrap=True)
