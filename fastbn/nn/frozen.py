"""Batch norm that always uses its running statistics and never changes them, for fine-tuning: eval, whatever the mode.

In: the state of a batch norm. Out: modules that compute y = (x - mean) / sqrt(var + eps) * weight + bias in one pass.
"""

import torch
from torch import Tensor, fx, nn
from torch.jit import is_scripting
from torch.nn import functional as F

from ..autograd import batch_norm
from .modules import leaf_call

_STATE = ("weight", "bias", "running_mean", "running_var")


class _FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, in training as in eval.

    Not a subclass of torch.nn's batch norms: tools that look for those reset or update statistics. State dicts are
    those of torchvision.ops.FrozenBatchNorm2d, and load from and into torch.nn's batch norms: without
    num_batches_tracked.

    Args:
        num_features: C of the input.
        eps: added to running_var.
        device, dtype: of parameters and buffers.
        trainable: weight and bias are parameters; otherwise they are buffers, which no optimizer sees.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, device=None, dtype=None, *, trainable: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        ones, zeros = (f(num_features, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        for name, value in zip(_STATE, (ones, zeros, zeros.clone(), ones.clone()), strict=True):
            if trainable and name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return f"{self.num_features}, eps={self.eps}, trainable={isinstance(self.weight, nn.Parameter)}"

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            self._check_input_dim(input)
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            if isinstance(input, fx.Proxy):
                node = leaf_call(self, input)
                if node is not None:
                    return node
            else:
                self._check_input_dim(input)
            state = self.weight, self.bias, self.running_mean, self.running_var
            return batch_norm(input, *state, None, False, 0.0, self.eps)


class FrozenBatchNorm1d(_FrozenBatchNorm):
    __doc__ = _FrozenBatchNorm.__doc__.replace("y =", "On (N, C) or (N, C, L): y =", 1)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class FrozenBatchNorm2d(_FrozenBatchNorm):
    __doc__ = _FrozenBatchNorm.__doc__.replace("y =", "On (N, C, H, W): y =", 1)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class FrozenBatchNorm3d(_FrozenBatchNorm):
    __doc__ = _FrozenBatchNorm.__doc__.replace("y =", "On (N, C, D, H, W): y =", 1)
    _check_input_dim = nn.BatchNorm3d._check_input_dim
