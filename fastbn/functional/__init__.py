"""Batch norm as functions, with the arguments of torch.nn.functional.batch_norm."""

from torch import Tensor

from ..autograd import batch_norm as _batch_norm
from .ghost import ghost_batch_norm
from .masked import masked_batch_norm

__all__ = ["batch_norm", "ghost_batch_norm", "masked_batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalize each channel of a batch, as torch.nn.functional.batch_norm does.

    y = (x - mean) / sqrt(var + eps) * weight + bias (Ioffe & Szegedy 2015, algorithms 1 and 2). mean and var are, in
    training, mean and biased variance of the batch over all dimensions but 1, and otherwise the running statistics.

    Args:
        input: (N, C) or (N, C, ...), float32, float64, float16 or bfloat16, in any layout.
        running_mean, running_var: (C,), in the dtype of input; float32 is possible for a half-precision input. In
            training they are updated in place (with the unbiased variance), or may both be None.
        weight, bias: (C,) or None, in the dtype of running_mean.
        training: normalize with the statistics of the batch.
        momentum: weight of the batch in the new running statistics.
        eps: added to the variance; positive in training.
        activation: identity, relu, leaky_relu, relu6, elu, silu, hardswish, gelu (exact), sigmoid or tanh.
        activation_param: negative_slope of leaky_relu (0.01), alpha of elu (1.0).
        residual: added before the activation, activation(y + residual); of the sizes and dtype of input.

    Returns:
        A tensor with the sizes and dtype of input, in the memory format that torch suggests for input.

    Raises:
        ValueError: eps is out of range, there is one value per channel in training, only one of the running statistics
            is given, the activation is unknown, or it has no parameter and one is given.
        RuntimeError: sizes, dtypes or devices do not match, or the device has no kernels.
        NotImplementedError: the dtype of input is not a floating point type.
        TypeError: an argument has the wrong type.
    """
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' (position 7) must be float, not NoneType")
    return _batch_norm(
        input, weight, bias, running_mean, running_var, None, training, momentum, eps, activation, activation_param,
        residual,
    )  # fmt: skip
