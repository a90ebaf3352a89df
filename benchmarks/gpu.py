"""All that needs a GPU, in one command: build, tests, compute-sanitizer, probe, benchmark.

Usage: gpu.py [--seconds 530] [--only PART ...]   (make gpu)

It uses the python3 that runs it, installs nothing and needs no network. Each part has its own time limit and its own
result, so that one failure does not hide the rest; the summary comes last. Files go to $OUT (default
benchmarks/results/): gpu-summary.json, gpu-benchmark.jsonl, gpu-probe.jsonl, and a log for each of build, tests,
sanitizers and benchmark.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS, TESTS, BUILD = ROOT / "benchmarks", ROOT / "tests", ROOT / "build" / "gpu"
LIBRARY, LOGS = BUILD / "lib", BUILD / "logs"
OUT = Path(os.environ.get("OUT") or BENCHMARKS / "results").resolve()
PARTS = ["build", "tests", "sanitizers", "probe", "benchmark"]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# Test files that need a package which may be missing.
NEEDS = {"functional/test_properties.py": "hypothesis", "integration/test_torch_samples.py": "expecttest"}
LONGEST_LOG = 3_000_000


@dataclass
class Part:
    """A command with its limit in seconds. The parts of a group run in parallel."""

    name: str
    group: str
    command: list[str] = field(repr=False)
    limit: float
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    must_pass: bool = True
    status: str = "not run"
    detail: str = ""
    seconds: float = 0

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name.replace(' ', '-')}.log"

    @property
    def failed(self) -> bool:
        return self.must_pass and self.status not in ("passed", "not run")


def last_words(log: Path) -> str:
    """The summary line of a log, or else its last line."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines()[-200:]]
    lines = [line for line in lines if line]
    summaries = [line for line in lines if "SUMMARY" in line or (" in " in line and " passed" in line)]
    return (summaries or lines or [""])[-1][:200]


