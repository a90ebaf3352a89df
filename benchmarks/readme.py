"""README's section of measurements: a file of results flows in, the text between two markers and its pictures flow out.

Usage: readme.py [results/cpu.jsonl]    (make report)
       readme.py --check                (make report-check, for a release)

The text also names the hash of each picture, so that a test can tell whether either was edited by hand; and the results
name the hash of csrc/ that they were measured with, by which --check tells which of them are stale.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from environment import ROOT, sources_hash
from figures import FIGURES
from plots import draw
from records import (
    RESULTS,
    SHORT,
    SHOWN,
    Record,
    backends_of_torch,
    batches_of,
    compared,
    geometric_mean,
    groups_of,
    key_of,
    load,
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
from report import absent
from suite import PASSES

README = ROOT / "README.md"
PICTURES = RESULTS / "pictures"
BEGIN, END = "<!-- measured: begin (written by make report; do not edit) -->", "<!-- measured: end -->"
CAPTIONS = {
    "speedup": "Speed-up over eager PyTorch for each batch-norm shape of ResNet-50",
    "limit": "Part of the memory limit reached, for each batch-norm shape of ResNet-50",
    "scaling": "Time for each element from ten thousand to a thousand million elements",
    "accuracy": "Error against float64, and error against speed",
}


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*rows: list[object]) -> list[str]:
    head, *body = rows
    return [row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in body), ""]


def means(cases: list[Record], name: str) -> list[str]:
    chosen = select(cases, **{"pass": name})
    if not chosen:
        return ["", ""]
    return [f"{geometric_mean(map(speedup, chosen)):.2f}", f"{network_mean(chosen, of_limit):.0%}"]


def network_section(records: list[Record]) -> list[str]:
    lines = []
    groups = groups_of(select(records, kind="case", suite="resnet50"))  # the same order for every batch size
    for batch in batches_of(records):
        cases = resnet50(records, batch)
        head = [f"ResNet-50, batch {batch}", *(f"{name}: torch / fastbn | of limit" for name in PASSES)]
        body = []
        for dtype, layout in groups:
            if not (chosen := select(cases, dtype=dtype, layout=layout)):
                continue
            body.append([f"{dtype}, {layout}", *(" | ".join(means(chosen, name)) for name in PASSES)])
        body.append([f"all {len(cases) // len(PASSES)} cases", *(" | ".join(means(cases, name)) for name in PASSES)])
        lines += [row(*head), row(*["---"] * (1 + 2 * len(PASSES))), *(row(*cells) for cells in body), ""]
    return lines


def cold_section(records: list[Record]) -> list[str]:
    """The cases that were measured with inputs that are in no cache, too."""
    cold = compared(select(records, kind="case", suite="resnet50", inputs="cold"))
    if not cold:
        return []
    warm_ones = {key_of({**r, "inputs": "cold"}): r for r in resnet50(records)}
    body = []
    for name in PASSES:
        rows = [r for r in select(cold, **{"pass": name}) if key_of(r) in warm_ones]
        cells = [
            f"{geometric_mean(map(speedup, chosen)):.2f}" for chosen in ([warm_ones[key_of(r)] for r in rows], rows)
        ]
        body.append([f"{name}, {len(rows)} cases", *cells])
    return table(["ResNet-50's tensors that fit into the cache: torch / fastbn", "warm", "cold"], *body)


def peers_section(records: list[Record]) -> list[str]:
    chosen = [r for r in warm(records) if r["kind"] in ("case", "fused") and r["suite"] in ("resnet50", "fused")]
    smallest = min((r["shape"][0] for r in chosen), default=0)
    chosen = [r for r in chosen if r["shape"][0] == smallest]
    others = peers_of(chosen)
    if not others:
        return []
    body = []
    for ending, what in (("", "BN"), ("relu", "BN + ReLU"), ("add+relu", "BN + add + ReLU")):
        for name in ("forward", "forward+backward"):
            rows = [r for r in select(chosen, **{"pass": name}) if r.get("ending", "") == ending]
            cells = []
            for peer in others:
                ratios = [speedup(r, peer) for r in rows if peer in r["seconds"]]
                cells.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "")
            if rows:
                body.append([f"{what}, {name}", *cells])
    lines = [
        "Each peer's time over fastbn's (geometric mean over so many of ResNet-50's cases at the smallest batch):",
        "",
    ]
    return lines + table(["", *others], *body)


def model_section(records: list[Record]) -> list[str]:
    body = []
    for r in select(records, kind="model"):
        images, _, side, _ = r["shape"]
        for variant, peak in r["peak_bytes"].items():
            time = seconds(r, variant)
            what = f"{r['model']}, {images} × {side}²"
            ratio = f"{seconds(r, 'torch') / time:.2f}"
            body.append([what, variant, f"{images / time:.1f}", ratio, f"{peak / 1e6:.0f} MB"])
    head = ["training step, float32", "", "images a second", "over torch", "peak memory"]
    return table(head, *body) if body else []


def figures_section(records: list[Record]) -> list[str]:
    body = []
    for figure in FIGURES:
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.target:{figure.style}}"
        if measured := figure.measure(records):
            value, _ = measured
            body.append([figure.name, bound, f"{value:{figure.style}}", "yes" if figure.reached(value) else "no"])
    return table(["what the project aims at", "target", "measured", "reached"], *body) if body else []


def closing(records: list[Record], pictures: dict[str, Path]) -> list[str]:
    hashes = ", ".join(
        f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for name, path in pictures.items()
    )
    return [f"<!-- pictures: {hashes} -->"]


def section(records: list[Record], source: Path, pictures: dict[str, Path]) -> str:
    """The text between the markers."""
    (head,) = select(records, kind="environment")
    where = source.relative_to(ROOT).as_posix()
    cases = resnet50(records)
    again = sorted(noise(r) for r in cases)
    slowest = min(cases, key=speedup, default=None)
    lines = [
        f"On {head['threads']} of {head['cores']} cores of {head['cpu']} ({head['capability']}), "
        f"torch {head['torch']}, {head['build']['compiler']}, {head['date'][:10]}, kernels `{head['csrc'][:12]}` "
        f"({head['pace']} run, {len(select(records, kind='done'))} measurements: [{where}]({where})). "
        "\"Of limit\" is the time of a copy of the least bytes over fastbn's, "
        "summed over the network.",
        "",
    ]  # fmt: skip
    if cases:
        training = [r for r in with_fresh(cases) if r["pass"] != "eval"]
        name = f"{tuple(slowest['shape'])} {SHORT[slowest['dtype']]} {SHORT[slowest['layout']]} {slowest['pass']}"
        lines += [
            f"Noise of a ratio at 99 % confidence: median {again[len(again) // 2]:.1%}, at most {again[-1]:.0%}. "
            f"The slowest case takes {1 / speedup(slowest):.2f} times as long as torch: {name}. "
            f"Eager torch ran its kernels named {', '.join(backends_of_torch(cases))}. ",
        ]  # fmt: skip
        if training:
            speed = geometric_mean(map(of_fresh_limit, training))
            lines[-1] += (
                f"In training, fastbn runs at {speed:.2f} times the speed of `clone` and `add` into fresh memory."
            )
        lines.append("")
    lines += [
        *network_section(records),
        *cold_section(records),
        *peers_section(records),
        *model_section(records),
        *figures_section(records),
    ]
    for name, path in pictures.items():
        lines += [f"![{CAPTIONS[name]}]({path.relative_to(ROOT).as_posix()})", ""]
    if gone := absent(records):
        lines += [
            "<details><summary>Not compared, and why</summary>",
            "",
            *(f"- {line}" for line in gone),
            "",
            "</details>",
            "",
        ]
    return "\n".join([*lines, *closing(records, pictures)])


def shown(text: str) -> str:
    """What README has between the markers. Raises ValueError where they are not there once each, in their order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have {BEGIN!r} and then {END!r} once each")
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def replaced(text: str, new: str) -> str:
    shown(text)
    return f"{text.split(BEGIN)[0]}{BEGIN}\n\n{new}\n\n{END}{text.split(END)[1]}"


