"""The paper's experiments in small, on a CPU: ``python benchmarks/paper/run.py --help`` (make paper).

Data and settings flow in, paper.json flows out, and from it alone pictures and a page: ``--pictures`` draws them anew.
Numbers of the same seeds are the same; times are kept apart from them. In the file: results, settings, times, machine.
"""

import argparse
import contextlib
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
    "sigmoids": (sigmoids.run, 60),
    "inception": (inception.run, 250),
    "ensemble": (ensemble.run, 190),
    "population": (population.run, 65),
    "batch_size": (batch_size.run, 220),
    "shift": (shift.run, 90),
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


def begin(settings: Settings, data: Data, jobs: int, names: list[str], folder: Path) -> dict:
    """What a run of these experiments fills in. What the folder has of others stays, if data, machine, and all settings
    that are not of these experiments are the same."""
    about = {"name": data.name, "train": len(data.train_labels), "test": len(data.test_labels)}
    paper = {
        "data": about,
        "settings": dataclasses.asdict(settings),
        "machine": machine(jobs),
        "results": {},
        "times": {},
    }
    paper = json.loads(json.dumps(paper))  # tuples become lists, as in the file
    with contextlib.suppress(OSError, ValueError):
        old = json.loads((folder / "paper.json").read_text())
        same = all(old[part] == paper[part] for part in ("data", "machine"))
        if same and all(old["settings"].get(k) == v for k, v in paper["settings"].items() if k not in names):
            return {**paper, "results": old["results"], "times": old["times"]}
    return paper


def run_all(
    paper: dict, settings: Settings, names: list[str], workers: Workers, console: Console, folder: Path
) -> None:
    """Each experiment's results and times, written as they come: a run that is stopped keeps them."""
    if workers.progress:
        total = sum(EXPERIMENTS[name][1] for name in names)
        workers.task = workers.progress.add_task("beginning", total=total)
    for name in names:
        run, workers.cost = EXPERIMENTS[name]
        if workers.progress:
            workers.progress.update(workers.task, description=name)
        start = time.perf_counter()
        found = run(settings, workers.data, workers)
        paper["times"][name] = {"steps": found.pop("times", {}), "wall_s": time.perf_counter() - start}
        paper["results"][name] = found
        write(paper, folder)
        console.print(f"{name}: {paper['times'][name]['wall_s']:.0f} s")


def write(paper: dict, folder: Path) -> None:
    for part in ("results", "times"):
        paper[part] = {name: paper[part][name] for name in EXPERIMENTS if name in paper[part]}
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
    paper = begin(settings, data, chosen.jobs, chosen.only, chosen.output)
    with progress_bar(console) as progress, Workers(data, chosen.data, chosen.jobs, progress) as workers:
        # learning rates that are in the file need not be searched again
        kept = {name: found for name, found in paper["results"].items() if name not in chosen.only}
        workers.known = {name: found["search"] for name, found in kept.items() if "search" in found}
        run_all(paper, settings, chosen.only, workers, console, chosen.output)
    show(paper, chosen.output)
    console.print(f"{time.perf_counter() - start:.0f} s; results in {os.path.relpath(chosen.output)}/paper.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
