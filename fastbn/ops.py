"""In: tensors from autograd.py. Out: the extension, and its operators fastbn::forward and fastbn::backward.

Eager calls go to `_C` directly. What traces operators (torch.compile, torch.export, fake tensors, functorch) goes
through torch.library, to the same functions of ops.cpp.
"""

import torch


def _load():
    """Import fastbn._C, or say in one line why it does not load beside this torch."""
    remedy = "Rebuild it beside this torch: pip install --no-build-isolation --force-reinstall --no-deps fastbn"
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"fastbn: the extension does not load with torch {torch.__version__}: {error}. {remedy}"
        ) from error
    built_for = _C.build_info()["torch"]
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(
            f"fastbn: the extension was built for torch {built_for}, but this is torch {torch.__version__}. {remedy}"
        )
    return _C


_C = _load()

forward = torch.ops.fastbn.forward.default
backward = torch.ops.fastbn.backward.default


def _like_output(input):
    """A tensor with the strides that batch norm gives its output: torch's suggested format, dense."""
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


@torch.library.register_fake("fastbn::forward")
def _forward_fake(input, weight, bias, moments, eps):
    return _like_output(input), input.new_empty((2, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("fastbn::backward")
def _backward_fake(grad_output, input, weight, moments, eps, training, output_mask):
    dtype = param_dtype(input, weight)
    param = [input.new_empty(input.size(1), dtype=dtype) if m else input.new_empty(0) for m in output_mask[1:]]
    return (_like_output(input) if output_mask[0] else input.new_empty(0), *param)


def param_dtype(input, weight):
    """The dtype of the gradients of weight and bias."""
    if weight is not None:
        return weight.dtype
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
