"""The extension `_C`, and the operators of the namespace fastbn that it registers (csrc/torch/operators.cpp).

An eager call of a plain tensor calls `_C` directly. Whatever traces operators (torch.compile, torch.export, fake
tensors, functorch) sees the operators, which call the same functions of csrc/torch.

batch_norm is a whole batch norm as one node of a captured graph; its implementation, in autograd.py, calls the others.
forward, backward and update_running_stats are batch norm in one process; stats, gather_stats, backward_reduce and
backward_elemt are its parts for a batch that is distributed over ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REMEDY = "Rebuild it beside this torch: pip install --force-reinstall --no-deps --no-cache-dir fastbn"
try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"fastbn: the extension does not load with torch {torch.__version__}: {error}. {_REMEDY}"
    ) from error
_INFO = _C.build_info()
if _INFO["torch"].split("+")[0] != torch.__version__.split("+")[0]:
    raise ImportError(
        f"fastbn: the extension was built for torch {_INFO['torch']}, but this is torch {torch.__version__}. {_REMEDY}"
    )
_BACKENDS = _INFO["backends"]
# The build for tests that executes the CUDA kernels on the CPU.
SIMULATED = _BACKENDS == ["simt"]
# The types of devices that batch norm accepts; on meta nothing is computed.
DEVICES = ("meta", "cpu") if SIMULATED else ("meta", *_BACKENDS)

forward = torch.ops.fastbn.forward.default
backward = torch.ops.fastbn.backward.default
update_running_stats = torch.ops.fastbn.update_running_stats.default
stats = torch.ops.fastbn.stats.default
gather_stats = torch.ops.fastbn.gather_stats.default
backward_reduce = torch.ops.fastbn.backward_reduce.default
backward_elemt = torch.ops.fastbn.backward_elemt.default

batch_norm = torch.ops.fastbn.batch_norm.default
ghost_forward = torch.ops.fastbn.ghost_forward.default
ghost_backward = torch.ops.fastbn.ghost_backward.default
ghost_update = torch.ops.fastbn.ghost_update.default

_library = torch.library.Library("fastbn", "FRAGMENT")


def implement(name: str, function: Callable[..., Tensor]) -> None:
    """Register function as the composite implementation of fastbn::name, for all dispatch keys."""
    _library.impl(name, function, "CompositeImplicitAutograd")


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in torch 2.7


def is_compiling() -> bool:
    """Whether Dynamo or torch.export is tracing the caller.

    Not torch.compiler.is_compiling(), which is one flag for the whole process (torch 2.13): it is set while any thread
    compiles, and stays set after two threads compiled at the same time.
    """
    return _is_dynamo_compiling() or _is_exporting()


def _register_fake(name: str) -> None:
    """Register the function of `_C.fakes` with the name of an operator as its fake implementation."""
    fake = getattr(_C.fakes, name)
    arguments = getattr(torch.ops.fastbn, name).default._schema.arguments

    def with_defaults(*given: Any, **by_name: Any) -> Any:
        return fake(*given, *(by_name.get(a.name, a.default_value) for a in arguments[len(given) :]))

    torch.library.register_fake(f"fastbn::{name}", with_defaults)


for _name in vars(_C.fakes):
    if not _name.startswith("_"):
        _register_fake(_name)


def param_dtype(input: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the gradients of weight and bias."""
    return _param_dtype(input.dtype, None if weight is None else weight.dtype)


def _param_dtype(input: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
    return _C.param_dtype(input, weight)


# As torch.compiler.assume_constant_result does: Dynamo cannot trace into the extension.
_param_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]
