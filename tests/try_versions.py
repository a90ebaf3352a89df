"""Build fastbn, and run a part of the quick tests, with several versions of Python and torch: make try-versions.

Each combination has an environment of its own in build/versions, into which plain `pip install` builds the sdist under
build isolation. What came of it is kept in build/versions/results.json, so that combinations can be tried one by one
(--only 3.11:2.6); --write puts the table of all of them into docs/install.md. Status 1 if one failed.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "versions"
RESULTS = BUILD / "results.json"
PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- made by make try-versions -->", "<!-- end -->"
# Python and torch, each of both that is supported; "newest" is what pip finds.
COMBINATIONS = ("3.10:2.6", "3.11:2.9", "3.12:2.13", "3.13:newest", "3.14:newest")
TESTS = ("functional/test_parity.py", "functional/test_layouts.py", "functional/test_epilogue.py", "nn/test_module.py",
         "graph/test_convert.py", "graph/test_fuse_model.py", "integration/test_compile.py",
         "project/test_install.py")  # fmt: skip
PACKAGES = ("numpy", "setuptools", "pytest", "pytest-xdist", "hypothesis", "expecttest")


class Failed(Exception):
    """What a step of a combination ended with."""


def interpreter(version: str) -> str | None:
    """A program for Python `version` (as 3.11): of pyenv, or in PATH."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(
        root.glob(f"{version}.*/bin/python"), key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))]
    )
    return str(found[-1]) if found else shutil.which(f"python{version}")


def step(what: str, command: list[str], log: Path, **kind) -> str:
    """Run a command with its output in `log`, say how long it took, and return the last line."""
    print(f"    {what} ...", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, **kind).returncode
    print(
        f"{time.monotonic() - start:.0f} s" + (f", status {status}: see {log.relative_to(ROOT)}" if status else ""),
        flush=True,
    )
    lines = log.read_text().strip().splitlines() or [""]
    if status != 0:
        raise Failed(f"{what} failed: {lines[-1]}")
    return lines[-1]


def sources() -> Path:
    """The folder of a fresh sdist, unpacked: a build in the work tree would mix the objects of several versions."""
    shutil.rmtree(BUILD / "source", ignore_errors=True)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(BUILD / "source")], cwd=ROOT, check=True
    )
    (archive,) = (BUILD / "source").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(BUILD / "source", filter="data")
    (folder,) = (path for path in (BUILD / "source").iterdir() if path.is_dir())
    return folder


def attempt(python: str, torch: str, source: Path) -> dict[str, str]:
    """A row of the table: versions, and what the tests said or what failed."""
    row = {"python": python, "torch": torch, "date": str(datetime.date.today())}
    program = interpreter(python)
    if program is None:
        return {**row, "result": "not tried: there is no such Python here"}
    folder = BUILD / f"{python}-{torch}"
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "env" / "bin" / "python"
    try:
        if not own.exists():
            step("environment", [program, "-m", "venv", str(folder / "env")], folder / "venv.log")
        wanted = "torch" if torch == "newest" else f"torch=={torch}.*"
        step(f"pip install {wanted}", [str(own), "-m", "pip", "install", wanted, *PACKAGES], folder / "torch.log")
        say = "import platform, torch; print(platform.python_version(), torch.__version__)"
        found = subprocess.run([str(own), "-c", say], capture_output=True, text=True).stdout.split()
        row["python"], row["torch"] = found or (python, torch)
        install = [str(own), "-m", "pip", "install", "--no-deps", "--force-reinstall", str(source)]
        step("pip install .", install, folder / "build.log")
        step("python -m fastbn", [str(own), "-m", "fastbn"], folder / "report.log", cwd=folder)
        tests = [str(own), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow", *TESTS]
        row["result"] = step("tests", tests, folder / "tests.log", cwd=source / "tests").strip("= ")
    except Failed as failure:
        row["result"] = str(failure)
    return row


def table(rows: dict[str, dict[str, str]]) -> str:
    lines = ["| Python | torch | quick tests | tried on |", "|---|---|---|---|"]
    for _, row in sorted(rows.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[1]["torch"])]):
        lines.append(f"| {row['python']} | {row['torch']} | {row['result']} | {row['date']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=COMBINATIONS, metavar="PYTHON:TORCH", help="as 3.11:2.6")
    parser.add_argument("--write", action="store_true", help="the table of all results so far, into docs/install.md")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    tried = []
    if arguments.only:
        BUILD.mkdir(parents=True, exist_ok=True)
        source = sources()
        for name in arguments.only:
            print(f"==> Python {name.replace(':', ', torch ')}", flush=True)
            rows[name] = attempt(*name.split(":"), source)
            tried.append(rows[name]["result"])
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if arguments.write:
        text = PAGE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")
    return int(any("failed" in result for result in tried))


if __name__ == "__main__":
    sys.exit(main())
