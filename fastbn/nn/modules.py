"""BatchNorm1d/2d/3d, drop-in replacements for those of torch.nn, and BatchNormAct1d/2d/3d."""

from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm

from .. import activations
from ..autograd import State, batch_norm
from ..checkpointing import is_repeated
from .scripting import Scriptable, scripted_activation

Device: TypeAlias = torch.device | str | int | None
# torch.fx calls forward with these instead of tensors. Any, because annotations say Tensor.
Proxy: Any = fx.Proxy


class _FastBatchNorm(Scriptable, _BatchNorm):
    """The forward pass of BatchNorm1d, 2d and 3d.

    Everything else is inherited from torch.nn, so that state_dict, repr, hooks, conversion tools and isinstance work.
    """

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
    ) -> None:
        # torch before 2.13 has no argument `bias`
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias and self.affine:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        bias: Tensor | None = self._parameters.get("bias", self.bias)
        if self.affine and bias is None:  # torch before 2.13 would fill it with zeros
            self.reset_running_stats()
            nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted_batch_norm(input)
        else:  # not compiled by TorchScript
            if isinstance(input, Proxy):
                return leaf_call(self, input)
            self._check_input_dim(input)
            return self._compute(input)

    def _compute(self, input: Tensor) -> Tensor:
        return batch_norm(input, *state_of(self), self.momentum, self.eps)


def leaf_call(module: Any, *inputs: Any) -> Any:
    """A call of a batch norm that torch.fx is tracing.

    torch.fx traces into all modules outside torch.nn. Here a batch norm is a leaf of the traced model, as torch's own
    is, so that the model keeps its state and follows its mode.

    Args:
        module: has the method `_compute`, which is forward without a check of dimensions.
        inputs: a proxy and what forward was called with besides, which may be None.

    Returns:
        The proxy of a call_module node, or of the result if the module itself is what is traced.
    """
    tracer: Any = inputs[0].tracer
    is_root = getattr(tracer, "root", None) is module
    if is_root:
        return module._compute(*inputs)
    given = tuple(t for t in inputs if t is not None)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), given, {})


def state_of(module: nn.Module) -> State:
    """weight, bias, running_mean, running_var, num_batches_tracked and training for one forward pass of a module.

    Attributes that the pass does not use are not read, as in torch: modules from old checkpoints may lack them.
    """
    weight: Any
    bias: Any
    mean: Any = None
    var: Any = None
    counter: Any = None
    training = module.training
    has_statistics = not training or (module.track_running_stats and not is_repeated())
    try:  # the dictionaries that nn.Module.__getattr__ searches: five calls of it take as long as all the rest
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if has_statistics:
            mean, var = module._buffers["running_mean"], module._buffers["running_var"]
            if training:
                counter = module._buffers["num_batches_tracked"]
    except KeyError:  # after parametrization or pruning they are other attributes
        weight, bias = module.weight, module.bias
        if has_statistics:
            mean, var = module.running_mean, module.running_var
            if training:
                counter = module.num_batches_tracked
    return weight, bias, mean, var, counter, training or (mean is None and var is None)


class BatchNorm1d(_FastBatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d by fastbn's kernels, on (N, C) or (N, C, L). Arguments and state are torch's."""


class BatchNorm2d(_FastBatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d by fastbn's kernels, on (N, C, H, W). Arguments and state are torch's."""


class BatchNorm3d(_FastBatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d by fastbn's kernels, on (N, C, D, H, W). Arguments and state are torch's."""


class _BatchNormAct(Scriptable):
    """y = act(bn(x) + residual) in one pass over memory.

    Parameters and buffers have the names of torch.nn's, so that state dicts load in both directions. It is not a
    subclass of torch.nn's batch norms, because tools that replace those would lose the activation.

    Args:
        num_features: C of the input.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for torch.nn's batch norms.
        activation: identity, relu, leaky_relu, relu6, elu, silu, hardswish, gelu (exact), sigmoid or tanh.
        activation_param: negative_slope of leaky_relu (0.01), alpha of elu (1.0).

    Raises:
        TypeError, ValueError: the activation is unknown, or has no parameter and one is given.
    """

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
        activation: str = "relu",
        activation_param: float | None = None,
    ) -> None:
        activations.check(activation, activation_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias and self.affine:
            self.register_parameter("bias", None)
        self.activation = activation
        self.activation_param = activation_param

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        param = "" if self.activation_param is None else f", activation_param={self.activation_param}"
        return f"{super().extra_repr()}, activation={self.activation!r}{param}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(input) + residual). residual: None, or a tensor with the sizes and dtype of input."""
        if is_scripting():
            return self._scripted(input, residual)
        else:
            if isinstance(input, Proxy):
                return leaf_call(self, input, residual)
            self._check_input_dim(input)
            return self._compute(input, residual)

    def _compute(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return batch_norm(
            input, *state_of(self), self.momentum, self.eps, self.activation, self.activation_param, residual
        )

    def _scripted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        z = self._scripted_batch_norm(input)
        if residual is not None:
            z = z + residual
        param = self.activation_param
        return scripted_activation(z, self.activation, None if param is None else float(param))


def doc_on(shape: str, base: type) -> str:
    """The docstring of a subclass of `base` for inputs of this shape."""
    return f"On {shape}: {base.__doc__}"


class BatchNormAct1d(_BatchNormAct):
    __doc__ = doc_on("(N, C) or (N, C, L)", _BatchNormAct)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNormAct2d(_BatchNormAct):
    __doc__ = doc_on("(N, C, H, W)", _BatchNormAct)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNormAct3d(_BatchNormAct):
    __doc__ = doc_on("(N, C, D, H, W)", _BatchNormAct)
    _check_input_dim = nn.BatchNorm3d._check_input_dim
