"""Measure fastbn against its peers: ``python benchmarks/run.py --help``.

What to measure is decided here and becomes units of work; session.py runs them, prints a line for each and writes the
results (summaries.py has their format). Ctrl-C keeps what was measured so far, ``--resume`` goes on from there.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accuracy import measure_accuracy
from compare import compare
from comparing import measure_case
from costs import call_records, import_record, memory_records
from environment import available_memory, environment, gpu
from gpu_timing import sets_for
from limits import bandwidth_records, cache_bytes
from models import measure_model
from peers import OTHERS, PEERS, available
from records import LATEST, LATEST_GPU, Record
from report import case_line, header, make_console, show_environment, show_summary, show_wrong
from report_gpu import header as gpu_header
from report_gpu import show_gpu_summary
from run_gpu import compile_all, gpu_units
from session import CannotResume, Session, Unit
from suite import HELD, MODULES, SUITES, Case, cases
from summaries import load, rounds_of
from timing import Protocol

ALL_SUITES = [*SUITES, "accuracy", "model", "costs"]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
LAYOUTS = ["contiguous", "channels_last"]


@dataclass(frozen=True)
class Pace:
    seconds: float  # for the comparison of one pass
    least_rounds: int  # where they take longer than that
    batches: tuple[int, ...]  # of ResNet-50's shapes
    largest: int  # elements of the scaling suite
    models: tuple[tuple[str, int, int], ...]  # name, images, height = width
    model_seconds: float


PACES = {
    "quick": Pace(0.1, 3, (32,), 2 * 10**6, (("ResNet-50", 8, 96),), 3.0),
    "full": Pace(0.4, 5, (32, 128, 256), 0, (("ResNet-50", 16, 128), ("MobileNetV2", 16, 128)), 30.0),
}
# The many small cases, whose times vary little, get this part of the time.
SMALL_PART = 0.3
# At batches above this one, and in the scaling suite, rounds take seconds: few, and against torch and copies alone.
USUAL_BATCH, FEW_ROUNDS = 32, 3
# Making a case's tensors and checking them takes about this many seconds for a byte of one tensor.
SECONDS_PER_BYTE = 5e-8
# Fused cases are of these, unless peers are named.
USUAL = (("float32", "contiguous"), ("bfloat16", "channels_last"))
# Of the memory that is available, a case may take this part.
MEMORY_PART = 0.85


def shape_of(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) not in MODULES or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape of 2 to 5 positive sizes, such as 32x64x56x56")
    return shape


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time fastbn's batch norm against torch's and others'.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--suites", nargs="+", choices=ALL_SUITES, help="(default: all; a GPU has resnet50 and model)")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="NxCx...", help="these shapes instead of suites")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES,
                        help="(default: float32 bfloat16; on a GPU bfloat16 float32 float16)")  # fmt: skip
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--batch", type=int, nargs="+",
                        help="of the ResNet-50 cases (default 32; with --full or on a GPU 32 128 256)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default 2)")
    parser.add_argument("--peers", nargs="+", choices=[p for p in PEERS if p != "fastbn"],
                        help="whom to compare with (default torch, and torch.compile where something is fused; "
                             "with --full all; on a GPU torch, torch.compile)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0, help="begin nothing after so many (0: no limit)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", dest="pace", action="store_const", const="quick", help="under five minutes (default)")
    pace.add_argument("--full", dest="pace", action="store_const", const="full", help="everything")
    parser.add_argument("--resume", action="store_true", help="go on with the output file of a run that was stopped")
    parser.add_argument("--compare", type=Path, metavar="OLD.jsonl",
                        help="print what got slower than in this file, beyond the noise, and fail then")  # fmt: skip
    parser.add_argument("--compile-only", nargs=2, type=int, metavar=("SHARE", "SHARES"),
                        help="on a GPU: only fill torch.compile's cache, with this share of the cases")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"the summary (default {LATEST}; of a GPU {LATEST_GPU})")
    parser.set_defaults(pace="quick")
    return with_defaults(parser.parse_args(arguments))


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in the defaults that depend on the device."""
    on_gpu = arguments.device == "cuda"
    arguments.dtypes = arguments.dtypes or (["bfloat16", "float32", "float16"] if on_gpu else ["float32", "bfloat16"])
    arguments.batch = arguments.batch or ([32, 128, 256] if on_gpu else list(PACES[arguments.pace].batches))
    arguments.suites = arguments.suites or (["resnet50"] if on_gpu else [] if arguments.shapes else ALL_SUITES)
    arguments.output = arguments.output or (LATEST_GPU if on_gpu else LATEST)
    return arguments


