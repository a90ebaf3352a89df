"""In: the graph of a forward. Out: where batch norm, an add and an activation follow one another and nobody else looks.

A `Site` takes their place in the graph. When it is called it looks again, at the modules and tensors that are there
now, and does what the original did, one operation after the other, wherever the fused operation would not be the same.
"""

import operator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .autograd import batch_norm
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _state_of
from .tracing import is_plain

TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)

# Exact classes: a subclass may do anything. The second is the attribute that holds the parameter.
_MODULES = {
    nn.ReLU: ("relu", None), nn.LeakyReLU: ("leaky_relu", "negative_slope"), nn.ReLU6: ("relu6", None),
    nn.ELU: ("elu", "alpha"), nn.SiLU: ("silu", None), nn.Hardswish: ("hardswish", None), nn.GELU: ("gelu", None),
    nn.Sigmoid: ("sigmoid", None), nn.Tanh: ("tanh", None),
}  # fmt: skip

# The function, or the method of tensors: the activation, and the arguments after the input.
_PLAIN, _IN_PLACE = (), ("inplace",)
_FUNCTIONS = {
    F.relu: ("relu", _IN_PLACE), torch.relu: ("relu", _PLAIN), torch.relu_: ("relu", _PLAIN),
    "relu": ("relu", _PLAIN), "relu_": ("relu", _PLAIN),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")), F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.relu6: ("relu6", _IN_PLACE), F.elu: ("elu", ("alpha", "inplace")), F.elu_: ("elu", ("alpha",)),
    F.silu: ("silu", _IN_PLACE), F.hardswish: ("hardswish", _IN_PLACE), F.gelu: ("gelu", ("approximate",)),
    F.sigmoid: ("sigmoid", _PLAIN), torch.sigmoid: ("sigmoid", _PLAIN), torch.sigmoid_: ("sigmoid", _PLAIN),
    "sigmoid": ("sigmoid", _PLAIN), "sigmoid_": ("sigmoid", _PLAIN),
    F.tanh: ("tanh", _PLAIN), torch.tanh: ("tanh", _PLAIN), torch.tanh_: ("tanh", _PLAIN),
    "tanh": ("tanh", _PLAIN), "tanh_": ("tanh", _PLAIN),
}  # fmt: skip

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def activation_of(module):
    """(name, parameter) of an activation module, or None if it is none of ours as it is now."""
    row = _MODULES.get(type(module))
    if row is None or not is_plain(module) or (row[0] == "gelu" and module.approximate != "none"):
        return None
    if row[1] is None:
        return row[0], None
    param = getattr(module, row[1])
    return (row[0], param) if isinstance(param, (int, float)) else None


class Site:
    """act(bn(input) + residual) in the place of a batch norm, an add and an activation.

    name: of the activation, "" where a module tells. call: the activation's function and its other arguments.
    add: the function that adds, and whether the residual comes first.
    """

    __module__ = __name__  # torch.fx asks for these of what it is to call

    def __init__(self, name="", param=None, call=None, add=None):
        self.name, self.param, self.call, self.add = name, param, call, add
        self.__name__ = "batch_norm_site"

    def __call__(self, bn, act, input, residual=None, *between):
        found = (self.name, self.param) if act is None else activation_of(act)
        if (
            found is None
            or type(bn) not in OURS
            or not is_plain(bn)
            or type(input) not in _TENSORS
            or not all(map(_is_identity, between))
            or (residual is not None and not self._is_alike(input, residual))
        ):
            return self._one_by_one(bn, act, input, residual, between)
        bn._check_input_dim(input)
        return batch_norm(input, *_state_of(bn), bn.momentum, bn.eps, *found, residual)

    def _is_alike(self, input, residual):
        """Whether the sum has input's sizes, dtype and strides, without broadcasting or promotion."""
        return (
            type(residual) in _TENSORS
            and residual.shape == input.shape
            and residual.dtype == input.dtype
            and residual.device == input.device
            and (not self.add[1] or residual.stride() == input.stride())
        )

    def _one_by_one(self, bn, act, input, residual, between):
        z = bn(input)
        for module in between:
            z = module(z)
        if self.add is not None:
            function, residual_first = self.add
            operands = (residual, z) if residual_first else (z, residual)
            z = _call(function, *operands)
        if act is not None:
            return act(z)
        return z if self.call is None else _call(self.call[0], z, *self.call[1], **self.call[2])


