"""Forward passes for torch.jit.script, which cannot compile calls of the extension: they call torch's functions.

A scripted model has torch's operators alone, so that it loads where fastbn is not installed.
"""

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase


class Scriptable(_NormBase):
    """A batch norm whose scripted forward pass is torch's."""

    def _check_scripted(self) -> None:
        """Raise RuntimeError if a scripted module does not run in the mode that it is in."""

    def _scripted_batch_norm(self, input: Tensor) -> Tensor:
        """The same as torch.nn.BatchNorm2d.forward."""
        self._check_scripted()
        self._check_input_dim(input)
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        has_statistics = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if has_statistics else None,
            self.running_var if has_statistics else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )


def scripted_activation(z: Tensor, activation: str, param: float | None) -> Tensor:
    """`fastbn.activations.ACTIVATIONS` in code that TorchScript can compile."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, 0.01 if param is None else param)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "elu":
        return F.elu(z, 1.0 if param is None else param)
    if activation == "silu":
        return F.silu(z)
    if activation == "hardswish":
        return F.hardswish(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "sigmoid":
        return z.sigmoid()
    if activation == "tanh":
        return z.tanh()
    return z
