"""Compile probe.cu for the GPU present, run it, and show what it measured.

Usage: probe.py [--output FILE] [--limit SECONDS] [--build-only] [NUMBER ...]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("probe.cu")
PROGRAM = SOURCE.parents[1] / "build" / "gpu" / "probe"
DEFAULT = SOURCE.parent / "results" / "gpu-probe.jsonl"


def nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    found = str(home) if home.is_file() else shutil.which("nvcc")
    if found is None:
        sys.exit("probe: no nvcc in CUDA_HOME or PATH")
    return found


def build() -> None:
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([nvcc(), "-std=c++17", "-O3", "-arch=native", str(SOURCE), "-o", str(PROGRAM)], check=True)


def line(record: dict) -> str:
    """A record as a line: its name, its parameters, and what was measured."""
    measured = ("us", "low", "high", "gbs", "bytes")
    parameters = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("measurement", "name", *measured))
    time = f"{record['us']:9.2f} us" if "us" in record else ""
    rate = f"{record['gbs']:7.0f} GB/s" if "gbs" in record else ""
    return f"{record['measurement']}  {record['name']:<26} {time:<13}{rate:<13} {parameters}"


def main() -> int:
    parser = argparse.ArgumentParser(description="What a GPU can do, for the planner's constants.")
    parser.add_argument("--output", type=Path, default=DEFAULT)
    parser.add_argument("--limit", type=float, default=170, help="seconds after which no measurement begins")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("numbers", nargs="*", help="measurements (default: all nine)")
    arguments = parser.parse_args()
    build()
    if arguments.build_only:
        return 0
    command = [str(PROGRAM), "--limit", str(arguments.limit), *arguments.numbers]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w") as output, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            output.write(text)
            output.flush()
            print(line(json.loads(text)), flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
