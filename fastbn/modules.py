"""In: the arguments of torch.nn.BatchNorm*d. Out: modules that are those, but for the forward pass."""

from torch import Tensor, nn

from .autograd import batch_norm


class _FastBatchNorm:
    """The forward pass of BatchNorm1d, 2d and 3d; all else is torch's, so that state_dict, repr, hooks, conversion
    tools and isinstance see what they know."""

    def __init__(self, num_features, *args, bias=True, **kwargs):
        # torch before 2.13 has no `bias`
        super().__init__(num_features, *args, **kwargs)
        if not bias and self.affine:
            self.register_parameter("bias", None)

    def reset_parameters(self):
        if self.affine and self.bias is None:  # torch before 2.13 would fill it with zeros
            self.reset_running_stats()
            nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor):  # a proxy of torch.fx has no number of dimensions to look at
            self._check_input_dim(input)
        try:  # where nn.Module.__getattr__ looks in the end; asking it five times takes as long as the rest
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            mean, var = self._buffers["running_mean"], self._buffers["running_var"]
            counter = self._buffers["num_batches_tracked"]
        except KeyError:  # parametrized, pruned, or moved elsewhere by another tool
            weight, bias = self.weight, self.bias
            mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        training = self.training
        if not training:
            training, counter = mean is None and var is None, None
        elif not self.track_running_stats:
            mean = var = counter = None
        return batch_norm(input, weight, bias, mean, var, counter, training, self.momentum, self.eps)


class BatchNorm1d(_FastBatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on (N, C) or (N, C, L), by fastbn's kernels; arguments and state are torch's."""


class BatchNorm2d(_FastBatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on (N, C, H, W), by fastbn's kernels; arguments and state are torch's."""


class BatchNorm3d(_FastBatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on (N, C, D, H, W), by fastbn's kernels; arguments and state are torch's."""
