"""Fold batch norms, in eval mode, into the convolutions or linear layers before them.

y = (W x + b - mean) * scale + bias, scale = weight / sqrt(var + eps), is W' x + b' with W' = W * scale along the output
channels and b' = (b - mean) * scale + bias (Jacob et al. 2018, section 3.2).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arguments import check_memory, check_module
from ..nn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..nn.sync import SyncBatchNorm
from .fusing import fuse, is_fused, unfuse
from .report import Report, keep
from .tracing import graphs, is_plain

_FASTBN = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
# In eval these do not communicate. They accept inputs of any number of dimensions.
_SYNCHRONIZED = (nn.SyncBatchNorm, SyncBatchNorm)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_FASTBN, *_SYNCHRONIZED)

# The batch norm that may follow each layer, and the number of dimensions of the tensor between them.
_PAIRS = {
    nn.Conv1d: ("BatchNorm1d", 3), nn.ConvTranspose1d: ("BatchNorm1d", 3), nn.Linear: ("BatchNorm1d", 2),
    nn.Conv2d: ("BatchNorm2d", 4), nn.ConvTranspose2d: ("BatchNorm2d", 4),
    nn.Conv3d: ("BatchNorm3d", 5), nn.ConvTranspose3d: ("BatchNorm3d", 5),
}  # fmt: skip


class FoldedBatchNorm(nn.Identity):
    """Replaces a batch norm that was folded: returns its input, and raises where folding is not correct."""

    def __init__(self, into: str, dimensions: int, bn: Any) -> None:
        super().__init__()
        self.into, self.dimensions = into, dimensions
        # a model's forward may read these
        self.num_features, self.eps, self.momentum = bn.num_features, bn.eps, bn.momentum
        self.training = False

    def extra_repr(self) -> str:
        return f"into {self.into}"

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(f"this batch norm was folded into {self.into} for inference and cannot be trained")
        if input.dim() != self.dimensions:  # dimension 1 would not be the layer's output channels
            raise ValueError(f"this batch norm was folded into {self.into} for {self.dimensions}D, not {input.dim()}D")
        return input


def fold(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convolution or linear layer before them, in place, for inference.

    It folds torch.nn's and fastbn's batch norms, synchronized ones too, before or after :func:`convert`, fused or not.
    An activation or an add that follows stays. New weights are computed in float64 and stored as new parameters in the
    layer's dtype. The batch norm is replaced by a module that returns its input, so that its keys leave the
    state_dict. `revert` does not undo this: to keep the original, fold ``copy.deepcopy(module)``.

    A batch norm is folded only if torch.fx can trace the forward that calls it, nothing else uses the layer's output,
    and neither of the two is shared, hooked, parametrized or used in another way. ``print(fastbn.report(module))``
    shows what was folded, and why the rest was not. Forwards are traced with the arguments that their callers pass, or
    their defaults, and with the present values of attributes; inputs are assumed to be tensors. Uses that tracing
    cannot see are not considered: a layer of an inner module that an untraceable forward of an outer one calls, or
    that is called by a method other than forward.

    Args:
        module: any module in eval mode.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: it is in training mode.
        RuntimeError: the memory of a batch norm or of such a layer was freed. Nothing is changed then.
    """
    check_module(module, "fold")
    if module.training:
        raise ValueError("fastbn.fold: the module is in training mode, where batch norm cannot be folded; call eval()")
    for name, m in module.named_modules():
        if type(m) in _PAIRS or isinstance(m, nn.modules.batchnorm._BatchNorm):
            check_memory(**{f"{name}.{own}": t for own, t in {**m._parameters, **m._buffers}.items()})
    was_fused = any(map(is_fused, module.modules()))
    unfuse(module)
    folded = {name: m.into for name, m in module.named_modules() if isinstance(m, FoldedBatchNorm)}
    left = {}
    model = _Model(module)
    for node in model.batch_norms():
        name, why = str(node.target), model.objection(node)
        before: Any = node.args[0]
        if why is None:
            layer = before.target
            why = _fold_into(model.modules[layer], model.modules[name])
        if why is None:
            folded[name] = layer
            dimensions = _PAIRS[type(model.modules[layer])][1]
            model.replace(name, FoldedBatchNorm(layer, dimensions, model.modules[name]))
        else:
            left[name] = why
    for name, bn in module.named_modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            left.setdefault(name, model.untraced(bn))
    if was_fused:
        fuse(module)
    swapped = [name for name, m in module.named_modules() if type(m) in _FASTBN]
    keep(module, Report(swapped, {}, folded, left))
    return module


