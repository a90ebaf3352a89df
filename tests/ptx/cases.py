"""Runs single cases (case.cpp) by the C++ kernels or from translated PTX, and compares their results."""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from ptx.build import HERE
from simt.build import CSRC, backend_sources, build, run

# The names of the types in templates of mangled names.
TYPES = {"f32": "f", "f64": "d", "f16": "NS_4HalfE", "bf16": "NS_8BFloat16E"}


def entries(*dtypes, kernels=r"\w+", epilogues=r"\w+", scalar=False):
    """A pattern for the mangled names of kernels of some types; scalar: those that access single elements too."""
    types = "|".join(TYPES[dtype] for dtype in dtypes)
    vectors = "" if scalar else r"(?!\w*Access\w*?Li1E)"
    return rf"N_1\d+({kernels})I({types}){vectors}NS0_\w*({epilogues})"


def run_case(*arguments, library=None, timeout=600, **environment):
    """(what case.cpp says, its results by name as bytes). RuntimeError where the run fails or does not end."""
    program = build([*backend_sources(CSRC), HERE / "case.cpp"], "plain")
    if library is not None:
        environment["FASTBN_SIMT_PTX"] = str(library)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        try:
            status, text = run(program, f"output={output}", *arguments, timeout=timeout, **environment)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"does not end within {timeout} s") from None
        if status != 0:
            raise RuntimeError(text)
        said, data, results = json.loads(text), output.read_bytes(), {}
    if library is not None and said["translated"] == 0:
        raise RuntimeError("nothing was executed from PTX")
    for name, size in said["results"].items():
        results[name], data = data[:size], data[size:]
    return said, results


def numbers(name, data, dtype):
    """The values of one result as float64."""
    dtype = {"moments": "f64", "dw": "f32", "db": "f32"}.get(name, dtype)
    if dtype == "bf16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"f32": np.float32, "f64": np.float64, "f16": np.float16}[dtype]).astype(np.float64)
