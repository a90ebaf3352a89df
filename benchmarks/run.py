"""Measure fastbn against torch: ``python benchmarks/run.py --help``.

Cases flow in from suite.py; each is checked, timed, printed and written as JSON Lines. Ctrl-C keeps what was
measured so far.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import run_gpu
import torch
from check import PEERS_SLACK, Mismatch, verify
from costs import call_records, import_record, memory_records, variants
from environment import environment, gpu
from fused import measure_fused
from limits import OF_PASS, limits
from peers import PEERS, Peer, available
from report import (
    LATEST,
    LATEST_GPU,
    case_line,
    fused_line,
    header,
    make_console,
    select,
    show_environment,
    show_summary,
)  # fmt: skip
from report_gpu import show_gpu_summary
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from suite import PASSES, Case, Tensors, cases, make_tensors
from timing import Protocol, measure

SUITES = ["resnet50", "odd", "fused", "costs"]
# Seconds for the comparison of one pass; where a round takes longer than a seventh of it, seven rounds.
SECONDS = {"quick": 0.1, "normal": 0.25, "full": 4.0}
# Odd cases are many and small: they get this part of it.
ODD_PART = 0.3
# Making a case's tensors and checking them takes about this many seconds for a byte of one tensor.
SECONDS_PER_BYTE = 5e-8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time fastbn's batch norm against torch's.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, help="on the CPU (a GPU: resnet50)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64", "float16", "bfloat16"],
                        help="(default: float32 bfloat16; on a GPU bfloat16 float32 float16)")  # fmt: skip
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "channels_last"],
                        choices=["contiguous", "channels_last"])  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+",
                        help="of the ResNet-50 cases (default 32; on a GPU 32 128 256)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default 2)")
    parser.add_argument("--peers", nargs="+", choices=[p for p in PEERS if p != "fastbn"],
                        help="whom to compare with besides torch (on a GPU torch.compile by default)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0, help="on a GPU: begin no case after so many (0: no limit)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", dest="pace", action="store_const", const="quick", help="fewer repetitions")
    pace.add_argument("--full", dest="pace", action="store_const", const="full", help="many repetitions")
    parser.add_argument("--compile-only", nargs=2, type=int, metavar=("SHARE", "SHARES"),
                        help="on a GPU: only fill torch.compile's cache, with this share of the cases")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"JSON Lines (default {LATEST}; of a GPU {LATEST_GPU})")
    parser.set_defaults(pace="normal")
    return with_defaults(parser.parse_args())


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Those that differ between the devices."""
    on_gpu = arguments.device == "cuda"
    arguments.dtypes = arguments.dtypes or (["bfloat16", "float32", "float16"] if on_gpu else ["float32", "bfloat16"])
    arguments.batch = arguments.batch or ([32, 128, 256] if on_gpu else [32])
    arguments.peers = arguments.peers or (["torch", "torch.compile"] if on_gpu else ["torch"])
    arguments.output = arguments.output or (LATEST_GPU if on_gpu else LATEST)
    return arguments


def calls(tensors: Tensors, peer: Peer) -> dict[str, Callable[[], object]]:
    """What a training loop or a server would call, for each pass."""
    x, dy = tensors.x, tensors.dy
    module, frozen = peer(tensors.module), peer(tensors.module).eval().requires_grad_(False)
    inputs = (x, module.weight, module.bias)
    values = x.detach()
    return {
        "forward": lambda: module(x),
        "forward+backward": lambda: torch.autograd.grad(module(x), inputs, dy),
        "eval": lambda: frozen(values),
    }


def measure_case(case: Case, peers: list[str], protocol: Protocol, seed: int) -> list[dict[str, object]]:
    """A record for each pass, or one that says that a result is wrong."""
    tensors = make_tensors(case, seed)
    for name in peers:
        if name != "torch":
            try:
                verify(tensors, PEERS[name], 1.0 if name == "fastbn" else PEERS_SLACK)
            except Mismatch as error:
                return [{"kind": "wrong", **case.fields(), "error": f"{name}: {error}"}]
    by_variant = {name: calls(tensors, peer) for name, peer in variants(peers).items()}
    bounds = limits(tensors)
    rng = random.Random(seed)
    records = []
    for name in PASSES:
        functions = {variant: by_pass[name] for variant, by_pass in by_variant.items()}
        functions |= {bound: bounds[bound] for bound in OF_PASS[name]}
        record = {"kind": "case", **case.fields(), "pass": name, "seconds": measure(functions, protocol, rng)}
        records.append(record)
    return records


