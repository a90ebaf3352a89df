"""Builds programs that execute CUDA kernels on the CPU, with g++ alone.
Objects are cached in build/simt_tests by a hash of all the sources that they include."""

import hashlib
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock  # torch needs it too

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KEPT = HERE.parents[1] / "build" / "simt_tests"

FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
MODES = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
JOBS = min(2, os.cpu_count() or 1)


def backend_sources(csrc):
    return sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")])


def key_of(*parts):
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update((part if isinstance(part, bytes) else part.encode()) + b"\0")
    return hashed.hexdigest()[:32]


def included(path, csrc, known=None):
    """The file and all that it includes in quotes, and so on."""
    known = set() if known is None else known
    known.add(path)
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        found = next(p for p in (path.parent / name, csrc / name, HERE / name) if p.exists()).resolve()
        if found not in known:
            included(found, csrc, known)
    return known


def atomically(command, target):
    """Runs command with the name of the file to write as its last argument, which becomes target if all goes well."""
    handle, partial = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    try:
        result = subprocess.run([*command, partial], capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def build(sources, mode, csrc=CSRC, defines=()):
    """The program made of sources, C++ and CUDA alike. Of several processes one compiles, and the others wait."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / "lock"):
        return build_alone(sources, mode, csrc, defines)


def build_alone(sources, mode, csrc, defines):
    for old in KEPT.iterdir():
        if old.stat().st_mtime < time.time() - 7 * 24 * 3600:
            old.unlink(missing_ok=True)
    flags = [*FLAGS, *MODES[mode], *defines]

    def compiled(source):
        texts = [path.read_bytes() for path in sorted(included(source, csrc))]
        target = KEPT / f"{source.stem}-{key_of(*flags, *texts)}.o"
        if not target.exists():
            atomically(["g++", *flags, f"-I{csrc}", f"-I{HERE}", "-x", "c++", "-c", source, "-o"], target)
        target.touch()
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compiled, sources))
    program = KEPT / f"{sources[-1].stem}-{key_of(*map(str, objects))}"
    if not program.exists():
        atomically(["g++", *flags, *objects, "-ldl", "-o"], program)
    program.touch()
    return program


def run(program, *arguments, timeout=1800, **environment):
    """Status and all output. The emulator is set by these arguments alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTBN_SIMT_")}
    result = subprocess.run(
        [program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        # The first report is enough; a leak is none of a kernel's.
        env={**inherited, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0", **environment},
    )
    return result.returncode, result.stdout
