"""The extension `_C`, and the operators of the namespace fastbn that it registers, with their fake implementations.

An eager call of a plain tensor calls `_C` directly. Whatever traces operators (torch.compile, torch.export, fake
tensors, functorch) sees the operators, which call the same functions of csrc/torch.

forward, backward and update_running_stats are batch norm in one process; stats, gather_stats, backward_reduce and
backward_elemt are its parts for a batch that is distributed over ranks.
"""

from collections.abc import Callable

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

# A whole batch norm as one node of a captured graph, for `graph.matching`. Its implementation, in autograd.py, calls
# the operators above.
_library = torch.library.Library("fastbn", "FRAGMENT")
_library.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, str activation='identity', "
    "float? activation_param=None, Tensor? residual=None) -> Tensor"
)
batch_norm = torch.ops.fastbn.batch_norm.default


def implement(name: str, function: Callable[..., Tensor]) -> None:
    """Register function as the composite implementation of fastbn::name, for all dispatch keys."""
    _library.impl(name, function, "CompositeImplicitAutograd")


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in torch 2.7


def is_compiling() -> bool:
    """Whether Dynamo or torch.export is tracing the caller.

    Not torch.compiler.is_compiling(), which is one flag for the whole process (torch 2.13): it is set while any thread
    compiles, and stays set after two threads compiled at the same time.
    """
    return torch.compiler.is_dynamo_compiling() or _is_exporting()


def output_format(input: Tensor) -> torch.memory_format:
    """The memory format of the output, as in csrc/torch/ops.cpp: that of input, or the one that torch suggests."""
    if input.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if last is not None and input.is_contiguous(memory_format=last):
        return last
    return torch._prims_common.suggest_memory_format(input)


@torch.library.register_fake("fastbn::forward")
def _forward_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None, eps: float,
    activation: str = "identity", activation_param: float | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output = torch.empty_like(input, memory_format=output_format(input))
    return output, input.new_empty((2, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("fastbn::backward")
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, moments: Tensor, eps: float, training: bool,
    output_mask: list[bool], activation: str = "identity", activation_param: float | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    not_wanted = input.new_empty(0)
    dtype = param_dtype(input, weight)
    grad_weight, grad_bias = (
        input.new_empty(input.size(1), dtype=dtype) if wanted else not_wanted for wanted in output_mask[1:3]
    )
    grad_input = grad_input_like(input) if output_mask[0] else not_wanted
    grad_residual = torch.empty_like(input, memory_format=output_format(input)) if output_mask[3] else not_wanted
    return grad_input, grad_weight, grad_bias, grad_residual


@torch.library.register_fake("fastbn::update_running_stats")
def _update_running_stats_fake(
    moments: Tensor, count: int, momentum: float | None, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:  # fmt: skip
    pass


def grad_input_like(input: Tensor) -> Tensor:
    """An uninitialized tensor with the strides of the gradient of input, as in csrc/torch/ops.cpp."""
    memory_format = output_format(input)
    if memory_format == torch.contiguous_format:
        memory_format = torch._prims_common.suggest_memory_format(input)
    return torch.empty_like(input, memory_format=memory_format)


@torch.library.register_fake("fastbn::stats")
def _stats_fake(input: Tensor) -> Tensor:
    return input.new_empty((3, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("fastbn::gather_stats")
def _gather_stats_fake(
    all_stats: Tensor, momentum: float | None, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:  # fmt: skip
    return all_stats.new_empty(all_stats.shape[1:])


@torch.library.register_fake("fastbn::backward_reduce")
def _backward_reduce_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, batch_stats: Tensor, eps: float,
    activation: str = "identity", activation_param: float | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return batch_stats.new_empty((2, input.size(1)))


@torch.library.register_fake("fastbn::backward_elemt")
def _backward_elemt_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, batch_stats: Tensor, total: Tensor, eps: float,
    wants_residual: bool, activation: str = "identity", activation_param: float | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    residual_gradient = torch.empty_like(input, memory_format=output_format(input))
    return grad_input_like(input), residual_gradient if wants_residual else input.new_empty(0)


def param_dtype(input: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the parameters and of their gradients: that of weight, else float32 for half-precision inputs."""
    if weight is not None:
        return weight.dtype
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
