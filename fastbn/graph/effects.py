"""Which storages a node of a Dynamo graph writes to, and which nodes share a storage.

Dynamo propagates fake tensors through the graph it captures (`node.meta["example_value"]`). Views and results of
in-place operations share the fake storage of their base, so that no table of view operations is needed.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    operator.iconcat, operator.setitem, operator.delitem,
}  # fmt: skip
# Modules whose functions write to no argument, except those that `writes` recognizes.
_KNOWN_MODULES = ("_operator", "operator", "math", "builtins", "torch", "torch.functional", "torch._C._nn")
_KNOWN_PREFIXES = ("torch.nn.functional", "torch._C._special", "torch._C._fft", "torch._C._linalg")


def fake_value(node: fx.Node) -> Tensor | None:
    """The fake tensor that Dynamo computed for a node; None if the value is not a tensor or unknown."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def storages(*nodes: Any) -> set[int]:
    """The fake storages of the values of nodes; arguments that are not nodes are skipped."""
    found = set()
    for node in nodes:
        if isinstance(node, fx.Node):
            values: list[Any] = [node.meta.get("example_value", node.meta.get("val"))]
            while values:
                value = values.pop()
                if isinstance(value, Tensor):
                    found.add(value.untyped_storage()._cdata)
                elif isinstance(value, (tuple, list)):
                    values += value
    return found


def writes(node: fx.Node, batch_norm_buffers: Callable[[fx.Node], Iterable[Any] | None]) -> set[int] | None:
    """The storages that a node may write to; None where that is unknown, or where it changes a global mode.

    batch_norm_buffers: node -> the running statistics that it updates if it is a batch norm, None if it is not.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return set()
    if (buffers := batch_norm_buffers(node)) is not None:
        return storages(*buffers)
    written: list[Any] = [node.kwargs["out"]] if "out" in node.kwargs else []
    first = node.args[:1]
    if node.op == "call_method":
        if str(node.target).endswith("_") and not str(node.target).endswith("__"):
            written += first
        return storages(*written)
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        marked = {a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        return storages(*(value for name, value in given.items() if name in marked))
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or "torch"
    if name.startswith("_") or not (module in _KNOWN_MODULES or module.startswith(_KNOWN_PREFIXES)):
        return None
    # A positional True may be `inplace`. If it is something else, a possible match is missed, and nothing breaks.
    if target in _IN_PLACE_OPERATORS or name.endswith("_") or node.kwargs.get("inplace") or any(
        a is True for a in node.args
    ):  # fmt: skip
        written += first
    return storages(*written)


def between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes after start and before end."""
    node = start.next
    while node is not end:
        yield node
        node = node.next
