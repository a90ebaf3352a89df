"""The paper's experiments in small, on a CPU: ``python benchmarks/paper/run.py --help`` (make paper).

Data and settings flow in, paper.json flows out, and from it alone pictures and a page: ``--pictures`` draws them anew.
"""

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pages
import spread
import torch
from data import BadData, load, load_small
from settings import DATA, FULL, QUICK, RESULTS, SECONDS, WORK, Plan
from workers import Workers, clock

sys.path.append(str(Path(__file__).parents[1]))  # behind this folder, which has files of the same names
from environment import environment
from files import replace_text

EXPERIMENTS = {name: importlib.import_module(name) for name in SECONDS}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The experiments of Ioffe & Szegedy (2015) in small, on a CPU.")
    add, names = parser.add_argument, list(EXPERIMENTS)
    add("--data", type=Path, default=DATA, metavar="DIR", help="has folders mnist and fashion-mnist with IDX files "
        "(make paper-data); where one is missing, scikit-learn's digits are taken")  # fmt: skip
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--jobs", type=int, default=torch.get_num_threads(), help="trainings at once (default: all cores)")
    add("--output", type=Path, metavar="DIR", help="(default benchmarks/results/paper; with --quick build/paper/quick)")
    add("--work", type=Path, default=WORK, metavar="DIR", help="keeps finished trainings (default build/paper)")
    add("--quick", action="store_true", help="a few steps of each, which shows nothing: for the tests")
    add("--pictures", action="store_true", help="run nothing: pictures and page of what is in --output")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"argument --jobs: {chosen.jobs} is not 1 or more")
    chosen.output = chosen.output or (WORK / "quick" if chosen.quick else RESULTS)
    return chosen


def short(value: object):
    """Five digits are more than any number here has to say."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def run_all(settings: Plan, names: list[str], workers: Workers) -> dict:
    """Each experiment in a thread of its own, so that no core waits for an experiment's last training."""
    with ThreadPoolExecutor(len(names)) as threads:
        found = {name: threads.submit(EXPERIMENTS[name].run, settings, workers) for name in names}
        try:
            return {name: short(future.result()) for name, future in found.items()}
        except BaseException as error:
            print(f"\n{error!r}: stopping when trainings under way are done; the same command goes on from there")
            workers.pool.shutdown(wait=False, cancel_futures=True)  # which ends the threads, too
            raise


def page(paper: dict) -> str:
    """Prose is in text/, with names in braces for what the numbers say."""
    spread.counted = 0
    texts, (mnist, fashion) = Path(__file__).parent / "text", paper["data"]
    common = {**paper["settings"], "mnist": mnist["name"], "fashion": fashion["name"]}
    words = {name: EXPERIMENTS[name].words(found, paper) for name, found in paper["results"].items()}
    parts = [(texts / f"{name}.md").read_text().format(**said, **common) for name, said in words.items()]
    head = {**paper, **paper["environment"], **common, "tests": spread.counted, "chance": round(spread.counted / 20),
            "said": defaultdict(lambda: defaultdict(lambda: "(not run)"), words)}  # fmt: skip
    head |= {f"{name}_took": clock(paper["run"][f"{name}_s"]) for name in ("wall", "cpu")}
    return "\n".join([(texts / "head.md").read_text().format(**head), *parts])


def show(paper: dict, folder: Path, suffix: str = "svg") -> None:
    with pages.plt.style.context(pages.STYLE):
        for name, found in paper["results"].items():
            if hasattr(EXPERIMENTS[name], "plot"):
                pages.save(EXPERIMENTS[name].plot(found, paper), folder / f"{name}.{suffix}")
    (folder / "paper.md").write_text(page(paper))


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    file = chosen.output / "paper.json"
    if chosen.pictures:
        show(json.loads(file.read_text()), chosen.output)
        return 0
    settings = QUICK if chosen.quick else FULL
    try:
        data = [load(chosen.data, "MNIST").about(), load_small(chosen.data, "Fashion-MNIST").about()]
    except BadData as error:
        print(f"cannot load the data: {error}")
        return 1
    print(f"{data[0]['name']} and {data[1]['name']}; trainings at once: {chosen.jobs}")
    if not all(d["sha256"] for d in data):
        print("make paper-data fetches MNIST and Fashion-MNIST; results of digits say little")
    start, about = time.monotonic(), environment()
    depends = [data, about["torch"], about["csrc"], about["capability"], about["torch_capability"]]
    total_s = sum(SECONDS[name] for name in chosen.only)
    with Workers(chosen.work, chosen.data, depends, chosen.jobs, total_s) as workers:
        try:
            results = run_all(settings, chosen.only, workers)
        except (KeyboardInterrupt, CancelledError):
            return 130
    spent = {"wall_s": time.monotonic() - start, "cpu_s": workers.cpu_s, "found_s": workers.found_s}
    paper = {"data": data, "environment": about, "run": {**short(spent), "jobs": chosen.jobs}, "settings": settings,
             "results": results}  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(paper, allow_nan=False, separators=(",", ":")) + "\n")
    show(json.loads(file.read_text()), chosen.output)
    print(f"\n{clock(spent['wall_s'])} ({clock(workers.cpu_s)} of CPU time in trainings): {file.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
