"""The extension. Bad arguments raise RuntimeError, ValueError, TypeError or IndexError."""

from types import ModuleType, NotImplementedType
from typing import Any, TypedDict

import torch
from torch import Tensor

fakes: ModuleType
"""The fake implementation of each operator, by its name."""

def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str = "identity",
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor | NotImplementedType:
    """Batch norm, running statistics, counter and autograd node; NotImplemented if the call needs the slow path."""

def ghost_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    virtual_batch_size: int,
) -> Tensor | NotImplementedType:
    """`batch_norm` in training, with statistics of their own for chunks of virtual_batch_size samples."""

def validate(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None = None,
    whole_batch: bool = True,
    by_kernels: bool = True,
) -> None:
    """Raise torch's exception unless this is a valid batch norm, of tensors of any kind.

    Args:
        whole_batch: False if other ranks have more of the batch, so that one value per channel is no error.
        by_kernels: False if torch's kernels compute the call, which check parameters and statistics themselves.
    """

def validate_chunks(input: Tensor, virtual_batch_size: int) -> None:
    """Raise ValueError if chunks of virtual_batch_size samples have one value per channel."""

def check_device(input: Tensor) -> None:
    """Raise RuntimeError, with advice, if this build has no kernels for the device of input."""

def check_memory(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError, with `name`, for a tensor whose storage was freed or is too small for its sizes.

    Tensors without a storage of their own (fake, meta, sparse, those that torch.func wraps) pass.
    """

def activations() -> dict[str, float | None]:
    """The activations that kernels know, each with the default of its parameter, None where it has none."""

def is_watched() -> bool:
    """Whether a dispatch mode, functorch or tracing is active, which intercepts operators."""

def output_format(input: Tensor) -> torch.memory_format:
    """The memory format of the output: that of input, or the one that torch suggests."""

def param_dtype(input: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
    """The dtype of the gradients of weight and bias: that of weight, or without one float32 for a half input."""

def plan(sizes: list[int], channels_last: bool, element_bytes: int) -> dict[str, Any]:
    """The CPU kernels' plan for a tensor of these sizes: those fields of fastbn.Plan that it decides."""

def cuda_plan(
    sizes: list[int],
    channels_last: bool,
    element_bytes: int,
    direction: str,
    training: bool,
    aligned: bool,
    device: dict[str, int | bool],
) -> dict[str, Any]:
    """The CUDA kernels' plan for such tensors, direction "forward" or "backward", on a GPU with these properties.

    A pure function in every build, without a GPU. device has the fields of cuda::Device in csrc/cuda/plan.h, the result
    those of fastbn.CudaPlan. aligned: tensors begin at multiples of 16 bytes.
    """

def cuda_device(input: Tensor) -> dict[str, int | bool]:
    """The properties of the GPU that input is on, for `cuda_plan`; in builds with CUDA kernels."""

def cpu_capability() -> str:
    """The instruction set of the kernels that run: "baseline", "avx2" or "avx512"."""

class _BuildInfo(TypedDict):
    torch: str
    compiler: str
    backends: list[str]
    cuda: str | None
    cuda_architectures: str | None
    cpu_capability: str
    cpu_capability_of_processor: str

def build_info() -> _BuildInfo:
    """Versions of torch and of the compiler at build time, backends and CUDA built in, and CPU capabilities.

    backends: ["cpu"], ["cpu", "cuda"], or ["simt"], the build for tests that runs the CUDA kernels on the CPU.
    """
