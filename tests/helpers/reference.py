"""Reference results: batch norm and its gradients in float64 (wider for float64 inputs), and the tolerance table."""

import inspect
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import fastbn

# How far a result may be from the oracle, in units in the last place of the result's type, of a magnitude
# that `Oracle.scale` gives for each channel. One table, one reason a row:
TOLERANCE_ULPS = {
    # x - mean, * g, + beta round once each, mean and g are rounded once each: at most 2.5; the rest is for
    # the error of the statistics themselves
    "output": {"half": 1, "float": 4, "double": 16},
    # two sums, three products and two differences: at most 5 roundings, and some for the sums
    "grad_input": {"half": 1, "float": 8, "double": 32},
    # one sum of products: rounding grows with the depth of the summation tree, not with its length
    "grad_weight": {"half": 1, "float": 8, "double": 32},
    "grad_bias": {"half": 1, "float": 8, "double": 32},
    # (1 - momentum) * old + momentum * new: three roundings, and the batch's own statistic
    "running_mean": {"half": 1, "float": 4, "double": 16},
    "running_var": {"half": 1, "float": 8, "double": 32},
}
# half: sums are in float32, so that only the last rounding (half an ulp) is visible. double: four times the
# float column, as there is no wider type to sum in, and the roundings of thousands of terms add up.

# Set by conftest.py: the types for which the kernels' products, which are summed in float32, are rounded otherwise than
# torch's. The CUDA kernels sum float16 so; and nvcc fuses products into the additions, where none is rounded by itself.
OTHER_PRODUCTS: tuple = ()

HALF_TYPES = (torch.float16, torch.bfloat16)
QUANTITIES = tuple(TOLERANCE_ULPS)
# fastbn's modules take `bias` beside any torch; torch's own do in 2.13.
needs_bias = pytest.mark.skipif(
    "bias" not in inspect.signature(torch.nn.BatchNorm2d).parameters, reason="torch's batch norm has no `bias` here"
)


def wide(tensor):
    """The tensor as numpy float64, exactly; float64 itself as extended precision where numpy has it."""
    if tensor is None:
        return None
    array = tensor.detach().cpu().double().numpy()
    return array.astype(np.longdouble) if tensor.dtype == torch.float64 else array


def rows(array):
    """[N, C, ...] -> [C, N*S]."""
    return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)


@dataclass
class Oracle:
    """The right answers; by quantity and channel the magnitude that rounding errors are relative to;
    the largest single term that is added up, which says what one rounding is where the sum cancels; and
    what rounding each of the products in a sum of float32 amounts to."""

    value: dict
    scale: dict
    term: dict
    products: dict


