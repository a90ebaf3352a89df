"""The paper's experiments in small, on a CPU: ``python benchmarks/paper/run.py --help`` (make paper).

Data and settings flow in, paper.json flows out, and from it alone pictures and a page: ``--pictures`` draws them anew.
Numbers of the same seeds are the same; times are kept apart from them. In the file: results, settings, times, machine.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

import batch_size
import ensemble
import inception
import population
import shift
import sigmoids
import torch
from data import BadData, Data, load
from pictures import draw
from report import page
from rich.console import Console
from settings import FULL, QUICK, Settings
from workers import Workers, cores, progress_bar

import fastbn

# Each with about how many seconds it takes on one core, for the progress bar.
EXPERIMENTS = {
    "sigmoids": (sigmoids.run, 50),
    "inception": (inception.run, 250),
    "ensemble": (ensemble.run, 150),
    "population": (population.run, 60),
    "batch_size": (batch_size.run, 180),
    "shift": (shift.run, 50),
}
RESULTS = Path(__file__).parents[1] / "results" / "paper"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The experiments of Ioffe & Szegedy (2015) in small, on a CPU.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files, gzipped or not (default: digits)")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME",
                        help=f"of {', '.join(EXPERIMENTS)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="how many, 0 and up (default 3)")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at once (default: all cores)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="(default results/paper)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, which shows nothing: for the tests")
    parser.add_argument("--pictures", action="store_true", help="run nothing: pictures and page of what is in --output")
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"argument --{name}: {getattr(chosen, name)} is not 1 or more")
    return chosen


def machine(jobs: int) -> dict:
    return {
        "torch": torch.__version__,
        "fastbn": fastbn.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "jobs": jobs,
    }


def run_all(settings: Settings, data: Data, names: list[str], workers: Workers, console: Console) -> tuple[dict, dict]:
    """Results and times of the experiments."""
    results, times = {}, {}
    if workers.progress:
        total = sum(EXPERIMENTS[name][1] for name in names)
        workers.task = workers.progress.add_task("beginning", total=total)
    for name in names:
        run, workers.cost = EXPERIMENTS[name]
        if workers.progress:
            workers.progress.update(workers.task, description=name)
        start = time.perf_counter()
        found = run(settings, data, workers)
        times[name] = {"steps": found.pop("times", {}), "wall_s": time.perf_counter() - start}
        results[name] = found
        console.print(f"{name}: {times[name]['wall_s']:.0f} s")
    return results, times


def write(paper: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "paper.json.part"
    beside.write_text(json.dumps(paper, indent=1, allow_nan=False) + "\n")
    os.replace(beside, folder / "paper.json")  # so that a run that is stopped here does not lose the old file


def show(paper: dict, folder: Path) -> None:
    draw(paper, folder)
    (folder / "paper.md").write_text(page(paper))


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    console = Console(highlight=False)
    if chosen.pictures:
        show(json.loads((chosen.output / "paper.json").read_text()), chosen.output)
        return 0
    settings = QUICK if chosen.quick else FULL
    if chosen.seeds:
        settings = dataclasses.replace(settings, seeds=tuple(range(chosen.seeds)))
    try:
        data = load(chosen.data)
    except BadData as error:
        console.print(f"[red]cannot load the data:[/] {error}", soft_wrap=True)
        return 1
    console.print(
        f"{data.name}, {len(data.train_labels)} images; {chosen.jobs} training{'s' * (chosen.jobs > 1)} at once"
    )
    start = time.perf_counter()
    with progress_bar(console) as progress, Workers(data, chosen.data, chosen.jobs, progress) as workers:
        results, times = run_all(settings, data, chosen.only, workers, console)
    paper = {"data": {"name": data.name, "train": len(data.train_labels), "test": len(data.test_labels)},
             "results": results, "settings": dataclasses.asdict(settings),
             "times": {"wall_s": time.perf_counter() - start, **times}, "machine": machine(chosen.jobs)}  # fmt: skip
    write(paper, chosen.output)
    show(paper, chosen.output)
    console.print(f"{time.perf_counter() - start:.0f} s; results in {os.path.relpath(chosen.output)}/paper.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
