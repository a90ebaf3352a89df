"""``python -m fastbn``: what was built, what this machine has, and a self-test. Paste it into a bug report."""

import os
import platform
import sys

import torch

import fastbn
from fastbn import _C, self_test


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none seen by torch"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {memory})")
    return ", ".join(found)


def _shown(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value


def report() -> dict[str, object]:
    """Names and values, in the order in which they are printed."""
    return {
        "fastbn": fastbn.__version__,
        "installed in": os.path.dirname(fastbn.__file__),
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        **{f"built: {name}": _shown(value) for name, value in _C.build_info().items()},
        "CPU": _cpu_model(),
        "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
        "FASTBN_CPU_CAPABILITY": os.environ.get("FASTBN_CPU_CAPABILITY", "not set"),
        "threads": torch.get_num_threads(),
        "GPUs": _gpus(),
    }


def main() -> int:
    """Print the report and then the self-test's result; the exit status is 1 if that found anything wrong."""
    rows = report()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}", flush=True)
    result = self_test.run()
    print(f"{'self-test':<{width}}  {result}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
