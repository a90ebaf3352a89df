"""Writes the measured parts of README.md and docs/benchmarks.md, and their pictures, from a file of results.

Usage: readme.py [results/cpu.jsonl]    (make report)
       readme.py --check                (make report-check, for a release)

The text names the hash of each picture, so that a test can tell whether either was edited by hand; and the results name
the hash of csrc/ that they were measured with, by which --check tells which of them are stale.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from environment import ROOT, sources_hash
from plots import draw
from records import RESULTS, SHOWN, Record, batches_of, resnet50, select, speedup
from suite import PASSES
from summaries import load
from tables import Table, absent, machine, mean, remarks, tables_of

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = RESULTS / "pictures"
BEGIN, END = "<!-- measured: begin (written by make report; do not edit) -->", "<!-- measured: end -->"
CAPTIONS = {
    "speedup": "Speed-up over eager PyTorch for each batch-norm shape of ResNet-50",
    "limit": "Part of the memory limit reached, for each batch-norm shape of ResNet-50",
    "scaling": "Time for each element from ten thousand to a thousand million elements",
    "accuracy": "Error of the output against float64, over the mean of the input",
}
# Of README, the one that says most.
FIRST = "speedup"


def markdown(table: Table) -> list[str]:
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    return [f"### {table.title}", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""]


def picture(name: str, path: Path, page: Path) -> list[str]:
    return [f"![{CAPTIONS[name]}]({Path(os.path.relpath(path, page.parent)).as_posix()})", ""]


def headline(records: list[Record], pictures: dict[str, Path], page: Path) -> list[str]:
    """README's part: one line of figures and one picture."""
    cases = resnet50(records)
    if not cases:
        return []
    ratios = ", ".join(f"**{mean(select(cases, **{'pass': name}))}** {name}" for name in PASSES)
    line = (
        f"Speed-up over eager torch, batch norms of ResNet-50 at batch {min(batches_of(records))}: {ratios} (geometric "
        f"means of {len(cases) // len(PASSES)} cases; slowest case {min(map(speedup, cases)):.2f}; {machine(records)})."
    )
    return [line, "", *(picture(FIRST, pictures[FIRST], page) if FIRST in pictures else [])]


def details(records: list[Record], pictures: dict[str, Path], page: Path, source: Path) -> list[str]:
    """The part of docs/benchmarks.md: all tables and pictures, and who was not compared."""
    link = Path(os.path.relpath(source, page.parent)).as_posix()
    done = len(select(records, kind="done"))
    pace = select(records, kind="environment")[0]["pace"]
    lines = [f"On {machine(records)} ({pace} run, {done} measurements: [`{source.name}`]({link})).", ""]
    lines += [" ".join(remarks(records)), ""]
    for name, path in pictures.items():
        lines += picture(name, path, page)
    for table in tables_of(records):
        lines += markdown(table)
    if gone := absent(records):
        lines += ["### Not compared, and why", "", *(f"- {line}" for line in gone), ""]
    hashes = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for name, path in pictures.items()]
    return [*lines, f"<!-- pictures: {', '.join(hashes)} -->"]


def sections(source: Path, pictures: dict[str, Path]) -> dict[Path, str]:
    """What each page has between its markers."""
    records = load(source)
    parts = {README: headline(records, pictures, README), PAGE: details(records, pictures, PAGE, source)}
    return {page: "\n".join(lines).strip("\n") for page, lines in parts.items()}


def shown(text: str) -> str:
    """What a page has between the markers. Raises ValueError where they are not there once each, in their order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"a page must have {BEGIN!r} and then {END!r} once each")
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def replaced(text: str, new: str) -> str:
    shown(text)
    return f"{text.split(BEGIN)[0]}{BEGIN}\n\n{new}\n\n{END}{text.split(END)[1]}"


def pictures_there(folder: Path = PICTURES) -> dict[str, Path]:
    return {name: folder / f"{name}.svg" for name in CAPTIONS if (folder / f"{name}.svg").exists()}


def edited(source: Path = SHOWN, folder: Path = PICTURES) -> list[str]:
    """Pages that are not what the results give. Whether the results are stale is not asked."""
    return [
        f"{page.name} or a picture in it is not what make report writes from {source.name}: make report"
        for page, text in sections(source, pictures_there(folder)).items()
        if shown(page.read_text()) != text
    ]


def stale(folder: Path = RESULTS) -> list[str]:
    """The files of results in a folder that were measured with other code than that of csrc/."""
    now, found = sources_hash(), []
    for path in sorted(folder.glob("*.jsonl")):
        for head in [] if ".rounds." in path.name else select(load(path), kind="environment"):
            if head["csrc"] != now:
                found.append(
                    f"{path.name} is stale: measured on {head['date'][:10]} on {head['cpu']} with kernels "
                    f"{head['csrc'][:12]}, and those in csrc/ are {now[:12]}"
                )
    return found


def write(source: Path) -> None:
    if not source.exists():
        sys.exit(f"readme: there is no {os.path.relpath(source)}: make bench-full writes it")
    for path in pictures_there().values():
        path.unlink()  # one that these results do not give must not stay
    written = list(draw(load(source), PICTURES))
    for page, text in sections(source, pictures_there()).items():
        page.write_text(replaced(page.read_text(), text))
        written.append(page)
    print(", ".join(os.path.relpath(path) for path in written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, default=SHOWN, help="results to write the pages from")
    parser.add_argument("--check", action="store_true", help="say which results are stale, and fail if any is")
    options = parser.parse_args()
    if not options.check:
        return write(options.source.resolve())
    if found := [*edited(), *stale()]:
        sys.exit("\n".join(found))
    print("README.md, docs/benchmarks.md and benchmarks/results/ are of the kernels in csrc/")


if __name__ == "__main__":
    main()
