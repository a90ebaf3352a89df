"""Copies of csrc that tests change: to plant defects, and to compile the kernels of one type alone, which is faster."""

import shutil
from pathlib import Path

from simt.build import CSRC

CTYPES = {"f32": "float", "f64": "double", "f16": "Half", "bf16": "BFloat16"}
DISPATCH_ONE = """namespace fastbn::cuda {{
template <class Body>
void dispatch_one(DType, const Body& body) {{
  body(Type<{ctype}>{{}});
}}
"""


def replaced(path: Path, old: str, new: str, times: int = 1) -> None:
    text = path.read_text()
    assert text.count(old) == times, f"{path.name} should have {times} of: {old}"
    path.write_text(text.replace(old, new))


def copy_of_csrc(folder: Path, dtype: str, identity: bool = False) -> Path:
    """csrc with the kernels of `dtype` alone, in `folder`; `identity`: those without residual and activation alone."""
    csrc = folder / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(CSRC / part, csrc / part)
    launch = csrc / "cuda" / "launch.cuh"
    replaced(launch, "dispatch_dtype(dtype, [&](auto type) {", "dispatch_one(dtype, [&](auto type) {", times=2)
    replaced(launch, "namespace fastbn::cuda {\n", DISPATCH_ONE.format(ctype=CTYPES[dtype]))
    if identity:
        file = csrc / "cuda" / "epilogue.cuh"
        text = file.read_text()
        first = "  const bool adds = epilogue.residual != nullptr;\n"
        last = "  body(Type<ForwardEpilogue<T, V, Any, true>>{});\n"
        start, end = text.index(first), text.index(last) + len(last)
        file.write_text(f"{text[:start]}  body(Type<ForwardEpilogue<T, V, Identity, false>>{{}});\n{text[end:]}")
    return csrc