class _Model:
    """The traced forwards of a model, and how often each module and parameter is used."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.names = Counter(self.modules.values())
        self.graphs, self.reasons = graphs(root)
        self.calls = Counter(self.modules[str(n.target)] for g in self.graphs for n in g.nodes if n.op == "call_module")
        self.taken = {id(self._tensor(str(n.target))) for g in self.graphs for n in g.nodes if n.op == "get_attr"}
        self.owners = Counter(id(p) for m in self.names for p in m._parameters.values())

    def _tensor(self, target: str) -> object:
        path, _, name = target.rpartition(".")
        return getattr(self.modules.get(path), name, None)

    def batch_norms(self) -> Iterator[fx.Node]:
        """The first call of each batch norm."""
        seen = set()
        for graph in self.graphs:
            for node in graph.nodes:
                if node.op == "call_module" and type(m := self.modules[str(node.target)]) in _NORMS and m not in seen:
                    seen.add(m)
                    yield node

    def objection(self, node: fx.Node) -> str | None:
        """Why a batch norm cannot be folded, or None."""
        bn: Any = self.modules[str(node.target)]
        before: Any = node.args[0]
        layer = self.modules[before.target] if before.op == "call_module" else None
        if layer is None or type(layer) not in _PAIRS:
            what = f"{before.target} ({type(layer).__name__})" if layer is not None else _name_of(before)
            return f"follows {what}, which has no weights to take it in"
        if type(bn) not in _SYNCHRONIZED and type(bn).__name__ != _PAIRS[type(layer)][0]:
            return f"{type(bn).__name__} does not go with {type(layer).__name__}"
        if len(before.users) != 1:
            return f"the output of {before.target} is used {len(before.users)} times"
        for m, name in ((layer, before.target), (bn, str(node.target))):
            if self.calls[m] != 1 or self.names[m] != 1:
                return f"{name} is used in more than one place"
            if not is_plain(m):
                return f"{name} has hooks, or a forward of its own"
            own = [p for p in (*m._parameters.values(), *m._buffers.values()) if p is not None]
            if any(id(p) in self.taken or self.owners[id(p)] > 1 for p in own):
                return f"{name} shares its parameters"
        if bn.training:
            return "it is in training mode"
        if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
            return "it has no running statistics"
        if len(before.args) != 1 or before.kwargs:
            return f"{before.target} is called with more than its input"
        return None

    def untraced(self, bn: nn.Module) -> str:
        if type(bn) not in _NORMS:
            return f"{type(bn).__name__} is not a class of torch.nn that fastbn stands in for"
        for m, why in self.reasons.items():
            if m is not bn and bn in set(m.modules()):
                return f"{type(m).__name__}: {why}"
        return "no forward that torch.fx traces calls it"

    def replace(self, name: str, new: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.root.get_submodule(parent)._modules[child] = new


def _name_of(node: fx.Node) -> str:
    return "an input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))


@torch.no_grad()
def _fold_into(layer: Any, bn: Any) -> str | None:
    """Give the layer its new weights. Returns why not, if that is not possible; the layer is unchanged then."""
    weight, bias = layer.weight, layer.bias
    if not weight.is_floating_point() or weight.is_meta:
        return f"its layer has {weight.dtype} weights on {weight.device}"
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != bn.num_features:
        return f"it has {bn.num_features} channels, and the layer before it {channels}"
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()
    shift = shift * scale if bn.bias is None else shift * scale + bn.bias.double()
    if transposed:  # the weight is (in, out / groups, ...): input group g computes output group g
        groups = layer.groups
        wide = weight.double().unflatten(0, (groups, -1))
        wide = wide * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        new = wide.flatten(0, 1)
    else:
        new = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    new, shift = new.to(weight.dtype), shift.to(weight.dtype)
    if weight.isfinite().all() and not (new.isfinite().all() and shift.isfinite().all()):
        return f"the folded weights do not fit into {weight.dtype}"
    layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)
    return None
