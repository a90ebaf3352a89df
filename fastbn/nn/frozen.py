"""Batch norm for fine-tuning, which always normalizes with its running statistics and never updates them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn import functional as F

from ..autograd import batch_norm
from .modules import Device, Proxy, doc_on, leaf_call

_STATE = ("weight", "bias", "running_mean", "running_var")


class _FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, in training and in eval.

    State dicts have the keys of torchvision.ops.FrozenBatchNorm2d; they load from and into torch.nn's batch norms, but
    for num_batches_tracked. It is not a subclass of torch.nn's batch norms, because tools that look for those reset or
    update statistics.

    Args:
        num_features: C of the input.
        eps: added to running_var.
        device, dtype: of parameters and buffers.
        trainable: weight and bias are parameters; otherwise they are buffers, which optimizers do not update.
    """

    if TYPE_CHECKING:  # torch.jit.script would read these annotations at run time
        weight: Tensor | None
        bias: Tensor | None
        running_mean: Tensor
        running_var: Tensor

        def _check_input_dim(self, input: Tensor) -> None: ...

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        ones, zeros = (f(num_features, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        for name, value in zip(_STATE, (ones, zeros, zeros.clone(), ones.clone()), strict=True):
            if trainable and name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, trainable={isinstance(self.weight, nn.Parameter)}"

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            self._check_input_dim(input)
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            if isinstance(input, Proxy):
                return leaf_call(self, input)
            self._check_input_dim(input)
            return self._compute(input)

    def _compute(self, input: Tensor) -> Tensor:
        state = self.weight, self.bias, self.running_mean, self.running_var
        return batch_norm(input, *state, None, False, 0.0, self.eps)


class FrozenBatchNorm1d(_FrozenBatchNorm):
    __doc__ = doc_on("(N, C) or (N, C, L)", _FrozenBatchNorm)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class FrozenBatchNorm2d(_FrozenBatchNorm):
    __doc__ = doc_on("(N, C, H, W)", _FrozenBatchNorm)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class FrozenBatchNorm3d(_FrozenBatchNorm):
    __doc__ = doc_on("(N, C, D, H, W)", _FrozenBatchNorm)
    _check_input_dim = nn.BatchNorm3d._check_input_dim