def _is_identity(module):
    return type(module) is nn.Identity and is_plain(module)


OTHER_OPERAND = "the sum it goes into is fused with the batch norm of the other operand"
_TENSORS = (Tensor, nn.Parameter)


def _call(function, first, *args, **kwargs):
    if isinstance(function, str):
        return getattr(first, function)(*args, **kwargs)
    return function(first, *args, **kwargs)


@dataclass
class Match:
    """A batch norm and what follows it, as nodes of a graph."""

    bn: fx.Node
    add: fx.Node | None
    residual: fx.Node | None
    act: fx.Node | None
    name: str  # of the activation
    param: float | None
    between: tuple = ()  # nn.Identity after the batch norm

    def __str__(self):
        follow = [] if self.add is None else ["add"]
        if self.name != "identity":
            follow.append(self.name)
        return " + ".join(["batch_norm", *follow])


def is_batch_norm(node, modules, classes=(*TORCHS, *OURS)):
    return (
        node.op == "call_module"
        and type(modules.get(node.target)) in classes
        and len(node.args) == 1
        and isinstance(node.args[0], fx.Node)
        and not node.kwargs
    )


def find(graph, modules):
    """The Matches in a graph, and [(batch norm's node, why there is none)] for the others.

    modules: the submodules by path.
    """
    matches, others, taken = [], [], set()
    nodes = [node for node in graph.nodes if is_batch_norm(node, modules)]
    for node in nodes:
        found = _follow(node, modules, taken)
        if isinstance(found, Match):
            matches.append(found)
            taken.update(n for n in (found.add, found.act) if n is not None)
        else:
            others.append((node, found))
    return matches, others


def _follow(bn, modules, taken):
    if not is_plain(modules[bn.target]):
        return "it has hooks, or a forward of its own"
    end, between, user = bn, [], only_user(bn)
    while isinstance(user, fx.Node) and user.op == "call_module" and _is_identity(modules[user.target]):
        between.append(user)
        end, user = user, only_user(user)
    if isinstance(user, str):
        return user
    if (act := activation(user, end, modules)) is not None:
        return Match(bn, None, None, user, *act, tuple(between))
    if user in taken:
        return OTHER_OPERAND
    if not is_addition(user):
        return f"followed by {describe(user, modules)}"
    residual = user.args[1] if user.args[0] is end else user.args[0]
    if not isinstance(residual, fx.Node) or residual is end:
        return "added to itself or to a number"
    why = _changes_residual(user, bn, residual, modules) or _is_early(user, bn, modules)
    if why:
        return why
    after = only_user(user)
    act = None if isinstance(after, str) else activation(after, user, modules)
    if act is None:
        return Match(bn, user, residual, None, "identity", None, tuple(between))
    return Match(bn, user, residual, after, *act, tuple(between))


def only_user(node):
    users = list(node.users)
    if len(users) != 1:
        return f"its output is used {len(users)} times" if users else "its output is not used"
    return "its output is returned" if users[0].op == "output" else users[0]


def activation(node, input, modules):
    """(name, parameter) if the node is an activation of input and nothing else."""
    if node.op == "call_module":
        found = activation_of(modules.get(node.target))
        return found if node.args == (input,) and not node.kwargs else None
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS or node.args[:1] != (input,):
        return None
    name, parameters = _FUNCTIONS[node.target]
    given = dict(zip(parameters, node.args[1:], strict=False)) | dict(node.kwargs)
    if len(node.args) - 1 > len(parameters) or not given.keys() <= set(parameters):
        return None
    if given.get("approximate", "none") != "none" or not isinstance(given.get("inplace", False), bool):
        return None
    param = given.get("negative_slope", given.get("alpha"))
    return (name, param) if param is None or isinstance(param, Real) else None


