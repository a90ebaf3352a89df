"""The forwards of a model as torch.fx graphs of module calls, for `fastbn.fold`, which has no example inputs."""

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_lock = threading.Lock()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Untraceable(Exception):
    """A forward cannot be traced; the message says why, for the report."""


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module only calls the forward of its class: no hooks, no forward assigned to the instance."""
    state = module.__dict__
    return not any(state[h] for h in _HOOKS) and "forward" not in state and state.get("_compiled_call_impl") is None


def graphs(root: nn.Module) -> tuple[list[fx.Graph], dict[nn.Module, str]]:
    """Trace every forward of root and of its submodules once.

    The targets of call_module nodes are names of modules in root. A module outside torch.nn is traced as a part of its
    caller's graph. Where the caller cannot be traced, it gets a graph of its own, with the defaults of its arguments.
    Attributes have their present values. Forwards run on a copy that shares the tensors, so that attributes that they
    assign do not change in root.

    Returns:
        The graphs, and for each module that was not traced the reason.
    """
    found: list[fx.Graph] = []
    reasons: dict[nn.Module, str] = {}
    waiting = [""]
    while waiting:
        name = waiting.pop()
        module = root.get_submodule(name)
        if not any(isinstance(m, _BatchNorm) for m in module.modules()):
            continue
        try:
            graph = _trace(module)
        except Untraceable as error:
            reasons[module] = str(error)
            waiting += [f"{name}.{child}".strip(".") for child, m in module.named_children()]
            continue
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = f"{name}.{node.target}".strip(".")
            if node.op == "call_module" and _has_graph(child := root.get_submodule(node.target)):
                waiting.append(node.target)
                if not is_plain(child):
                    reasons[child] = "it has hooks, or a forward of its own"
        found.append(graph)
    return found, reasons


def _has_graph(module: nn.Module) -> bool:
    """Whether a module, called by a single node of its caller's graph, has a forward that is traced separately."""
    return type(module) is nn.Sequential or not type(module).__module__.startswith(("torch.", "fastbn."))


def _trace(module: nn.Module) -> fx.Graph:
    if isinstance(module, _BatchNorm) or type(module).forward is nn.Module.forward:
        raise Untraceable("no forward that torch.fx traces calls it")
    if "forward" in module.__dict__:
        raise Untraceable("it has a forward of its own")
    held = (v for m in module.modules() for d in (m._parameters, m._buffers, m.__dict__) for v in d.values())
    tensors = {id(t): t for t in held if isinstance(t, Tensor)}
    try:
        twin = copy.deepcopy(module, tensors)
        defaults = {
            p.name: p.default for p in inspect.signature(twin.forward).parameters.values() if p.default is not p.empty
        }
        with _lock, _isinstance_of_proxies(twin):
            graph = _Tracer().trace(twin, defaults)
        if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in graph.nodes):
            raise Untraceable("its forward computes with tensors that torch.fx does not see, such as parameters()")
        return graph
    except Untraceable:
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise Untraceable(f"torch.fx does not trace it ({type(error).__name__}: {first[:120]})") from error


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{type(m).__name__} defines __call__")
        return not _has_graph(m) or not is_plain(m)


@contextlib.contextmanager
def _isinstance_of_proxies(root: nn.Module) -> Iterator[None]:
    """In the forwards of root, let isinstance say that the proxy of an input is a Tensor.

    For this the modules (in Python's sense) that define the forwards get a global `isinstance` meanwhile, as torch.fx
    itself patches other globals.
    """

    def is_instance(value: Any, kind: Any) -> bool:
        if not isinstance(value, fx.Proxy):
            return isinstance(value, kind)
        if value.node.op != "placeholder":
            raise Untraceable("its forward asks for the type of something that it computed")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        return Tensor in kinds or object in kinds

    scopes = [getattr(type(m).forward, "__globals__", {}) for m in root.modules() if _has_graph(m)]
    changed = [s for i, s in enumerate(scopes) if "isinstance" not in s and all(s is not t for t in scopes[:i])]
    for scope in changed:
        scope["isinstance"] = is_instance
    try:
        yield
    finally:
        for scope in changed:
            if scope.get("isinstance") is is_instance:
                del scope["isinstance"]
