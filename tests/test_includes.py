"""The include check passes on the tree, and fails on every rule broken on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).with_name("check_includes.py")

HOUSE = {
    "core/moments.h": "#include <cmath>\n",
    "core/formula.h": '#include "moments.h"\n',
    "cpu/kernels.h": '#include "../core/formula.h"\n',
    "cpu/kernels.cpp": '#include <immintrin.h>\n#include "cpu/kernels.h"  // by the path from csrc\n',
    "cpu/parallel.cpp": "#include <ATen/Parallel.h>\n",
    "cuda/device.cuh": '#include <cuda_runtime.h>\n#include "simt.h"\n',
    "cuda/stats.cu": '#include "../core/formula.h"\n#include "device.cuh"\n',
    "context.h": "#include <c10/cuda/CUDAGuard.h>\n",
    "ops.h": "#include <ATen/ATen.h>\n",
    "ops.cpp": '#include "context.h"\n#include "cpu/kernels.h"\n#include "ops.h"\n',
    "autograd.h": '#include "ops.h"\n',
    "bindings.cpp": '#include <torch/extension.h>\n#include "autograd.h"\n',
}

BROKEN = {
    "core includes cpu": ("core/bad.h", '#include "../cpu/kernels.h"'),
    "core includes cuda, by angle brackets": ("core/bad.h", "#include <cuda/device.cuh>"),
    "cpu includes cuda": ("cpu/bad.cpp", '#include "../cuda/device.cuh"'),
    "cuda includes cpu": ("cuda/bad.cu", '#include "../cpu/kernels.h"'),
    "cpu includes ops": ("cpu/bad.cpp", '#include "../ops.h"'),
    "ops includes bindings": ("ops.cpp", '#include "bindings.cpp"'),
    "ops includes autograd": ("ops.cpp", '#include "autograd.h"'),
    "torch in core": ("core/bad.h", "#include <c10/util/Half.h>"),
    "torch in a kernel": ("cpu/bad.cpp", "  #  include <ATen/ATen.h>"),
    "torch in quotes": ("cuda/bad.cu", '#include "torch/extension.h"'),
    "pybind11 in a kernel": ("cpu/bad.cpp", "#include <pybind11/pybind11.h>"),
    "the emulator in a kernel": ("cuda/bad.cu", '#include "simt.h"'),
    "context includes ops": ("context.h", '#include "ops.h"'),
    "CUDA in core": ("core/bad.h", "#include <cuda_fp16.h>"),
    "a macro for a name": ("core/bad.h", "#include HEADER"),
    "a missing file": ("cpu/bad.cpp", '#include "nowhere.h"'),
    "a file outside csrc": ("cpu/bad.cpp", '#include "../../outside.h"'),
    "a new part": ("attic/bad.h", "#include <cmath>"),
}


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def house(tmp_path):
    (tmp_path / "outside.h").touch()
    for name, text in HOUSE.items():
        write(tmp_path / "csrc" / name, text)
    return tmp_path / "csrc"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_tree_holds():
    status, output = run()
    assert status == 0, output


def test_good_house_passes(house):
    status, output = run(house)
    assert status == 0, output


@pytest.mark.parametrize(("name", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_is_found(house, name, line):
    write(house / name, f"#include <vector>\n{line}\n")
    status, output = run(house)
    assert status == 1
    assert name in output
    assert len(output.splitlines()) == 1, "one rule was broken, one line is due"


def test_empty_folder_is_an_error(tmp_path):
    status, output = run(tmp_path)
    assert status == 1
    assert "no sources found" in output