def run(parts: list[Part], seconds: float) -> None:
    """Runs all in parallel, each for at most its limit and ``seconds``."""
    if seconds < 5:
        for part in parts:
            part.detail = "no time left"
        return
    running = []
    for part in parts:
        environment = {**os.environ, "PYTHONPATH": str(LIBRARY), "PYTHONUNBUFFERED": "1", **part.environment}
        # ninja and pytest are in the interpreter's folder
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        with part.log.open("w") as log:
            process = subprocess.Popen(
                part.command, cwd=part.folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        running.append((part, process, time.monotonic()))
    while running:
        time.sleep(0.2)
        for entry in list(running):
            part, process, start = entry
            part.seconds = round(time.monotonic() - start, 1)
            code = process.poll()
            if code is None and part.seconds < min(part.limit, seconds):
                continue
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # the process group that this part started
                process.wait()
            part.status = "timed out" if code is None else "passed" if code == 0 else f"failed ({code})"
            part.detail = last_words(part.log)
            running.remove(entry)
            print(f"    {part.name:<26} {part.status:<12} {part.seconds:>6.1f} s  {part.detail}", flush=True)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def python(script: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(script), *map(str, arguments)]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rf", "--tb=short", *arguments]


def build_parts() -> list[Part]:
    setup = ["build", "--build-base", BUILD, "--build-lib", LIBRARY]
    environment = {"FASTBN_CUDA": "1", "FASTBN_PTXAS": "1", "MAX_JOBS": str(os.cpu_count() or 2)}
    return [
        Part("build", "build", python(ROOT / "setup.py", *setup), 260, ROOT, environment),
        Part("build probe", "build", python(BENCHMARKS / "probe.py", "--build-only"), 120),
    ]


def test_parts() -> list[Part]:
    cores = os.cpu_count() or 2
    missing = {name for name, module in NEEDS.items() if not has(module)}
    names = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
    gpu_alone = [name for name in names if name.startswith("cuda/test_gpu_")]
    names = [name for name in names if name not in gpu_alone]
    files = [name for name in names if name not in missing]
    some = ["--backend", "cuda", "-m", "not slow"]
    if has("xdist"):
        shares = {"parity": [*files, "-n", str(max(1, min(8, cores // 2)))]}
    else:  # the files dealt out to as many processes
        count = max(1, min(4, cores // 2))
        shares = {f"parity {i + 1}": files[i::count] for i in range(count)}
    parts = [Part(name, "tests", pytest(*some, *share), 170, TESTS) for name, share in shares.items()]
    parts.append(Part("GPU alone", "tests", pytest("--backend", "cuda", *gpu_alone), 170, TESTS))
    for name in sorted(missing.intersection(names)):
        parts.append(Part(name, "tests", [], 0, detail=f"needs {NEEDS[name]}, which is not installed"))
    return parts


def sanitizer_parts() -> list[Part]:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.is_file() else "")
    parts = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        if tool != "initcheck":  # which has to see all writes
            command += ["--kernel-name", "kernel_substring=fastbn"]
        command += python(TESTS / "cuda" / "sanitize_cases.py")
        # in torch's caching allocator, tensors are adjacent
        part = Part(tool, "sanitizers", command, 170, TESTS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if not program:
            part.command, part.detail = [], "compute-sanitizer is not there"
        parts.append(part)
    return parts


def compile_parts() -> list[Part]:
    """Runs torch.compile for the benchmark during the tests, so that its results are in the cache."""
    count = max(1, min(5, (os.cpu_count() or 2) // 3))
    script = BENCHMARKS / "run.py"
    return [
        Part(f"compile {i + 1}", "tests", python(script, "--device", "cuda", "--compile-only", i, count), 170,
             must_pass=False)
        for i in range(count)
    ]  # fmt: skip


def probe_part() -> Part:
    return Part("probe", "probe", python(BENCHMARKS / "probe.py", "--output", OUT / "gpu-probe.jsonl"), 175)


def benchmark_part(seconds: float) -> Part:
    output = OUT / "gpu-benchmark.jsonl"
    arguments = ["--device", "cuda", "--seconds", int(seconds - 25), "--output", output]
    return Part("benchmark", "benchmark", python(BENCHMARKS / "run.py", *arguments), seconds)


def records_of(path: Path) -> list[dict]:
    from summaries import load

    return load(path) if path.exists() else []


def against_skeleton(probe: list[dict], benchmark: list[dict]) -> list[str]:
    """The probe's ninth measurement: whole kernels against the same without arithmetic."""
    lines = []
    for shape in dict.fromkeys(r["shape"] for r in probe if r["measurement"] == 9 and "us" in r):
        channels, side, batch = (int(part.split("=")[-1]) for part in (*shape.split("x")[:2], shape.split()[1]))
        best = min(r["us"] for r in probe if r["measurement"] == 9 and r.get("shape") == shape and "us" in r)
        for r in benchmark:
            what = (r.get("shape"), r.get("dtype"), r.get("layout"), r.get("pass"))
            if what == ([batch, channels, side, side], "bfloat16", "contiguous", "forward"):
                ours = r["graph"]["fastbn"]["median"] * 1e6
                lines.append(f"{shape}: forward {ours:.1f} us, the skeleton {best:.1f} us ({best / ours:.0%})")
    return lines


def csrc_hash() -> str:
    from environment import sources_hash

    return sources_hash()


def write(parts: list[Part], seconds: float) -> None:
    """The summary and the logs so far: called after every group, so that nothing is lost if this is stopped."""
    summary = {
        "csrc": csrc_hash(),
        "seconds": round(seconds, 1),
        "failed": [part.name for part in parts if part.failed],
        "not run": [part.name for part in parts if part.status == "not run"],
        "parts": [{k: v for k, v in asdict(p).items() if k not in ("folder", "environment")} for p in parts],
    }
    (OUT / "gpu-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for group in dict.fromkeys(part.group for part in parts):
        texts = []
        for part in parts:
            if part.group == group and part.log.exists():
                body = part.log.read_text(errors="replace")[-LONGEST_LOG:]
                texts.append(f"==> {part.name}: {part.status}\n{body}\n")
        if group != "probe" and texts:  # the probe's log is its JSON
            (OUT / f"gpu-{group}.log").write_text("".join(texts))


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, check and time fastbn on the GPU of this machine.")
    parser.add_argument("--seconds", type=float, default=530, help="for everything (default 530)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu: {sys.executable} has no torch ({error}); choose another with make gpu PYTHON=...")
    if not torch.cuda.is_available():
        sys.exit(f"gpu: torch {torch.__version__} of {sys.executable} sees no GPU")
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    OUT.mkdir(parents=True, exist_ok=True)
    print(f"==> {torch.cuda.get_device_name(0)}, torch {torch.__version__}; results in {OUT}", flush=True)

    start = time.monotonic()
    parts: list[Part] = []

    def left() -> float:
        return arguments.seconds - (time.monotonic() - start)

    def group(title: str, chosen: list[Part], seconds: float) -> None:
        print(f"==> {title}", flush=True)
        parts.extend(chosen)
        run([part for part in chosen if part.command], seconds)
        write(parts, time.monotonic() - start)

    group("build", build_parts(), left() - 10)
    built = parts[0].status == "passed"
    only = set(arguments.only) if built else set(arguments.only) & {"probe"}
    correctness = (test_parts() if "tests" in only else []) + (sanitizer_parts() if "sanitizers" in only else [])
    if correctness:
        beside = compile_parts() if "benchmark" in only else []
        later = 210 if {"probe", "benchmark"} & only else 0
        group("tests and compute-sanitizer", correctness + beside, left() - later)
    if "probe" in only:
        group("probe", [probe_part()], left() - (130 if "benchmark" in only else 0))
    if "benchmark" in only:
        group("benchmark", [benchmark_part(left() - 8)], left() - 5)
    if not built:
        parts += [Part(name, name, [], 0, detail="the build failed") for name in set(arguments.only) - only - {"build"}]
    write(parts, time.monotonic() - start)

    print("==> summary")
    if "benchmark" in only:
        tables = (LOGS / "benchmark.log").read_text()
        print(tables[max(0, tables.find("copy of 1 GiB")) :][-9000:])
        for line in against_skeleton(records_of(OUT / "gpu-probe.jsonl"), records_of(OUT / "gpu-benchmark.jsonl")):
            print(line)
    for part in parts:
        print(f"    {part.name:<26} {part.status:<12} {part.seconds:>6.1f} s  {part.detail}")
    failed = [part.name for part in parts if part.failed]
    print(
        f"==> {time.monotonic() - start:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "everything passed")
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
