"""Batch norm of padded sequences as a module; `functional.masked` has the function."""

from torch import Tensor
from torch.jit import is_scripting

from ..functional.masked import gather, run_masked, valid_positions
from .modules import BatchNorm1d, Proxy, leaf_call, state_of


class MaskedBatchNorm1d(BatchNorm1d):
    """Batch norm of padded sequences, called as ``module(input, mask)``.

    input is (N, C, L); mask is bool (N, L), or has the lengths of the sequences, (N,). See
    `fastbn.functional.masked_batch_norm`. Arguments and state are those of torch.nn.BatchNorm1d.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(f"expected 3D input (got {input.dim()}D input)")

    def valid(self, input: Tensor, mask: Tensor) -> Tensor:
        """The values at the valid positions, (M, C)."""
        return gather(input, valid_positions(input, mask))

    def forward(self, input: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if is_scripting():
            raise RuntimeError(
                "fastbn: MaskedBatchNorm1d does not run in TorchScript; use torch.export or torch.compile"
            )
        else:
            if isinstance(input, Proxy):
                return leaf_call(self, input, mask)
            self._check_input_dim(input)
            return self._compute(input, mask)

    def _compute(self, input: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return run_masked(input, mask, state_of(self), self.momentum, self.eps)