def oracle(x, weight, bias, running_mean, running_var, training, momentum, eps, grad_output):
    """Batch norm of x and the gradients for grad_output, in wide precision; arguments are tensors or None."""
    rows_x, rows_dy = rows(wide(x)), rows(wide(grad_output))
    channels, count = rows_x.shape
    flat = [None if t is None else wide(t).reshape(-1) for t in (weight, bias, running_mean, running_var)]
    gamma, beta, old_mean, old_var = flat
    gamma = np.ones(channels) if gamma is None else gamma
    beta = np.zeros(channels) if beta is None else beta
    if training:
        mean = rows_x.mean(1)
        var = np.square(rows_x - mean[:, None]).mean(1)
    else:
        mean, var = old_mean, old_var
    rstd = 1 / np.sqrt(var + eps)
    centered = rows_x - mean[:, None]
    normalized = centered * rstd[:, None]
    grad_bias = rows_dy.sum(1)
    grad_weight = (rows_dy * normalized).sum(1)
    grad_input = rows_dy
    if training:
        grad_input = rows_dy - (grad_bias[:, None] + normalized * grad_weight[:, None]) / count
    value = {
        "output": normalized * gamma[:, None] + beta[:, None],
        "grad_input": grad_input * (gamma * rstd)[:, None],
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }
    # In training the mean is a rounded number, and x - mean inherits its error.
    condition = 1 + np.abs(mean) * rstd if training else np.ones(channels)
    largest = np.abs(normalized).max(1)
    mean_dy_x = np.abs(rows_dy * normalized).mean(1)
    spread = np.abs(rows_dy).max(1) + (np.abs(rows_dy).mean(1) + largest * mean_dy_x if training else 0)
    scale = {
        "output": np.abs(gamma) * largest * condition + np.abs(beta),
        "grad_input": np.abs(gamma) * rstd * spread * condition,
        "grad_weight": np.abs(rows_dy * normalized).sum(1) * condition + np.abs(grad_bias) * (condition - 1),
        "grad_bias": np.abs(rows_dy).sum(1),
    }
    term = {
        "output": np.abs(gamma) * largest,
        "grad_input": np.abs(gamma) * rstd * np.abs(rows_dy).max(1),
        "grad_weight": np.abs(rows_dy * normalized).max(1),
        "grad_bias": np.abs(rows_dy).max(1),
    }
    if training and old_mean is not None:
        unbiased = var * (count / (count - 1))
        value["running_mean"] = (1 - momentum) * old_mean + momentum * mean
        value["running_var"] = (1 - momentum) * old_var + momentum * unbiased
        scale["running_mean"] = abs(1 - momentum) * np.abs(old_mean) + abs(momentum) * np.abs(rows_x).max(1)
        scale["running_var"] = abs(1 - momentum) * np.abs(old_var) + abs(momentum) * unbiased * condition
        term["running_mean"], term["running_var"] = np.abs(old_mean), np.abs(old_var)
    # of as many roundings with random signs
    products = np.sqrt(np.square(rows_dy * normalized).sum(1)).max() * 2.0**-24 if x.dtype in OTHER_PRODUCTS else 0
    largest_terms = {quantity: numbers.max() for quantity, numbers in term.items()}
    return Oracle(value, scale, largest_terms, {"grad_weight": float(products)})


def tolerance(quantity, dtype):
    """The table's entry as a number relative to the quantity's scale."""
    kind = "half" if dtype in HALF_TYPES else "double" if dtype == torch.float64 else "float"
    return TOLERANCE_ULPS[quantity][kind] * torch.finfo(dtype).eps


def ulp(magnitude, dtype):
    """The distance from `magnitude` to the next number of `dtype`."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return float(2.0 ** np.floor(np.log2(float(magnitude)))) * info.eps


def as_rows(tensor):
    """A result of a kernel in the oracle's form: rows for activations, one number a channel for the rest."""
    array = wide(tensor)
    return rows(array) if array.ndim > 1 else array


def error(result, expected):
    """|result - expected|, where a result that is not a finite number is infinitely wrong."""
    difference = np.abs(result - expected)
    return np.where(np.isfinite(difference), difference, np.inf)


def assert_close(quantity, result, truth):
    expected, scale = truth.value[quantity], truth.scale[quantity]
    scale = scale[:, None] if expected.ndim > 1 else scale
    smallest = torch.finfo(result.dtype).tiny * torch.finfo(result.dtype).eps
    allowed = tolerance(quantity, result.dtype) * scale + smallest
    found = as_rows(result)
    wrong = error(found, expected)
    allowed = np.broadcast_to(allowed, wrong.shape)
    worst = np.unravel_index(np.argmax(wrong - allowed), wrong.shape)
    assert wrong[worst] <= allowed[worst], (
        f"{quantity} at {tuple(map(int, worst))}: {found[worst]:.9g}, right is {expected[worst]:.9g}, "
        f"off by {wrong[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


def assert_no_further(quantity, result, torchs, truth):
    """Our error is at most torch's own, plus one unit in the last place of the result's type.

    The unit is that of the largest number in the result, or of the largest term where sums cancel: with two
    values a channel dx is nearly zero, and no rounding of its terms is as small as a unit of that.

    Where products are rounded otherwise than torch's, this part of the two errors is random, and either may be the
    larger one by what it is.

    Not for float64: neither side has a wider type to sum in, so which of two errors of an ulp or two is the
    larger one is chance there, and the tolerance table decides alone.
    """
    if result.dtype == torch.float64:
        return
    expected = truth.value[quantity]
    ours, theirs = error(as_rows(result), expected).max(), error(as_rows(torchs), expected).max()
    slack = ulp(max(np.abs(expected).max(), truth.term[quantity]), result.dtype)
    slack += truth.products.get(quantity, 0)
    assert ours <= theirs + slack, (
        f"{quantity}: off by {ours:.4g}, torch only by {theirs:.4g} (allowed: {slack:.3g} more)"
    )


def run(function, x, weight, bias, running_mean, running_var, training, momentum, eps, grad_output):
    """Call a batch norm function on copies; results by quantity, the gradients through autograd."""
    stats = [None if t is None else t.clone() for t in (running_mean, running_var)]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    output = function(leaves[0], *stats, leaves[1], leaves[2], training, momentum, eps)
    wanted = zip(("grad_input", "grad_weight", "grad_bias"), leaves, strict=True)
    wanted = {name: leaf for name, leaf in wanted if leaf is not None}
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output)
    result = {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}
    if training and running_mean is not None:
        result["running_mean"], result["running_var"] = stats
    return result


