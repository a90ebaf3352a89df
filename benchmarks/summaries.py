"""Results as they are committed: the summary of a run, in which a case is a row of numbers.

A run writes its records with every repetition to NAME.rounds.jsonl, which git ignores, and at its end this summary of
them to NAME.jsonl. A line of it holds a group of cases (same kind, suite, dtype, layout, ...). A case is a row: the
fields of ROWS, and then for each pass and variant of ``columns`` the median in microseconds and its relative error in
percent at 99 % confidence (null for a single repetition). Accuracy has plain numbers. Other records stay as they are.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from files import replace_text

Record = dict
# The fields by which the cases of a group differ, and the values that a record may have of each variant.
ROWS = {
    "case": ("shape", "count"), "fused": ("shape", "count"), "gpu": ("shape", "count"), "accuracy": ("mean", "std"),
}  # fmt: skip
COMPARED = ("case", "fused", "gpu")
VALUES = ("seconds", "graph", "eager", "errors")


def rounds_of(path: Path) -> Path:
    """The file with every repetition, beside a summary."""
    return path.with_name(f"{path.stem}.rounds{path.suffix}")


def rounded(value: float, digits: int = 4) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short


def compact(value: object) -> object:
    """A value of a record without repetitions, its numbers with four digits."""
    if isinstance(value, dict):
        return {k: compact(v) for k, v in value.items() if k not in ("samples", "low", "high")}
    if isinstance(value, list):
        return [compact(v) for v in value]
    return rounded(value) if isinstance(value, float) else value


def numbers(values: dict) -> list[float | int | None]:
    found = []
    for value in values.values():
        if isinstance(value, dict):
            found += [rounded(value["median"] * 1e6), rounded(value["error"] * 100, 2)]
        else:
            found.append(rounded(value, 2))
    return found


def unit_of(record: Record) -> str:
    """The unit of work that a record is of, named as its suite.Case is."""
    cold = "cold" if record.get("inputs") == "cold" else ""
    names = (record.get(name) for name in ("suite", "model", "shape", "dtype", "layout", "epilogue"))
    return " ".join([*(str(name) for name in names if name), *([cold] if cold else [])])


def grouped(records: list[Record]) -> list[Record]:
    """A line for each group: the passes of a case become one row, cases with the same columns one line."""
    cases: dict[str, tuple[Record, list, dict]] = {}
    for record in records:
        values = {name: record[name] for name in VALUES if name in record}
        row = [record.get(name) for name in ROWS[record["kind"]]]
        left_out = (*ROWS[record["kind"]], *values, "tensor_bytes", "pass")
        fields = {name: value for name, value in record.items() if name not in left_out}
        cases.setdefault(json.dumps([fields, row]), (fields, row, {}))[2][record.get("pass", "")] = values
    lines: dict[str, Record] = {}
    for fields, row, passes in cases.values():
        columns = {p: {name: list(variants) for name, variants in values.items()} for p, values in passes.items()}
        line = lines.setdefault(json.dumps([fields, columns]), {**fields, "columns": columns, "rows": []})
        line["rows"].append(row + [n for values in passes.values() for v in values.values() for n in numbers(v)])
    return list(lines.values())


def is_absence(record: Record) -> bool:
    return record["kind"] in ("unsupported", "wrong", "failed") and "peer" in record


def absences(records: list[Record]) -> list[Record]:
    """Peers that could not do a case, or were wrong: a line for each reason, with the number of cases. Wrong results
    count as one reason, because their numbers differ in each case."""
    lines: dict[tuple[str, str, str], Record] = {}
    for r in filter(is_absence, records):
        key = r["kind"], r["peer"], r["error"] if r["kind"] == "unsupported" else ""
        first = {
            **{name: r[name] for name in ("kind", "peer", "error")},
            "first": r.get("first") or unit_of(r),
            "cases": 0,
        }
        line = lines.setdefault(key, first)
        line["cases"] += r.get("cases", 1)
    return list(lines.values())


def summarized(records: list[Record]) -> list[Record]:
    """The lines of a summary."""
    failed = {r["unit"] for r in records if r["kind"] == "failed" and "unit" in r}
    known = failed | {unit_of(r) for r in records if r["kind"] in COMPARED}
    done = [r["unit"] for r in records if r["kind"] == "done" and r["unit"] not in known]
    rows = [r for r in records if r["kind"] in ROWS]
    others = [r for r in records if r["kind"] not in (*ROWS, "done") and not is_absence(r)]
    heads = [r if r["kind"] == "environment" else compact(r) for r in others]
    return [*heads, *grouped(rows), *absences(records), {"kind": "done", "units": done}]


def expanded(line: Record) -> list[Record]:
    """The records of a line of either kind of file."""
    if line.get("kind") == "done" and "units" in line:
        return [{"kind": "done", "unit": unit} for unit in line["units"]]
    if "rows" not in line:
        return [line]
    fields = {name: value for name, value in line.items() if name not in ("columns", "rows")}
    names, records = ROWS[line["kind"]], []
    for row in line["rows"]:
        values = iter(row[len(names) :])
        for name, columns in line["columns"].items():
            record = {**fields, **{k: v for k, v in zip(names, row, strict=False) if v is not None}}
            record |= {"pass": name} if name else {}
            if "shape" in record:
                record["tensor_bytes"] = math.prod(record["shape"]) * getattr(torch, record["dtype"]).itemsize
            for kind, variants in columns.items():
                record[kind] = {v: next(values) if kind == "errors" else timed(values) for v in variants}
            records.append(record)
    return records


def timed(values: Iterator) -> dict[str, float]:
    microseconds, percent = next(values), next(values)
    return {"median": microseconds / 1e6, "error": math.inf if percent is None else percent / 100}


def load(path: Path) -> list[Record]:
    """The records of a file, a summary or one with every repetition."""
    records, units = [], {}
    for line in map(json.loads, path.read_text().splitlines()):
        found = expanded(line)
        records += found
        if "rows" in line:
            units |= {unit_of(r): {"kind": "done", "unit": unit_of(r)} for r in found if r["kind"] in COMPARED}
    return [*records, *units.values()]


def write(path: Path, lines: list[Record]) -> None:
    replace_text(path, "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))