def measure_all(
    arguments: argparse.Namespace, peers: list[str], console, progress: Progress
) -> Iterator[dict[str, object]]:
    """Records as they are measured; prints what it is at."""
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    todo = []
    for number, batch in enumerate(arguments.batch):  # shapes other than ResNet-50's have batches of their own
        suites = arguments.suites if number == 0 else ["resnet50", "fused"]
        todo += cases([s for s in arguments.suites if s in suites], dtypes, arguments.layouts, batch)
    if arguments.pace != "full":
        usual = ("float32", "contiguous"), ("bfloat16", "channels_last")
        todo = [c for c in todo if c.suite != "fused" or (c.fields()["dtype"], c.layout) in usual]
    pace = SECONDS[arguments.pace]
    budgets = {case: pace * (ODD_PART if case.suite == "odd" else 1) for case in todo}
    weights = {case: 3 * budgets[case] + case.nbytes * SECONDS_PER_BYTE for case in todo}
    bar = progress.add_task("measuring", total=sum(weights.values()))
    if todo:
        console.print(f"{'':>9}{header()}", soft_wrap=True)
    for number, case in enumerate(todo, 1):
        progress.update(bar, description=str(case))
        if case.suite == "fused":
            protocol = Protocol(budgets[case] / 2, least_rounds=5)
            records = list(measure_fused(case, protocol, arguments.seed + number))
        else:
            records = measure_case(case, peers, Protocol(budgets[case]), arguments.seed + number)
        yield from records
        if wrong := select(records, kind="wrong"):
            line = f"{case}: [red]WRONG[/]: {wrong[0]['error']}"
        else:
            line = fused_line(records) if case.suite == "fused" else case_line(records)
        console.print(f"{number:>3}/{len(todo):<3}  {line}", soft_wrap=True)
        progress.advance(bar, weights[case])
    if "costs" in arguments.suites:
        progress.update(bar, description="calls, import, memory")
        console.print("measuring the time of a call and of the import, and memory ...")
        yield from call_records(peers, 2 * pace, random.Random(arguments.seed))
        yield import_record()
        yield from memory_records()


def main() -> int:
    arguments = parse_arguments()
    console = make_console()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        console.print("[red]torch sees no GPU[/]")
        return 1
    if arguments.compile_only:
        run_gpu.compile_all(arguments, *arguments.compile_only)
        return 0
    peers, missing = available(list(dict.fromkeys(["fastbn", "torch", *arguments.peers])))
    if "fastbn" in missing:
        console.print(f"[red]fastbn cannot be imported:[/] {missing['fastbn']}")
        return 1
    for name, reason in missing.items():
        console.print(f"missing, not compared: {name} ({reason})")

    start = time.perf_counter()
    on_gpu = arguments.device == "cuda"
    head = {
        **environment(),
        **(gpu() if on_gpu else {}),
        "pace": arguments.pace,
        "seed": arguments.seed,
        "missing": missing,
    }
    show_environment(console, head)
    records = [head]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"),
               TimeRemainingColumn())  # fmt: skip
    interrupted = False
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w") as output:
        print(json.dumps(head), file=output, flush=True)
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                measuring = run_gpu.measure_all if on_gpu else measure_all
                for record in measuring(arguments, peers, console, progress):
                    records.append(record)
                    print(json.dumps(record), file=output, flush=True)
        except KeyboardInterrupt:
            interrupted = True
            console.print("\ninterrupted: what follows is what was measured so far")

    (show_gpu_summary if on_gpu else show_summary)(console, records)
    console.print(f"{time.perf_counter() - start:.0f} s; results in {os.path.relpath(arguments.output)}")
    if interrupted:
        return 130
    return int(any(record["kind"] == "wrong" for record in records))


if __name__ == "__main__":
    sys.exit(main())
