"""The tables of a run on a CPU, each written once: report.py prints them, readme.py writes them as Markdown."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from figures import FIGURES, Figure
from records import (
    SHORT,
    Record,
    backends_of_torch,
    batches_of,
    compared,
    geometric_mean,
    groups_of,
    key_of,
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
from suite import PASSES
from summaries import absences


@dataclass
class Table:
    title: str
    head: list[str]  # of the columns; the first one names the rows
    rows: list[list[str]] = field(default_factory=list)


def mean(records: list[Record], ratio: Callable[[Record], float] = speedup) -> str:
    return f"{geometric_mean(map(ratio, records)):.2f}" if records else ""


def labels(records: list[Record]) -> dict[str, list[Record]]:
    """The records of each type and layout."""
    return {f"{d}, {layout}": select(records, dtype=d, layout=layout) for d, layout in groups_of(records)}


def network_table(records: list[Record], batch: int) -> Table:
    cases = resnet50(records, batch)
    head = [cell for name in PASSES for cell in (f"{name}: torch / fastbn", "of limit")]
    table = Table(f"The batch norms of ResNet-50 at batch {batch}", ["cases", *head])
    for label, chosen in {**labels(cases), f"all {len(cases) // len(PASSES)} cases": cases}.items():
        row = [label]
        for name in PASSES:
            of_pass = select(chosen, **{"pass": name})
            row += [mean(of_pass), f"{network_mean(of_pass, of_limit):.0%}" if of_pass else ""]
        table.rows.append(row)
    return table


def cold_table(records: list[Record]) -> Table:
    """Cases that were also measured with inputs that are not in the cache."""
    cold = compared(select(records, kind="case", suite="resnet50", inputs="cold"))
    warm_ones = {key_of({**r, "inputs": "cold"}): r for r in resnet50(records)}
    table = Table("torch / fastbn with inputs in the cache (warm) and not (cold)", ["ResNet-50", "warm", "cold"])
    for name in PASSES:
        rows = [r for r in select(cold, **{"pass": name}) if key_of(r) in warm_ones]
        if rows:
            cells = [mean([warm_ones[key_of(r)] for r in rows]), mean(rows)]
            table.rows.append([f"{name}, {len(rows)} cases", *cells])
    return table


def peers_table(records: list[Record]) -> Table:
    """Geometric means over the cases that a peer took part in; of ResNet-50 the smallest batch."""
    smallest = min(batches_of(records), default=0)
    chosen = [r for r in records if r["kind"] in ("case", "fused") and r["suite"] != "scaling"]
    chosen = [r for r in chosen if r["suite"] != "resnet50" or r["shape"][0] == smallest]
    others = peers_of(chosen)
    table = Table("Time of each peer over fastbn's (cases)", ["suite and pass", *others])
    for key in dict.fromkeys((r["suite"], r.get("epilogue", ""), r.get("inputs", "warm"), r["pass"]) for r in chosen):
        suite, epilogue, inputs, name = key
        rows = [r for r in select(chosen, suite=suite, **{"pass": name})
                if r.get("epilogue", "") == epilogue and r.get("inputs", "warm") == inputs]  # fmt: skip
        found = [[speedup(r, peer) for r in rows if peer in r["seconds"]] for peer in others]
        cells = [f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "" for ratios in found]
        table.rows.append([" ".join(filter(None, (suite, epilogue, name, inputs if inputs == "cold" else ""))), *cells])
    return table


def bandwidth_table(records: list[Record]) -> Table:
    found = select(records, kind="bandwidth")
    ends = list(dict.fromkeys(r["when"] for r in found))
    names = list(found[0]["rates"]) if found else []
    table = Table("Bandwidth, GB/s", ["MB a tensor", *(f"{name}, {when}" for when in ends for name in names)])
    for size in dict.fromkeys(r["bytes"] for r in found):
        rows = [next(iter(select(found, when=when, bytes=size)), None) for when in ends]
        cells = [f"{row['rates'][name] / 1e9:.1f}" if row else "" for row in rows for name in names]
        table.rows.append([f"{size / 1e6:.1f}", *cells])
    return table


def model_table(records: list[Record]) -> Table:
    head = ["network", "variant", "images a second", "ms a step", "speed over torch", "peak memory, MB"]
    table = Table("Training steps of whole networks, float32", head)
    for r in select(records, kind="model"):
        (images, _, side, _), of_torch = r["shape"], seconds(r, "torch")
        for variant, peak in r["peak_bytes"].items():
            time = seconds(r, variant)
            numbers = f"{images / time:.1f}", f"{time * 1e3:.0f}", f"{of_torch / time:.2f}", f"{peak / 1e6:.0f}"
            table.rows.append([f"{r['model']}, {images} × {side}²", variant, *numbers])
    return table


def accuracy_table(records: list[Record]) -> Table:
    found = select(records, kind="accuracy")
    peers = list(dict.fromkeys(r["peer"] for r in found))
    title = "Largest error against float64 over the largest value, of y / of dx"
    table = Table(title, ["type, mean ± standard deviation of x", *peers])
    for dtype, centre, std in dict.fromkeys((r["dtype"], r["mean"], r["std"]) for r in found):
        rows = {r["peer"]: r["errors"] for r in select(found, dtype=dtype, mean=centre, std=std)}
        cells = [f"{rows[p]['y']:.1e} / {rows[p]['dx']:.1e}" if p in rows else "" for p in peers]
        table.rows.append([f"{SHORT[dtype]}, {centre:g} ± {std:g}", *cells])
    return table


def scaling_table(records: list[Record]) -> Table:
    found = compared(warm(records, kind="case", suite="scaling"))
    columns = [(dtype, name) for dtype, _ in groups_of(found) for name in PASSES]
    head = ["elements of x", *(f"{SHORT[dtype]} {name}" for dtype, name in columns)]
    table = Table("ns for each element, 64 channels: fastbn / torch / copy of x", head)
    for shape in dict.fromkeys(tuple(r["shape"]) for r in found):
        elements, cells = math.prod(shape), []
        for dtype, name in columns:
            rows = [r for r in select(found, dtype=dtype, **{"pass": name}) if tuple(r["shape"]) == shape]
            variants = ("fastbn", "torch", "copy") if rows else ()
            cells.append(" / ".join(f"{seconds(rows[0], v) / elements * 1e9:.3f}" for v in variants))
        table.rows.append([f"{elements:.1e}", *cells])
    return table


def figures_table(records: list[Record], figures: list[Figure] = FIGURES) -> Table:
    table = Table("Targets (means: geometric, ResNet-50)", ["figure", "target", "measured", "reached", "detail"])
    for figure in figures:
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.target:{figure.style}}"
        cells = ["not measured", "", ""]
        if measured := figure.measure(records):
            value, detail = measured
            cells = [f"{value:{figure.style}}", "yes" if figure.reached(value) else "no", detail]
        table.rows.append([figure.name, bound, *cells])
    return table


def tables_of(records: list[Record]) -> list[Table]:
    """The tables that are not empty, in the order in which they are shown."""
    tables = [network_table(records, batch) for batch in batches_of(records)]
    makers = (cold_table, peers_table, model_table, scaling_table, accuracy_table, bandwidth_table, figures_table)
    return [table for table in (*tables, *(make(records) for make in makers)) if table.rows]


def machine(records: list[Record]) -> str:
    """Where, when and with which kernels a run was measured."""
    (head,) = select(records, kind="environment")
    return (
        f"{head['threads']} of {head['cores']} cores of {head['cpu']} ({head['capability']}), torch {head['torch']}, "
        f"{head['build']['compiler']}, {head['date'][:10]}, kernels {head['csrc'][:12]}"
    )


def remarks(records: list[Record]) -> list[str]:
    """Sentences that explain and complete the tables."""
    if not (cases := resnet50(records)):
        return []
    noises, slowest = sorted(map(noise, cases)), min(cases, key=speedup)
    name = f"{tuple(slowest['shape'])} {SHORT[slowest['dtype']]} {SHORT[slowest['layout']]} {slowest['pass']}"
    found = [
        "Ratios of times are geometric means. \"Of limit\" is the time of a copy of the least bytes over fastbn's, "
        "summed over the network.",
        f"Noise of a ratio at 99 % confidence: median {noises[len(noises) // 2]:.1%}, at most {noises[-1]:.0%}.",
        f"The slowest case at batch {cases[0]['shape'][0]}: {name}, {speedup(slowest):.2f} times the speed of torch.",
        f"Eager torch ran its kernels named {', '.join(backends_of_torch(cases))}.",
    ]  # fmt: skip
    if training := [r for r in with_fresh(cases) if r["pass"] != "eval"]:
        speed = mean(training, of_fresh_limit)
        found.append(f"In training, fastbn runs at {speed} times the speed of `clone` and `add` into fresh memory.")
    return found


def absent(records: list[Record]) -> list[str]:
    """Peers that were not compared, or not in all cases, and why: a line each."""
    heads = select(records, kind="environment")
    lines = [f"{name}: not installed ({why})" for head in heads for name, why in head["missing"].items()]
    lines += [f"{name}: not asked for" for head in heads for name in head["not_asked"]]
    return lines + [f"{r['peer']}: {r['kind']} in {r['cases']} cases ({r['error']})" for r in absences(records)]
