"""Building: what a failing build says, where setup.py finds torch, the sdist, and wheels made by pip and uv."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from interpreters import last_line, run

import fastbn

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """The sources without build outputs, so that building leaves nothing in the real ones."""
    target = tmp_path_factory.mktemp("source") / "fastbn"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "results")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def test_a_build_without_torch_says_what_to_do(source_tree):
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py')"
    )
    done = run("-c", code, cwd=source_tree)
    line = last_line(done)
    assert "cannot import torch" in line and "pip install torch" in line
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_build_for_an_old_torch_says_what_to_do(source_tree):
    code = (
        "import sys, runpy, torch; torch.__version__ = type(torch.__version__)('2.5.1+cpu');"
        "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    )
    done = run("-c", code, cwd=source_tree)
    line = last_line(done)
    assert "torch 2.6 or later" in line and "2.5.1+cpu" in line and "pip install --upgrade torch" in line
    assert "Traceback" not in done.stderr
    assert '"torch>=2.6"' in (ROOT / "pyproject.toml").read_text()


# A compiler as a shell script, and what the last line of a build with it should say.
COMPILERS = {
    "missing": (None, ("there is no C++ compiler", "install g++")),
    "without C++17": ("case $* in *-std=c++17*) exit 1;; esac; exec c++ $*", ("does not compile C++17", "install g++")),
    "that fails": ("case $* in *-fsyntax-only*) exit 0;; esac; exit 1", ("did not compile", "MAX_JOBS=1")),
}  # fmt: skip


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_build_without_a_working_compiler_says_what_to_do(source_tree, tmp_path, compiler):
    script, words = COMPILERS[compiler]
    program = tmp_path / "compiler"
    if script:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = run("setup.py", "build_ext", *places, cwd=source_tree, CXX=str(program), FASTBN_CUDA="0")
    line = last_line(done)
    assert line.startswith("fastbn: ") and all(word in line for word in words), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not list(source_tree.glob("fastbn/_C*.so"))


PLACES = ("the interpreter", "VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "the current folder")


@pytest.mark.parametrize("place", PLACES)
def test_build_isolation_hides_torch_and_setup_finds_it(source_tree, tmp_path, place):
    """As pip and uv do it: an interpreter without site-packages, which has the build requirements alone."""
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        spec = importlib.util.find_spec(name)
        if spec is not None:
            (requirements / name).symlink_to(Path(spec.origin).parent)
    # An environment with this one's torch, through a .pth file.
    environment = tmp_path / "project" / ".venv"
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    own = str(packages) if place == "the interpreter" else "nowhere"
    code = (
        "import sys, sysconfig\n"
        f"sys.path.append({str(requirements)!r})\n"
        "try:\n    import torch\n    sys.exit('torch is there already')\nexcept ImportError:\n    pass\n"
        "import runpy, setuptools\n"
        "get_path = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name, *place: get_path(name, *place) if place else {own!r}\n"
        "setuptools.setup = lambda **_: print('torch was found')\n"
        "runpy.run_path('setup.py')\n"
    )
    hidden = {"VIRTUAL_ENV": "nowhere", "CONDA_PREFIX": "nowhere", "PATH": "/usr/bin:/bin", "PWD": str(tmp_path)}
    if place == "PATH":
        hidden["PATH"] = f"/usr/bin:{environment / 'bin'}:/bin"
    elif place == "the current folder":
        hidden["PWD"] = str(tmp_path / "project" / "csrc")
    elif place in hidden:
        hidden[place] = str(environment)
    done = run("-S", "-c", code, cwd=source_tree, **hidden)
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


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """The folder of an unpacked sdist."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def objects(unpacked):
    """The folder with the objects of csrc: those of `make build`, unless a source is newer than what it installed."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    installed = Path(fastbn._C.__file__).stat().st_mtime
    for folder in ROOT.glob("build/temp*"):
        built = {path.relative_to(folder).with_suffix(".cpp") for path in folder.rglob("*.o")}
        complete = {path.relative_to(ROOT) for path in ROOT.glob("csrc/*/*.cpp")} <= built
        if complete and installed > newest:
            return folder
    done = run("setup.py", "build_ext", "--build-temp", "temp", "--build-lib", "lib", cwd=unpacked)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return unpacked / "temp"


@pytest.fixture(scope="module")
def reusing(objects, tmp_path_factory):
    """A compiler that includes what a source includes, which must be there, and takes the object that there is."""
    program = tmp_path_factory.mktemp("reusing") / "compiler"
    program.write_text(
        '#!/bin/sh\nfor word; do test "$before" = -o && output=$word; before=$word; done\n'
        f'case $output in *.o) c++ "$@" -E && exec cp "{objects}/csrc/${{output##*/csrc/}}" "$output"; exit 1;; esac\n'
        'exec c++ "$@"\n'
    )
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def wheel(reusing, unpacked, tmp_path_factory):
    """Made by plain `pip wheel`, under build isolation."""
    folder = tmp_path_factory.mktemp("wheels")
    before = set(unpacked.iterdir())
    command = ["-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(unpacked)]
    done = run(*command, cwd=folder, FASTBN_LOCAL_VERSION="1", CXX=str(reusing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in set(unpacked.iterdir()) - before} <= {"build", "fastbn.egg-info"}
    (found,) = folder.glob("*.whl")
    return found


def test_the_version_of_a_wheel_names_torch_and_cuda(source_tree, tmp_path):
    """Also from an sdist, whose setup.cfg says that there is no tag."""
    (source_tree / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    for local, suffix in (("1", r"\+torch\d+\.\d+\.(cpu|cu\d+)"), ("", "")):
        folder = tmp_path / f"metadata{local}"
        folder.mkdir()
        done = run("-c", code.replace("'.'", repr(str(folder))), cwd=source_tree, FASTBN_LOCAL_VERSION=local)
        assert done.returncode == 0, done.stderr[-2000:]
        (metadata,) = folder.glob("*.dist-info/METADATA")
        version = re.search(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE)[1]
        assert re.fullmatch(re.escape(fastbn.__version__) + suffix, version), version
    (source_tree / "setup.cfg").unlink()


@pytest.mark.slow
def test_a_wheel_names_torch_and_cuda(wheel):
    release = ".".join(torch.__version__.split(".")[:2])
    cuda = "cu" + torch.version.cuda.replace(".", "") if "cuda" in fastbn._C.build_info()["backends"] else "cpu"
    assert wheel.name.startswith(f"fastbn-{fastbn.__version__}+torch{release}.{cuda}-cp")
    assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.slow
def test_a_wheel_works_far_from_the_sources(wheel, tmp_path):
    target = tmp_path / "site"
    done = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("-m", "fastbn", cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0 and str(target) in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_needs_no_libraries_but_those_of_torch_and_the_system(wheel):
    pytest.importorskip("auditwheel", reason="make venv installs auditwheel")
    done = run("-m", "auditwheel", "show", "--json", str(wheel))
    assert done.returncode == 0, done.stderr
    needed = set(json.loads(done.stdout)["external_libs"])
    of_torch = {
        "libc10.so",
        "libtorch.so",
        "libtorch_cpu.so",
        "libtorch_python.so",
        "libc10_cuda.so",
        "libtorch_cuda.so",
    }
    assert "libtorch_cpu.so" in needed and needed <= of_torch, needed


def make_environment(environment):
    """A virtual environment that has this interpreter's torch, with what it needs, and no fastbn."""
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if "fastbn" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sdist", "folder", "editable"])
def test_pip_installs_under_build_isolation(reusing, sdist, unpacked, tmp_path, what):
    environment, source = tmp_path / "environment", tmp_path / "source"
    make_environment(environment)
    shutil.copytree(unpacked, source, ignore=shutil.ignore_patterns("build"))
    chosen = {"sdist": [sdist], "folder": [source], "editable": ["-e", source]}[what]
    command = ["-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps", *chosen]
    done = run(*map(str, command), cwd=tmp_path, CXX=str(reusing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_works(environment, tmp_path, source if what == "editable" else environment)


def uv_install(environment, source, folder, **variables):
    """`uv pip install` in `folder`, with this interpreter's torch in the environment, which is not activated."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("make venv installs uv")
    make_environment(environment)
    without = ("VIRTUAL_ENV", "PYTHONPATH", "CONDA_PREFIX")
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    inherited["PATH"] = os.pathsep.join(p for p in inherited["PATH"].split(os.pathsep) if ".venv" not in p)
    variables = {name: value.format(PATH=inherited["PATH"]) for name, value in variables.items()}
    settings = {**inherited, "PWD": str(folder), "UV_CACHE_DIR": str(folder / "cache"), **variables}
    command = [uv, "pip", "install", "--no-deps", str(source)]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)


def assert_works(environment, folder, place=None):
    """The self-test passes, with the package in `place`, by default in the environment."""
    program = environment / "bin" / "python"
    done = subprocess.run([program, "-m", "fastbn"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and str(place or environment) in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_uv_builds_for_an_activated_environment(reusing, unpacked, tmp_path):
    environment = tmp_path / "environment"
    activated = {"VIRTUAL_ENV": str(environment), "PATH": f"{environment / 'bin'}{os.pathsep}{{PATH}}"}
    done = uv_install(environment, unpacked, tmp_path, CXX=str(reusing), **activated)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_works(environment, tmp_path)


@pytest.mark.slow
def test_uv_builds_for_the_environment_of_the_current_folder(reusing, unpacked, tmp_path):
    done = uv_install(tmp_path / ".venv", unpacked, tmp_path, CXX=str(reusing))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_works(tmp_path / ".venv", tmp_path)


@pytest.mark.slow
def test_uv_with_an_environment_elsewhere_is_told_to_activate_it(source_tree, tmp_path):
    environment = tmp_path / "elsewhere"
    done = uv_install(environment, source_tree, tmp_path, UV_PYTHON=str(environment / "bin" / "python"))
    said = " ".join(done.stderr.split())  # uv breaks long lines
    assert done.returncode != 0 and "with uv, activate the environment" in said, said
