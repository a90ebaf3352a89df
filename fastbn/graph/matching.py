"""Pattern matcher: finds batch norms with the residual add and the activation that follow, in a graph of Dynamo.

In such a graph modules are inlined, parameters and buffers are placeholders, and every node has the fake tensor of its
value. A match is replaced by one call of `fused_batch_norm`, with the activation and the residual as arguments.
"""

import inspect
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .. import ops
from ..autograd import batch_norm
from ..checkpointing import is_repeated
from .effects import between, fake_value, storages, writes

# function or tensor method -> the activation, and the names of the parameters after its input.
_PLAIN, _IN_PLACE = (), ("inplace",)
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", _IN_PLACE), torch.relu: ("relu", _PLAIN), torch.relu_: ("relu", _PLAIN),
    "relu": ("relu", _PLAIN), "relu_": ("relu", _PLAIN),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")), F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.relu6: ("relu6", _IN_PLACE), F.hardtanh: ("relu6", ("min_val", "max_val", "inplace")),
    F.elu: ("elu", ("alpha", "inplace")), F.elu_: ("elu", ("alpha",)),
    F.silu: ("silu", _IN_PLACE), F.hardswish: ("hardswish", _IN_PLACE), F.gelu: ("gelu", ("approximate",)),
    F.sigmoid: ("sigmoid", _PLAIN), torch.sigmoid: ("sigmoid", _PLAIN), torch.sigmoid_: ("sigmoid", _PLAIN),
    "sigmoid": ("sigmoid", _PLAIN), "sigmoid_": ("sigmoid", _PLAIN),
    F.tanh: ("tanh", _PLAIN), torch.tanh: ("tanh", _PLAIN), torch.tanh_: ("tanh", _PLAIN),
    "tanh": ("tanh", _PLAIN), "tanh_": ("tanh", _PLAIN),
}  # fmt: skip
# Activations whose backward pass reads a bit mask, not the residual.
_MASKED = ("relu", "leaky_relu", "relu6")
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SIGNATURE = inspect.signature(batch_norm)
_SIGNATURES = {F.batch_norm: inspect.signature(F.batch_norm), batch_norm: _SIGNATURE, ops.batch_norm: _SIGNATURE}


def fused_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    *rest: Any,
) -> Tensor:
    """`fastbn.autograd.batch_norm` for captured graphs: checks `fastbn.update_stats_once` when the graph runs."""
    if training and is_repeated():
        running_mean = running_var = num_batches_tracked = None
    return batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, training, *rest)


_OTHER_MODE = "the autograd or autocast mode changes behind it"
_OTHER_OPERAND = "the sum it goes into is fused with the batch norm of the other operand"


