"""The include check passes on the tree, and fails on every rule broken on purpose."""

import pytest
from checks import assert_no_sources, assert_one_problem, run, write

pytestmark = pytest.mark.cpu

SCRIPT = "check_includes.py"

TREE = {
    "core/moments.h": "#include <cmath>\n",
    "core/formula.h": '#include "moments.h"\n',
    "cpu/kernels.h": '#include "../core/formula.h"\n',
    "cpu/kernels.cpp": '#include <immintrin.h>\n#include "kernels.h"  // beside it\n',
    "cuda/device.cuh": '#include <cuda_runtime.h>\n#include "simt.h"\n',
    "cuda/stats.cu": '#include "../core/formula.h"\n#include "device.cuh"\n',
    "runtime/pages.h": '#include "../core/moments.h"\n',
    "torch/context.h": '#include <c10/cuda/CUDAGuard.h>\n#include "../runtime/pages.h"\n',
    "torch/ops.h": '#include <ATen/ATen.h>\n#include "../cpu/kernels.h"\n#include "context.h"\n',
}

BROKEN = {
    "core includes cpu": ("core/bad.h", '#include "../cpu/kernels.h"'),
    "core includes cuda, by angle brackets": ("core/bad.h", "#include <cuda/device.cuh>"),
    "cpu includes cuda": ("cpu/bad.cpp", '#include "../cuda/device.cuh"'),
    "cpu includes runtime": ("cpu/bad.cpp", '#include "../runtime/pages.h"'),
    "cuda includes cpu": ("cuda/bad.cu", '#include "../cpu/kernels.h"'),
    "cpu includes the folder torch": ("cpu/bad.cpp", '#include "../torch/ops.h"'),
    "runtime includes torch": ("runtime/bad.h", "#include <c10/core/Allocator.h>"),
    "torch in core": ("core/bad.h", "#include <c10/util/Half.h>"),
    "torch in a kernel": ("cpu/bad.cpp", "  #  include <ATen/ATen.h>"),
    "torch in quotes": ("cuda/bad.cu", '#include "torch/extension.h"'),
    "pybind11 in a kernel": ("cpu/bad.cpp", "#include <pybind11/pybind11.h>"),
    "the emulator in a kernel": ("cuda/bad.cu", '#include "simt.h"'),
    "CUDA in core": ("core/bad.h", "#include <cuda_fp16.h>"),
    "a macro for a name": ("core/bad.h", "#include HEADER"),
    "a missing file": ("cpu/bad.cpp", '#include "nowhere.h"'),
    "the path from csrc": ("torch/bad.cpp", '#include "cpu/kernels.h"'),
    "a file outside csrc": ("cpu/bad.cpp", '#include "../../outside.h"'),
    "a new folder": ("attic/bad.h", "#include <cmath>"),
    "a file in no folder": ("bad.h", "#include <cmath>"),
}


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "outside.h").touch()
    for name, text in TREE.items():
        write(tmp_path / "csrc" / name, text)
    return tmp_path / "csrc"


def test_tree_holds():
    status, output = run(SCRIPT)
    assert status == 0, output


def test_good_tree_passes(tree):
    status, output = run(SCRIPT, tree)
    assert status == 0, output


@pytest.mark.parametrize(("name", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_is_found(tree, name, line):
    write(tree / name, f"#include <vector>\n{line}\n")
    assert_one_problem(SCRIPT, tree, name)


def test_empty_folder_is_an_error(tmp_path):
    assert_no_sources(SCRIPT, tmp_path)