def is_addition(node):
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDITIONS
        and len(node.args) == 2
        and all(k == "alpha" and type(v) is int and v == 1 for k, v in node.kwargs.items())
    )


def _changes_residual(add, bn, residual, modules):
    """residual += bn(x) changes a tensor that someone else may look at."""
    if add.target in (operator.iadd, "add_") and add.args[0] is residual:
        if not _is_new(residual, modules):
            return "added in place to a tensor that may be used elsewhere"
        if len(residual.users) != 1:
            return "added in place to a tensor that is used elsewhere"
    return None


def _is_early(add, bn, modules):
    """The batch norm is to run where the add is: what lies between must not change its input, nor its state."""
    node, input = bn.next, bn.args[0]
    safe = _is_new(input, modules) and len(input.users) == 1
    own = {id(t) for t in (*modules[bn.target].parameters(), *modules[bn.target].buffers())}
    while node is not add:
        if not safe and not _is_pure(node, modules):
            return f"{describe(node, modules)} comes before the add, and may change its input"
        if node.op == "call_module":
            inside = modules[node.target]
            tensors = (*inside.parameters(), *inside.buffers())
        else:
            tensors = (tensor_at(node.target, modules),) if node.op == "get_attr" else ()
        if any(id(t) in own for t in tensors):
            return "its statistics or parameters are used again before the add"
        node = node.next
    return None


def tensor_at(target, modules):
    path, _, name = target.rpartition(".")
    return getattr(modules.get(path), name, None)


def _is_new(node, modules):
    """Whether the value is a tensor that nothing else can be a view of."""
    module = modules.get(node.target) if node.op == "call_module" else None
    while type(module) is nn.Sequential and len(module) and is_plain(module):
        module = module[-1]
    return type(module) in (*_CONVOLUTIONS, *TORCHS, *OURS) and is_plain(module)


def _is_pure(node, modules):
    """Whether it is known that a node changes none of the tensors that it is given."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        return all(map(_is_pure_module, modules[node.target].modules()))
    if any(a is True for a in node.args) or "out" in node.kwargs or node.kwargs.get("inplace", False):
        return False
    if node.op == "call_method":
        return not node.target.endswith("_")
    name, home = node.target.__name__, getattr(node.target, "__module__", None) or "torch"
    if home == "_operator":
        return name in ("add", "sub", "mul", "truediv", "floordiv", "neg", "getitem", "matmul", "pow", "mod")
    return home.partition(".")[0] in ("torch", "builtins") and not name.endswith("_") and "norm" not in name


def _is_pure_module(module):
    known = type(module).__module__.startswith("torch.nn.modules.") or type(module) in OURS
    return known and is_plain(module) and not getattr(module, "inplace", False)


def describe(node, modules):
    """A node in words, for a report."""
    if node.op == "call_module":
        module = modules[node.target]
        hooks = "" if is_plain(module) else ", which has hooks"
        return f"{node.target} ({type(module).__name__}{hooks})"
    return "an input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))


def replace(graph, matches):
    """Put a Site in the place of each match, in the graph."""
    for i, m in enumerate(matches):
        last = m.act if m.act is not None else m.add
        from_module = m.act is not None and m.act.op == "call_module"
        call = None
        if m.act is not None and not from_module:
            call = (m.act.target, m.act.args[1:], dict(m.act.kwargs))
        add = None if m.add is None else (m.add.target, m.add.args[0] is m.residual)
        site = Site("" if from_module else m.name, None if from_module else m.param, call, add)
        site.__name__ = f"batch_norm_site_{i}"
        # Without an add, nothing has to move but the activation, which only reads what the batch norm made.
        with graph.inserting_before(m.bn if m.add is None else m.add):
            bn = graph.create_node("get_attr", m.bn.target)
            act = graph.create_node("get_attr", m.act.target) if from_module else None
            between = [graph.create_node("get_attr", node.target) for node in m.between]
            new = graph.create_node("call_function", site, (bn, act, m.bn.args[0], m.residual, *between))
        last.replace_all_uses_with(new)
        for node in (m.act, m.add, *reversed(m.between), m.bn):
            if node is not None:
                graph.erase_node(node)