def pictures_there(folder: Path = PICTURES) -> dict[str, Path]:
    return {name: folder / f"{name}.svg" for name in CAPTIONS if (folder / f"{name}.svg").exists()}


def edited(readme: str, source: Path = SHOWN, folder: Path = PICTURES) -> list[str]:
    """Why README is not what the results give; nothing if it is. Whether the results are stale is not asked."""
    if shown(readme) == section(load(source), source, pictures_there(folder)).strip("\n"):
        return []
    return ["README.md or a picture is not what make report writes from benchmarks/results/: make report"]


def stale(folder: Path = RESULTS) -> list[str]:
    """The files of results in a folder that were measured with other code than that of csrc/."""
    now, found = sources_hash(), []
    for path in sorted(folder.glob("*.jsonl")):
        for head in select(load(path), kind="environment"):
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
    records = load(source)
    written = list(draw(records, PICTURES))
    README.write_text(replaced(README.read_text(), section(records, source, pictures_there())))
    print(f"README.md, {', '.join(os.path.relpath(path) for path in written)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, default=SHOWN, help="results to write README's section from")
    parser.add_argument("--check", action="store_true", help="say which results are stale, and fail if any is")
    options = parser.parse_args()
    if not options.check:
        return write(options.source.resolve())
    if found := [*edited(README.read_text()), *stale()]:
        sys.exit("\n".join(found))
    print("README.md and benchmarks/results/ are of the kernels in csrc/")


if __name__ == "__main__":
    main()
