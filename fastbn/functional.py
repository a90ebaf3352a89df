"""In: tensors as torch.nn.functional takes them. Out: the same function, faster."""

from .autograd import batch_norm as _batch_norm


def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    activation="identity",
    activation_param=None,
    residual=None,
):
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
        activation, activation_param, residual: not there yet; only their defaults are accepted.

    Returns:
        A tensor of input's sizes and dtype, in torch's suggested memory format of input.

    Raises:
        ValueError: eps out of range, one value per channel in training, or one of two statistics missing.
        RuntimeError: sizes or dtypes that do not go together, or a device without kernels.
        NotImplementedError: a dtype that is not floating point, or an argument that is not there yet.
        TypeError: an argument of the wrong kind.
    """
    if activation != "identity" or activation_param is not None or residual is not None:
        _not_there_yet(activation, activation_param, residual)
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' (position 7) must be float, not NoneType")
    return _batch_norm(input, weight, bias, running_mean, running_var, None, training, momentum, eps)


def _not_there_yet(activation, activation_param, residual):
    given = {"activation": activation, "activation_param": activation_param, "residual": residual}
    for name, default in (("activation", "identity"), ("activation_param", None), ("residual", None)):
        if given[name] is not default and given[name] != default:
            what = type(given[name]).__name__ if name == "residual" else repr(given[name])
            raise NotImplementedError(
                f"batch_norm(): argument '{name}' is {what}; fusing is not there yet, leave it at {default!r}"
            )
