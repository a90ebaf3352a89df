"""Building, installing and importing: another torch, no torch, build isolation, sdist, and `python -m fastbn`."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastbn
import fastbn.__main__

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent


def run(*arguments, cwd=TESTS, **environment):
    """A child interpreter, away from the source folder, which would shadow the installed package."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip


def last_line(done):
    """The line that a user reads, of a command that failed."""
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


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


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """The sources without build outputs, so that building leaves nothing in the real ones."""
    target = tmp_path_factory.mktemp("source") / "fastbn"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "results")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def test_a_build_without_torch_says_what_to_do(source_tree):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build'];runpy.run_path('setup.py')"
    done = run("-c", code, cwd=source_tree)
    line = last_line(done)
    assert "cannot import torch" in line and "pip install torch" in line
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("of", ["the interpreter", "VIRTUAL_ENV"])
def test_build_isolation_hides_torch_and_setup_finds_it(source_tree, tmp_path, of):
    """As pip and uv do it: an interpreter without site-packages, which has the build requirements alone."""
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        spec = importlib.util.find_spec(name)
        if spec is not None:
            (requirements / name).symlink_to(Path(spec.origin).parent)
    site_packages = Path(torch.__file__).parents[1]
    place = ("purelib", {}) if of == "the interpreter" else ("purelib", {"base": "x", "platbase": "x"})
    code = (
        "import sys, sysconfig\n"
        f"sys.path.append({str(requirements)!r})\n"
        "try:\n    import torch\n    sys.exit('torch is there already')\nexcept ImportError:\n    pass\n"
        "import runpy, setuptools\n"
        f"folder, wanted = {str(site_packages)!r}, {place[1]!r}\n"
        "sysconfig.get_path = lambda name, vars=None: folder if (vars or {}) == wanted else 'nowhere'\n"
        "setuptools.setup = lambda **_: print('torch was found')\n"
        "runpy.run_path('setup.py')\n"
    )
    environment = {"VIRTUAL_ENV": "x"} if of == "VIRTUAL_ENV" else {}
    done = run("-S", "-c", code, cwd=source_tree, **environment)
    assert done.stdout.strip() == "torch was found", done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build for CUDA")
def test_asking_for_cuda_where_there_is_none_is_refused(source_tree):
    for value in ("1", "yes"):
        done = run("setup.py", "--version", cwd=source_tree, FASTBN_CUDA=value)
        assert "FASTBN_CUDA" in last_line(done) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("choice", "place"),
    [("", None), ("", "include"), ("0", None), ("0", "include"), ("1", None), ("1", "targets/x86_64-linux/include")],
)
def test_a_compiler_without_its_headers_is_not_enough(source_tree, tmp_path, choice, place):
    if place:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "cuda_runtime.h").touch()
    code = (
        "import sys, runpy, setuptools, torch\n"
        "from torch.utils import cpp_extension\n"
        f"cpp_extension.CUDA_HOME, torch.version.cuda = {str(tmp_path)!r}, '13.0'\n"
        "setuptools.setup = lambda **_: print('CUDA' in made)\n"
        "made = []\n"
        "cpp_extension.CUDAExtension = lambda *a, **k: made.append('CUDA')\n"
        "cpp_extension.CppExtension = lambda *a, **k: made.append('CPU')\n"
        "runpy.run_path('setup.py')"
    )
    done = run("-c", code, cwd=source_tree, FASTBN_CUDA=choice)
    if choice == "1" and not place:
        said = [line for line in done.stderr.splitlines() if line.startswith("fastbn:")]  # torch may warn before
        assert "no cuda_runtime.h" in last_line(done) and len(said) == 1 and "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(bool(place) and choice != "0")
    assert ("without the CUDA backend" in done.stderr) == (choice == "" and not place)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the size is that of x86-64's three instruction sets")
def test_the_extension_has_not_grown():
    """How long it builds goes with its size: on two cores 10.0 MB took 186 s, 6.3 MB take 119, and 120 are allowed."""
    if fastbn._C.build_info()["backends"] != ["cpu"]:
        pytest.skip("a build for the CPU alone")
    assert Path(fastbn._C.__file__).stat().st_size < 7.5e6


@pytest.fixture(scope="module")
def sdist(source_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    done = run("-c", code, cwd=source_tree)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.mark.slow
def test_the_sdist_has_everything_to_build_and_test(sdist, source_tree):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "fastbn/__init__.py", "tests/conftest.py"}
    for pattern in ("csrc/**/*.h", "csrc/**/*.cpp", "fastbn/**/*.py", "fastbn/*.pyi", "tests/**/*.py", "tests/*.ini"):
        wanted |= {str(path.relative_to(source_tree)) for path in source_tree.glob(pattern)}
    assert wanted <= names, wanted - names
    assert not [name for name in names if re.search(r"\.(so|o|pyc|json)$|^build/", name)]


@pytest.mark.slow
def test_the_sdist_builds_and_the_result_works(sdist, tmp_path):
    """By plain `pip wheel`, under build isolation. The package imports from nowhere near the sources and computes."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    wheels = tmp_path / "wheels"
    options = ["--no-deps", "-w", str(wheels)]
    done = run("-m", "pip", "wheel", *options, str(source), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stat().st_size < 20 * 2**20
    target = tmp_path / "site"
    done = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    code = (
        "import torch, fastbn; x = torch.randn(4, 3, 5, 5); print(fastbn.__file__);"
        "torch.testing.assert_close(fastbn.BatchNorm2d(3)(x), torch.nn.BatchNorm2d(3)(x))"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(target))
