"""In: tensors as torch.nn.functional takes them. Out: the same function, faster."""

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

    y = (x - mean) / sqrt(var + eps) * weight + bias (Ioffe & Szegedy 2015, algorithms 1 and 2), with mean and biased
    variance over all but dimension 1: of the batch in training, the running ones otherwise.

    Args:
        input: (N, C) or (N, C, ...), float32, float64, float16 or bfloat16, in any layout.
        running_mean, running_var: (C,), in the dtype of input, or float32 beside a half input. In training they are
            updated in place (the variance unbiased), or may both be None.
        weight, bias: (C,) or None, in the dtype of running_mean.
        training: use the statistics of the batch.
        momentum: the part of the batch in the new running statistics.
        eps: added to the variance; positive in training.
        activation: identity, relu, leaky_relu, relu6, elu, silu, hardswish, gelu (exact), sigmoid or tanh.
        activation_param: negative_slope of leaky_relu (0.01), alpha of elu (1.0).
        residual: of the sizes and dtype of input; added before the activation: activation(y + residual).

    Returns:
        A tensor of input's sizes and dtype, in torch's suggested memory format of input.

    Raises:
        ValueError: eps out of range, one value per channel in training, one of two statistics missing, an activation
            that is not there, or a parameter for one that has none.
        RuntimeError: sizes or dtypes that do not go together, or a device without kernels.
        NotImplementedError: a dtype that is not floating point.
        TypeError: an argument of the wrong kind.
    """
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' (position 7) must be float, not NoneType")
    return _batch_norm(
        input, weight, bias, running_mean, running_var, None, training, momentum, eps, activation, activation_param,
        residual,
    )  # fmt: skip
