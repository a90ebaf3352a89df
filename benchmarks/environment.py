"""Where a result was measured, and what: goes to the head of every file of results."""

import datetime
import hashlib
import os
import platform
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def huge_pages() -> str:
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


def sources_hash() -> str:
    """SHA-256 over the names and contents of csrc/: a result with another one is of other kernels."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def environment() -> dict[str, object]:
    import fastbn
    from fastbn import _C

    return {
        "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "csrc": sources_hash(),
        "fastbn": fastbn.__version__,
        "build": {name: str(value) for name, value in _C.build_info().items()},
        "capability": _C.cpu_capability(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        # other work on the machine at the start: a figure far from 0 makes the rest doubtful
        "load": round(os.getloadavg()[0], 2),
    }