def check(
    x,
    *,
    training=True,
    param_dtype=None,
    affine=True,
    stats=True,
    momentum=0.1,
    eps=1e-5,
    grad_output=None,
    weight=None,
    bias=None,
):
    """fastbn against torch and the oracle on x: values, gradients, statistics, types, strides."""
    channels, dtype = x.shape[1], param_dtype or x.dtype

    def vector(low, high):
        return torch.empty(channels, dtype=torch.float64).uniform_(low, high).to(device=x.device, dtype=dtype)

    if affine:
        weight = vector(-1.5, 1.5) if weight is None else weight
        bias = vector(-1, 1) if bias is None else bias
    use_stats = stats or not training
    running_mean, running_var = (vector(-1, 1), vector(0.5, 2)) if use_stats else (None, None)
    if grad_output is None:
        grad_output = torch.randn(x.shape, dtype=torch.float32, device=x.device).to(x.dtype)
    arguments = (x, weight, bias, running_mean, running_var, training, momentum, eps, grad_output)
    truth = oracle(*arguments)
    ours = run(fastbn.functional.batch_norm, *arguments)
    torchs = run(torch.nn.functional.batch_norm, *arguments)
    assert ours.keys() == torchs.keys()
    for quantity, result in ours.items():
        assert result.dtype == torchs[quantity].dtype, quantity
        assert result.shape == torchs[quantity].shape, quantity
        assert_close(quantity, result, truth)
        assert_no_further(quantity, result, torchs[quantity], truth)
    assert ours["output"].stride() == torchs["output"].stride()
    return ours, torchs, truth


def raised(call):
    """(type, message) of the exception that call() raises, or None."""
    try:
        call()
    except Exception as exception:
        return type(exception), str(exception)
    return None


def assert_same_error(ours, torchs, pattern=None):
    """Both calls raise the same type and message; a pattern stands in for a bad message of torch."""
    expected, found = raised(torchs), raised(ours)
    assert expected is not None, "torch accepts this call"
    assert found is not None, f"accepted; torch raises {expected}"
    # where torch raises NotImplementedError, older ones raise RuntimeError, of which it is a kind
    kinds = expected[0], NotImplementedError if expected[0] is RuntimeError else expected[0]
    assert found[0] in kinds, f"{found}; torch raises {expected}"
    if pattern is None:
        ours, torchs = found[1].splitlines()[0], expected[1].splitlines()[0]
        assert ours == torchs, f"says {ours!r}; torch says {torchs!r}"
    else:
        assert re.search(pattern, found[1]), found[1]


def assert_refused(ours, torchs, pattern):
    """Both calls raise the same, or torch is too old to refuse this, and ours raises what torch 2.13 does."""
    if raised(torchs) is not None:
        return assert_same_error(ours, torchs)
    with pytest.raises(ValueError, match=pattern):
        ours()
