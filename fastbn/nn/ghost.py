"""Ghost batch norm (Hoffer, Hubara, Soudry 2017, algorithm 1) as modules; `functional.ghost` has the function."""

import torch
from torch import Tensor

from ..functional.ghost import check_virtual_batch_size, run_ghost
from .modules import BatchNorm1d, BatchNorm2d, Device, _FastBatchNorm, state_of


class _Ghost(_FastBatchNorm):
    """Constructor and forward pass of GhostBatchNorm1d and 2d."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        virtual_batch_size: int,
    ) -> None:
        check_virtual_batch_size(virtual_batch_size)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.virtual_batch_size = virtual_batch_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"

    def _check_scripted(self) -> None:
        if self.training:
            raise RuntimeError("fastbn: ghost batch norm does not train in TorchScript; script the model in eval mode")

    def _compute(self, input: Tensor) -> Tensor:
        return run_ghost(input, self.virtual_batch_size, state_of(self), self.momentum, self.eps)


class GhostBatchNorm1d(_Ghost, BatchNorm1d):
    """Ghost batch norm on (N, C) or (N, C, L): each chunk of virtual_batch_size samples has its own statistics.

    See `fastbn.functional.ghost_batch_norm`. Arguments and state are those of torch.nn.BatchNorm1d, and
    virtual_batch_size, which is given by keyword.
    """


class GhostBatchNorm2d(_Ghost, BatchNorm2d):
    """Ghost batch norm on (N, C, H, W): each chunk of virtual_batch_size samples has its own statistics.

    See `fastbn.functional.ghost_batch_norm`. Arguments and state are those of torch.nn.BatchNorm2d, and
    virtual_batch_size, which is given by keyword.
    """