def call_of(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a batch norm by the parameter names of `fastbn.autograd.batch_norm`; None for other nodes."""
    if node.op != "call_function" or node.target not in _SIGNATURES:
        return None
    bound = _SIGNATURES[node.target].bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    extra = {"num_batches_tracked": None, "activation": "identity", "activation_param": None, "residual": None}
    return extra | bound.arguments


def _buffers(node: fx.Node) -> tuple[Any, ...] | None:
    """The running statistics and the counter that a batch norm updates; None for other nodes."""
    call = call_of(node)
    if call is None:
        return None
    names = ("running_mean", "running_var", "num_batches_tracked")
    return tuple(call[name] for name in names) if call["training"] else ()


@dataclass
class Match:
    """A batch norm with the nodes that are fused into it.

    Attributes:
        early: the fused call is inserted at the batch norm, not at the add.
    """

    bn: fx.Node
    add: fx.Node | None = None
    act: fx.Node | None = None
    activation: str = "identity"
    param: float | None = None
    early: bool = True

    def __str__(self) -> str:
        follow = ["add"] if self.add is not None else []
        if self.activation != "identity":
            follow.append(self.activation)
        return " + ".join(["batch_norm", *follow])


def find(graph: fx.Graph) -> list[tuple[fx.Node, Match | str]]:
    """Every batch norm of the graph in order, with its Match or the reason why there is none.

    Batch norms with arguments that fastbn's kernels do not support are left out.
    """
    found: list[tuple[fx.Node, Match | str]] = []
    taken: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _is_supported(node):
            continue
        result = _follow(node, order, taken)
        if isinstance(result, Match):
            taken.update(n for n in (result.add, result.act) if n is not None)
        found.append((node, result))
    return found


def _is_supported(node: fx.Node) -> bool:
    """Whether a node is a batch norm of a plain floating point tensor on a device that fastbn has kernels for."""
    call = call_of(node)
    if call is None or not isinstance(call["training"], bool) or not isinstance(call["input"], fx.Node):
        return False
    input, output = fake_value(call["input"]), fake_value(node)
    return (
        input is not None and output is not None and type(input) is type(output) and input.layout == torch.strided
        and input.is_floating_point() and input.device.type in ops.DEVICES and input.dim() >= 2
    )  # fmt: skip


def _follow(bn: fx.Node, order: dict[fx.Node, int], taken: set[fx.Node]) -> Match | str:
    call = call_of(bn)
    assert call is not None
    if call["activation"] != "identity":
        return "it has an activation already"
    user = _only_user(bn)
    if isinstance(user, str):
        return user
    if (act := _activation(user, bn)) is not None:
        return Match(bn, None, user, *act) if _same_modes(bn, user) else _OTHER_MODE
    if user in taken:
        return _OTHER_OPERAND
    if not _is_addition(user):
        return f"followed by {describe(user)}"
    if call["residual"] is not None:
        return "it has a residual already"
    residual: Any = user.args[1] if user.args[0] is bn else user.args[0]
    why = _objection_to_residual(bn, user, residual, order)
    if why is not None:
        return why
    early = order[residual] < order[bn] and not _is_written(residual, bn, user)
    if not early and (why := _objection_to_moving(bn, call, user)) is not None:
        return why
    after = _only_user(user)
    if isinstance(after, str) or (act := _activation(after, user)) is None or not _same_modes(user, after):
        return Match(bn, user, early=early)
    if act[0] not in _MASKED and _is_written_later(residual, user):
        return Match(bn, user, early=early)
    return Match(bn, user, after, *act, early=early)


def _only_user(node: fx.Node) -> fx.Node | str:
    users = list(node.users)
    if len(users) != 1:
        return f"its output is used {len(users)} times" if users else "its output is not used"
    return "its output is returned" if users[0].op == "output" else users[0]


def _activation(node: fx.Node, input: fx.Node) -> tuple[str, float | None] | None:
    """Name and parameter if the node applies an activation to input and does nothing else."""
    if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS or node.args[:1] != (input,):
        return None
    name, parameters = _ACTIVATIONS[node.target]
    given: dict[str, Any] = dict(zip(parameters, node.args[1:], strict=False)) | dict(node.kwargs)
    if len(node.args) - 1 > len(parameters) or not given.keys() <= set(parameters):
        return None
    if given.get("approximate", "none") != "none" or not isinstance(given.get("inplace", False), bool):
        return None
    if node.target is F.hardtanh and (given.get("min_val", -1.0), given.get("max_val", 1.0)) != (0, 6):
        return None  # nn.ReLU6 calls it with these
    param = given.get("negative_slope", given.get("alpha"))
    is_number = param is None or isinstance(param, Real)
    return (name, param) if is_number else None


def _is_addition(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDITIONS
        and len(node.args) == 2
        and all(k == "alpha" and type(v) is int and v == 1 for k, v in node.kwargs.items())
    )


def _objection_to_residual(bn: fx.Node, add: fx.Node, residual: Any, order: dict[fx.Node, int]) -> str | None:
    """Why the other operand of an add cannot be passed as the residual; None if it can."""
    if not isinstance(residual, fx.Node) or residual is bn:
        return "added to itself or to a number"
    z, other, total = fake_value(bn), fake_value(residual), fake_value(add)
    if z is None or other is None or total is None or type(other) is not type(z):
        return "added to what is no plain tensor"
    if (other.dtype, other.device) != (z.dtype, z.device) or not _same_numbers(other.shape, z.shape):
        return "added to a tensor of another size, dtype or device"
    if not _same_numbers(total.stride(), z.stride()):
        return "the sum has other strides"
    if add.target in (operator.iadd, "add_") and add.args[0] is residual:
        mine = storages(residual)
        if any(node.op == "placeholder" and storages(node) & mine for node in order):
            return "added in place to a tensor that may be used elsewhere"
        readers = [node for node in order if order[node] > order[add]]
        if any(order[i] < order[add] and storages(i) & mine for node in readers for i in node.all_input_nodes):
            return "added in place to a tensor that is used elsewhere"
    return None


def _same_numbers(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _same_modes(start: fx.Node, end: fx.Node) -> bool:
    """Whether no node between the two changes an autograd or autocast mode; such nodes call private functions."""
    return not any(
        n.op == "call_function" and getattr(n.target, "__name__", "").startswith("_") for n in between(start, end)
    )


def _is_written_later(residual: fx.Node, add: fx.Node) -> bool:
    """Whether the residual may be written to after the add.

    The fused operation saves it for backward, where it recomputes the input of the activation; the add does not.
    """
    mine, node = storages(residual), add.next
    while node.op != "output":
        written = writes(node, _buffers)
        if (storages(*node.all_input_nodes) if written is None else written) & mine:
            return True
        node = node.next
    return False


def _is_written(tensor: fx.Node, start: fx.Node, end: fx.Node) -> bool:
    mine = storages(tensor)
    return any((w := writes(node, _buffers)) is None or w & mine for node in between(start, end))


def _objection_to_moving(bn: fx.Node, call: dict[str, Any], add: fx.Node) -> str | None:
    """Why batch norm cannot be moved to the add; None if it can.

    Nodes between the two must not write to its operands, nor read or write its running statistics.
    """
    state = storages(call["running_mean"], call["running_var"], call["num_batches_tracked"])
    operands = storages(call["input"], call["weight"], call["bias"]) | state
    for node in between(bn, add):
        written = writes(node, _buffers)
        if written is None or written & operands:
            return f"{describe(node)} comes before the add, and may change its input"
        if any(storages(i) & state for i in node.all_input_nodes):
            return "its statistics are used again before the add"
    return None


def describe(node: fx.Node) -> str:
    """A node for a report: the module that called it, or the name of its function."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "placeholder":
        return "an input"
    if stack and getattr(stack[-1][1], "__module__", "").startswith(("torch.nn.", "fastbn.")):
        return f"{module_name(stack[-1][0])} ({stack[-1][1].__name__})"
    return name


def module_name(source: str) -> str:
    """The name in named_modules of a module that Dynamo names L['self'].layer1[0].bn, L['fn'].0.bn or similarly."""
    path = source.partition("]")[2] if source.startswith("L[") else source
    for old, new in (("._modules['", "."), (".__dict__['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.strip(".")


def replace(graph: fx.Graph, found: list[tuple[fx.Node, Match | str]]) -> None:
    """Replace each match, and each torch batch norm without one, by a call of `fused_batch_norm`.

    Matches may use each other's results, in any order: operands are read from the graph when a match is replaced. The
    graph is checked afterwards (`graph.lint`).
    """
    for node, result in found:
        match = result if isinstance(result, Match) else Match(node)
        call = call_of(node)
        assert call is not None
        if match.add is not None:
            call["residual"] = match.add.args[1] if match.add.args[0] is node else match.add.args[0]
        if match.act is not None:
            call["activation"], call["activation_param"] = match.activation, match.param
        last = match.act or match.add or match.bn
        with graph.inserting_before(match.bn if match.early else match.add):
            new = graph.call_function(fused_batch_norm, tuple(call[name] for name in _SIGNATURE.parameters))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for old in (match.act, match.add, match.bn):
            if old is not None:
                graph.erase_node(old)
    graph.lint()
