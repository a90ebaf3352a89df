"""The machine and the versions with which results are measured: the head of every file of results."""

import datetime
import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from limits import cache_bytes

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


def available_memory() -> int:
    """Bytes that could be allocated now without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # another system than Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def clock() -> dict[str, object]:
    """The processor's frequencies and their governor, as far as the system shows them."""
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    found: dict[str, object] = {}
    for name in ("scaling_governor", "scaling_cur_freq", "cpuinfo_max_freq"):
        try:
            found[name] = (folder / name).read_text().strip()
        except OSError:
            found[name] = "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["MHz"] = [round(float(line.split(":")[1])) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        found["MHz"] = "unknown"
    return found


def code_of(source: str) -> str:
    """C++ without comments and white space: the same after formatting, or edits of comments."""
    kept = re.sub(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*")""", lambda m: m[1] or "", source, flags=re.DOTALL)
    return "".join(kept.split())


def sources_hash() -> str:
    """SHA-256 over the names and the code of csrc/: results with another hash are of other kernels."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{code_of(path.read_text())}\0".encode())
    return digest.hexdigest()


def gpu() -> dict[str, object]:
    """Properties of the current CUDA device, with its present clocks and temperature."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        now = dict(zip(fields.split(","), map(str.strip, answer.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        now = {"nvidia-smi": str(error)}
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **now,
    }


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
        "cache_bytes": cache_bytes(),
        "memory_bytes": available_memory(),
        "clock": clock(),
        # load at the start: other programs that run make times unreliable
        "load": round(os.getloadavg()[0], 2),
    }
