"""The extension. Bad arguments raise RuntimeError, ValueError, TypeError or IndexError."""

from types import NotImplementedType
from typing import Any, TypedDict

from torch import Tensor

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

def check_device(input: Tensor) -> None:
    """Raise RuntimeError, with advice, if this build has no kernels for the device of input."""

def check_memory(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError, with `name`, for a tensor whose storage was freed or is too small for its sizes.

    Tensors without a storage of their own (fake, meta, sparse, those that torch.func wraps) pass.
    """

def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    eps: float,
    activation: str = "identity",
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output, and the moments used: float64 (2, C), mean and biased variance, of the batch if none are given."""

def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    moments: Tensor,
    eps: float,
    training: bool,
    output_mask: tuple[bool, bool, bool, bool],
    activation: str = "identity",
    activation_param: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight, bias and residual; None where output_mask is False.

    bias and residual are those of the forward pass; they are read where there is an activation.
    """

def activations() -> dict[str, float | None]:
    """The activations that kernels know, each with the default of its parameter, None where it has none."""

def update_running_stats(
    moments: Tensor,
    count: int,
    momentum: float | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:
    """Blend the moments of count values a channel into the running statistics, in place; the variance unbiased."""

def stats(input: Tensor) -> Tensor:
    """Float64 (3, C): mean, biased variance and count of the values of each channel."""

def gather_stats(
    all_stats: Tensor,
    momentum: float | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """The `stats` (K, 3, C) of K ranks merged in their order, (3, C); updates the running statistics with them."""

def backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    batch_stats: Tensor,
    eps: float,
    activation: str = "identity",
    activation_param: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Float64 (2, C): the gradients of weight and bias; batch_stats: what `gather_stats` returned."""

def backward_elemt(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    batch_stats: Tensor,
    total: Tensor,
    eps: float,
    wants_residual: bool,
    activation: str = "identity",
    activation_param: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and residual (empty if not wanted); total: `backward_reduce`, summed over the ranks."""

def is_watched() -> bool:
    """Whether a dispatch mode, functorch or tracing is active, which intercepts operators."""

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
