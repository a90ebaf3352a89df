"""Importing what is installed: beside another torch, without an extension, quickly; and `python -m fastbn`."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import pytest
import torch
from interpreters import last_line, run

import fastbn
import fastbn.__main__

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def test_an_extension_for_another_torch_says_so_in_one_line():
    done = run("-c", "import torch; torch.__version__ = type(torch.__version__)('1.9.9'); import fastbn")
    line = last_line(done)
    assert line.startswith("ImportError: fastbn") and "1.9.9" in line and "pip install --force-reinstall" in line


def test_an_extension_that_does_not_load_says_so_in_one_line():
    done = run("-c", "import sys; sys.modules['fastbn._C'] = None; import fastbn")
    line = last_line(done)
    assert line.startswith("ImportError: fastbn") and "pip install --force-reinstall" in line


def test_there_is_no_silent_fallback():
    """A missing extension is an error, not a slow batch norm."""
    code = (
        "import sys; sys.modules['fastbn._C'] = None\n"
        "try: import fastbn.nn.modules\nexcept ImportError: print('refused')"
    )
    assert run("-c", code).stdout.strip() == "refused"


def test_the_report():
    done = run("-m", "fastbn")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for expected in (fastbn.__version__, torch.__version__, fastbn._C.cpu_capability()):
        assert str(expected) in text
    for word in ("torch", "compiler", "CPU", "capability", "threads", "CUDA"):
        assert re.search(word, text, re.IGNORECASE), f"{word} is missing in {text}"
    forced = run("-m", "fastbn", FASTBN_CPU_CAPABILITY="baseline")
    assert "baseline" in forced.stdout
    tested = re.match(r"self-test +OK: \d+ results compared with float64 in (\d+\.\d+) s$", text.splitlines()[-1])
    assert tested and float(tested[1]) < 2


# What batch_norm returns in place of y, and which results the self-test must then complain about.
FAULTS = {
    "y * 1.01": {"output", "grad_input", "grad_weight", "grad_bias", "grad_residual"},
    "y.detach() + (y - y.detach()) * 1.01": {"grad_input", "grad_weight", "grad_bias", "grad_residual"},
    "y + mean.add_(0.01).sum() * 0": {"running_mean"},
    "y * float('nan')": {"output", "grad_input", "grad_weight", "grad_bias", "grad_residual"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_reports_a_wrong_result(fault, monkeypatch, capsys):
    right = fastbn.functional.batch_norm

    def wrong(x, mean, var, *rest, **kind):
        y = right(x, mean, var, *rest, **kind)
        return y if x.dtype == torch.float32 else eval(fault, {"y": y, "mean": mean})

    monkeypatch.setattr(fastbn.functional, "batch_norm", wrong)
    assert fastbn.__main__.main() == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match("self-test +FAILED: ", line)
    problems = line.split("FAILED: ")[1].split("; ")
    assert {problem.split()[0] for problem in problems} == FAULTS[fault]
    assert all("bfloat16" in problem for problem in problems)


def test_the_self_test_reports_an_error(monkeypatch, capsys):
    def raises(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fastbn.functional, "batch_norm", raises)
    assert fastbn.__main__.main() == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "FAILED: " in line and line.count("no such kernel") == 16


def test_the_version_stands_in_one_place():
    """In fastbn/__init__.py, from where setuptools reads it; the newest section of CHANGELOG.md is about it."""
    version = fastbn.__version__
    assert importlib.metadata.version("fastbn") == version
    assert version not in (ROOT / "pyproject.toml").read_text() and version not in (ROOT / "setup.py").read_text()
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


def test_importing_is_quick():
    """Under 0.15 s after torch. The best of five, as anything may disturb one."""
    code = "import time, torch; start = time.perf_counter(); import fastbn; print(time.perf_counter() - start)"
    assert min(float(run("-c", code).stdout) for _ in range(5)) < 0.15


def test_importing_starts_no_threads_and_no_compiler():
    code = (
        "import sys, threading, torch; before = set(sys.modules); import fastbn;"
        "print(threading.active_count());"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('torch._inductor')))"
    )
    assert run("-c", code).stdout.split() == ["1", "[]"]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc to list mapped libraries")
def test_only_one_openmp_runtime_is_mapped():
    """Two would be two thread pools on the same cores."""
    code = (
        "import re, torch; a = torch.randn(64, 64, 32, 32).add(1)\n"
        "runtime = re.compile(r'\\S*lib(?:gomp|iomp5|omp)[^/\\s]*')\n"
        "def mapped(): return set(runtime.findall(open('/proc/self/maps').read()))\n"
        "before = mapped(); import fastbn; fastbn.BatchNorm2d(64)(a); print(len(before), len(mapped()))"
    )
    done = run("-c", code)
    before, after = map(int, done.stdout.split())
    assert before >= 1 and after == before, done.stdout + done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the size is that of x86-64's three instruction sets")
def test_the_extension_has_not_grown():
    """How long it builds goes with its size: on two cores 10.0 MB took 186 s, 6.3 MB take 119, and 120 are allowed."""
    if fastbn._C.build_info()["backends"] != ["cpu"]:
        pytest.skip("a build for the CPU alone")
    assert Path(fastbn._C.__file__).stat().st_size < 7.5e6