def is_large(case: Case) -> bool:
    """Whether rounds are few, and without clone and add."""
    return case.suite == "scaling" or (case.suite == "resnet50" and case.shape[0] > USUAL_BATCH)


def peers_for(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The peers of a case besides torch: those that were named, or those that the time allows."""
    if arguments.peers:
        return arguments.peers
    if is_large(case):
        return []
    if arguments.pace == "full":
        return OTHERS
    return ["torch.compile"] if case.suite == "fused" else []


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    chosen = [Case("shapes", shape, dtype, layout) for shape in arguments.shapes or [] for dtype in dtypes
              for layout in (arguments.layouts if len(shape) >= 4 else ["contiguous"])]  # fmt: skip
    largest = PACES[arguments.pace].largest
    for suite in [s for s in SUITES if s in arguments.suites]:
        batches = arguments.batch if suite == "resnet50" else arguments.batch[:1]
        chosen += [case for batch in batches for case in cases(suite, dtypes, arguments.layouts, batch, largest)]
    if not arguments.peers:  # half of the fused cases, because torch.compile makes them long
        chosen = [c for c in chosen if c.suite != "fused" or (c.fields()["dtype"], c.layout) in USUAL]
    # the large ones last: a run that ends early has the others
    return sorted(chosen, key=lambda c: c.suite == "resnet50" and is_large(c))


def case_units(case: Case, here: list[str], arguments: argparse.Namespace, seed: int) -> Iterable[Unit]:
    """The case with warm inputs; and with cold ones, where several fit into the cache and there is time."""
    wanted = peers_for(case, arguments)
    peers = ["fastbn", "torch", *(p for p in here if p in wanted and p != "torch")]
    need, have = HELD * case.nbytes, MEMORY_PART * available_memory()
    if need > have:
        error = f"needs {need / 1e9:.1f} GB of memory, and {have / 1e9:.1f} may be used"
        yield Unit(str(case), lambda: [{"kind": "skipped", **case.fields(), "error": error}], 0.1)
        return
    pace = PACES[arguments.pace]
    usual = case.suite in ("resnet50", "fused", "shapes")
    seconds = pace.seconds * (1 if usual else SMALL_PART)
    large = is_large(case)
    least = FEW_ROUNDS if large else pace.least_rounds
    protocol = Protocol(seconds, least, base="torch", others=tuple(set(peers) - {"fastbn", "torch"}))
    cost = 3 * seconds + case.nbytes * SECONDS_PER_BYTE * (2 + len(peers))
    yield Unit(str(case), partial(measure_case, case, peers, protocol, seed, fresh=not large), cost, case_line)
    sets = sets_for(case.nbytes, cache_bytes())
    if sets > 2 and (arguments.pace == "full" and case.suite in ("resnet50", "small") or case.suite == "shapes"):
        few = Protocol(seconds / 2, FEW_ROUNDS)
        both = ["fastbn", "torch"]
        yield Unit(f"{case} cold", partial(measure_case, case, both, few, seed, sets), 2 * cost, case_line)


def cpu_units(arguments: argparse.Namespace, here: list[str]) -> list[Unit]:
    pace, rng = PACES[arguments.pace], random.Random(arguments.seed)
    bandwidth = pace.seconds / 5
    units = [Unit("bandwidth at the begin", partial(bandwidth_records, "begin", bandwidth, rng))]
    for number, case in enumerate(chosen_cases(arguments), 1):
        units += case_units(case, here, arguments, arguments.seed + 100 * number)
    others = []
    if "costs" in arguments.suites:
        others += [
            Unit("call", partial(call_records, ["fastbn", "torch"], 2 * pace.seconds, rng), 2, always=True),
            Unit("import", lambda: [import_record()], 6, always=True),
            Unit("memory", memory_records, 12, always=True),
        ]
    if "accuracy" in arguments.suites:
        peers = ["fastbn", "torch", *(p for p in here if p in (arguments.peers or OTHERS) and p != "torch")]
        if arguments.pace != "full" and not arguments.peers:
            peers = ["fastbn", "torch"]
        for name in arguments.dtypes:
            work = partial(measure_accuracy, getattr(torch, name), arguments.layouts[0], peers, arguments.seed)
            others.append(Unit(f"accuracy {name}", work, 5))
    if "model" in arguments.suites:
        protocol = Protocol(pace.model_seconds, least_rounds=3, most_rounds=20)
        for name, images, side in pace.models:
            work = partial(measure_model, name, images, side, protocol, rng)
            others.append(Unit(f"model {name}", work, 2 * pace.model_seconds))
    # before the scaling suite and the large batches, which a limit of time may leave out
    first_large = next((i for i, u in enumerate(units) if u.name.startswith("scaling")), len(units))
    units[first_large:first_large] = others
    return [*units, Unit("bandwidth at the end", partial(bandwidth_records, "end", bandwidth, rng), always=True)]


def main() -> int:
    arguments = parse_arguments()
    console = make_console()
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        console.print("[red]torch sees no GPU[/]")
        return 1
    if arguments.compare and not arguments.compare.exists():
        console.print(f"[red]--compare: there is no {arguments.compare}[/]")
        return 1
    old = load(arguments.compare) if arguments.compare else None  # before the run writes over it
    if arguments.compile_only:
        compile_all(arguments, *arguments.compile_only)
        return 0
    # on a GPU torch.compile alone, unless there is time
    everybody = arguments.peers or (["torch.compile"] if on_gpu and arguments.pace != "full" else OTHERS)
    here, missing = available(list(dict.fromkeys(["fastbn", "torch", *everybody])))
    if "fastbn" in missing:
        console.print(f"[red]fastbn cannot be imported:[/] {missing['fastbn']}")
        return 1
    for name, reason in missing.items():
        console.print(f"missing, not compared: {name} ({reason})", soft_wrap=True)

    start = time.perf_counter()
    head: Record = {**environment(), **(gpu() if on_gpu else {}), "pace": arguments.pace, "seed": arguments.seed,
                    "missing": missing, "not_asked": [p for p in OTHERS if p not in everybody]}  # fmt: skip
    show_environment(console, head)
    try:
        session = Session(console, arguments.output, head, arguments.resume)
    except CannotResume as error:
        console.print(f"[red]cannot resume:[/] {error}", soft_wrap=True)
        return 1
    units = gpu_units(arguments, here) if on_gpu else cpu_units(arguments, here)
    records = session.run(units, arguments.seconds, gpu_header() if on_gpu else header())
    (show_gpu_summary if on_gpu else show_summary)(console, records)
    show_wrong(console, records)
    files = (os.path.relpath(path) for path in (arguments.output, rounds_of(arguments.output)))
    console.print("{:.0f} s; results in {}, every repetition in {}".format(time.perf_counter() - start, *files))
    slower = bool(old and compare(console, old, records))
    if session.interrupted:
        return 130
    return int(slower or any(r["kind"] == "wrong" and r.get("peer", "fastbn") == "fastbn" for r in records))


if __name__ == "__main__":
    sys.exit(main())
