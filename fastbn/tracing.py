"""In: a module and how it is called. Out: the operations of its forward, and on what that list of them depends.

torch.fx runs a forward once with stand-ins for tensors and writes down what is done to them. Python's own decisions are
frozen in that list: the branch of an `if self.training`, the length of a ModuleList, an argument that was None. So all
that the forward looked at on the way is noted, and a list holds only while all of it looks the same (`Trace.holds`).
What cannot be noted (random numbers, attributes that it changes, autograd or autocast modes that it sets) makes the
module untraceable.
"""

import builtins
import contextlib
import copy
import functools
import importlib
import inspect
import operator
import random
import sys
import types
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._C import _autograd


class Untraceable(Exception):
    """Says why, for a report."""


class _Sign:
    def __init__(self, name):
        self.name = self.__qualname__ = name  # the latter for torch.serialization.add_safe_globals

    def __repr__(self):
        return self.name

    def __reduce__(self):  # one object, in copies and pickles too
        return self.name


TENSOR = _Sign("TENSOR")  # in a call: here comes a tensor
MISSING = _Sign("MISSING")  # there is no such attribute
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OWN = frozenset(nn.Module().__dict__) - {"training"}  # what every module has; its contents are watched otherwise
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)


def original_class(module):
    """The class that a module had before fastbn fused it."""
    return getattr(type(module), "_fastbn_original", type(module))


def is_plain(module):
    """Whether calling the module is calling its class's forward: no hooks, no forward of its own."""
    state = module.__dict__
    return not any(state[h] for h in _HOOKS) and "forward" not in state and state.get("_compiled_call_impl") is None


@dataclass(frozen=True)
class Call:
    """How a module is called: TENSOR in the places of tensors, in tuples, lists and dicts too; all else as it is."""

    args: tuple
    kwargs: tuple  # of (name, value)
    required: int  # from so many positional arguments on, the rest are defaults and need no look

    @classmethod
    def of_node(cls, module, node):
        """From a node of the caller's graph. Raises Untraceable where the arguments do not fit."""

        def stand(value):
            return fx.node.map_aggregate(value, lambda v: TENSOR if isinstance(v, fx.Node) else v)

        return cls._bound(module, _plain(stand(node.args)), _plain(stand(node.kwargs)))

    @classmethod
    def default(cls, module):
        """Tensors for what has no default."""
        kinds = inspect.Parameter
        args, kwargs = [], {}
        for p in list(_signature(module).parameters.values())[1:]:
            if p.default is kinds.empty and p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
                args.append(TENSOR)
            elif p.default is kinds.empty and p.kind is kinds.KEYWORD_ONLY:
                kwargs[p.name] = TENSOR
        return cls._bound(module, tuple(args), kwargs)

    @classmethod
    def _bound(cls, module, args, kwargs):
        try:
            bound = _signature(module).bind(module, *args, **kwargs)
        except TypeError as error:
            raise Untraceable(f"is called with arguments that do not fit: {error}") from error
        bound.apply_defaults()
        args, kwargs = bound.args[1:], bound.kwargs
        parameters = list(_signature(module).parameters.values())[1:]
        required = len(args)
        if kwargs or any(p.kind is p.VAR_POSITIONAL for p in parameters):
            required += 1  # always bind
        else:
            while required and args[required - 1] is parameters[required - 1].default:
                required -= 1
        return cls(args, tuple(kwargs.items()), required)

    def tensors(self, module, args, kwargs):
        """The tensors of a call, in order, or None if it is not a call of this kind."""
        found = []
        if not kwargs and self.required <= len(args) <= len(self.args):
            return found if _match(args, self.args[: len(args)], found) else None
        try:
            bound = _signature(module).bind(module, *args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        matches = _match(bound.args[1:], self.args, found) and _match(bound.kwargs, dict(self.kwargs), found)
        return found if matches else None


def _signature(module):
    return _signature_of(original_class(module).forward)


_signature_of = functools.lru_cache(maxsize=None)(inspect.signature)


def _plain(value):
    """fx's immutable lists and dicts as ordinary ones."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if type(value) is tuple:
        return tuple(_plain(v) for v in value)
    return value


def _match(value, call, found):
    if call is TENSOR:
        found.append(value)
        return isinstance(value, Tensor)
    if type(value) is not type(call):
        return False
    if isinstance(call, (tuple, list)):
        return len(value) == len(call) and all(_match(v, c, found) for v, c in zip(value, call, strict=True))
    if isinstance(call, dict):
        return value.keys() == call.keys() and all(_match(value[k], c, found) for k, c in call.items())
    return value is call or (isinstance(call, _SIMPLE) and value == call)


@contextlib.contextmanager
def _watching(reads):
    """Note what user code asks of modules, and do not let `isinstance` mislead it about stand-ins."""

    def look(module, name):
        # Torch's own code reads what all modules have; what a class adds counts there too (super().forward).
        own = name in object.__getattribute__(module, "__dict__") and name not in _OWN
        if own or not _is_torch(sys._getframe(1)):
            reads[id(module), name] = module
        return object.__getattribute__(module, name)

    def is_instance(value, kind, /, _isinstance=isinstance):
        if type(value) not in (_Value, _Attribute) or _is_torch(sys._getframe(1)):
            return _isinstance(value, kind)
        if type(value) is _Value and value.node.op == "placeholder":
            kinds = kind if type(kind) is tuple else (kind,)
            if not any(type(k) is type(nn.Parameter) for k in kinds):
                return Tensor in kinds or object in kinds  # Call.tensors makes sure that it is one
        raise Untraceable("its forward asks for the type of something that it computed")

    # A property __class__ would be simpler, but torch's C++ asks that too, and would take a stand-in for a tensor.
    # Dynamo knows builtins by identity since its import, which a forward may cause: so that comes first.
    importlib.import_module("torch._dynamo")
    builtins.isinstance, before = is_instance, builtins.isinstance
    nn.Module.__getattribute__ = look
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        builtins.isinstance = before


def _is_torch(frame):
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("torch", "fastbn", "contextlib", "functools", "inspect", "copy")


class _Watched:
    """What a stand-in adds to fx's: in-place operators stay in place, and attributes cannot be set unseen."""

    def __setattr__(self, name, value):
        if not _is_torch(sys._getframe(1)):
            raise Untraceable(f"its forward sets the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __getattr__(self, name):
        return _Attribute(self, name)


def _in_place(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# fx has none of these, so that Python would fall back on `a = a + b`, and nobody would know that a changed.
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
):
    setattr(_Watched, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Value(_Watched, fx.Proxy):
    pass


class _Attribute(_Watched, fx.proxy.Attribute):
    pass


def _modes():
    """What a `with` around an operation can set and a list of operations does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        _autograd._top_saved_tensors_default_hooks(True) is None,
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, call, inlined):
        super().__init__()
        self.call, self.inlined = call, inlined

    def is_leaf_module(self, m, module_qualified_name):
        if m is self.root:
            raise Untraceable("calls itself")
        return m not in self.inlined

    def call_module(self, m, forward, args, kwargs):
        if type(m).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{type(m).__name__} defines __call__")
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        forward, call, count = original_class(self.root).forward, self.call, 0

        def stand(value):
            nonlocal count
            if value is TENSOR:
                count += 1
                return self.create_proxy("placeholder", f"input_{count}", (), {})
            if type(value) in (tuple, list):
                return type(value)(stand(v) for v in value)
            return {k: stand(v) for k, v in value.items()} if type(value) is dict else value

        args, kwargs = stand(call.args), stand(dict(call.kwargs))
        self.modes = _modes()
        return lambda: forward(self.root, *args, **kwargs), []

    def create_node(self, kind, target, *args, **kwargs):
        if kind != "placeholder" and _modes() != self.modes:
            raise Untraceable("its forward changes the autograd or autocast mode on its way")
        return super().create_node(kind, target, *args, **kwargs)

    def proxy(self, node):
        return _Value(node, self)


@dataclass
class Trace:
    """graph: of one forward. inlined: submodules whose forward is part of it, by path. watched: what it depends on."""

    graph: fx.Graph
    watched: list  # of (path, is inlined, names of children or None, [(attribute, value, compare by ==)])

    def holds(self, root):
        """Whether a forward of root would do what the graph says. It runs before every fused forward: keep it fast."""
        return holds(self.watched, root)


def holds(watched, root):
    for path, inlined, children, attributes in watched:
        module = root
        for step in path:
            module = module._modules.get(step)
            if module is None:
                return False
        state = module.__dict__
        if inlined is not None and not (original_class(module) is inlined and is_plain(module)):
            return False
        if children is not None and children != [k for k, v in state["_modules"].items() if v is not None]:
            return False
        for name, value, by_value in attributes:
            now = state.get(name, MISSING)
            if now is MISSING:
                now = state["_modules"].get(name, MISSING)
            if now is not value and not (by_value and type(now) is type(value) and now == value):
                return False
    return True


def trace(module, call, inlined=(), modes=(True, False)):
    """The Traces of a module's forward: one if it is the same in training and eval, else two.

    inlined: paths of submodules to look into; all others are calls in the graph. modes: of training, to look at.
    Raises Untraceable.
    """
    inside = {module.get_submodule(path) for path in inlined}
    traces = []
    for training in modes:
        with _kept(module):
            for m in module.modules():
                m.__dict__["training"] = training
            traces.append(_trace_twice(module, call, inside))
        if not any(name == "training" for _, _, _, attributes in traces[0].watched for name, _, _ in attributes):
            break
    return traces


def _trace_twice(module, call, inside):
    """Once as usual, and once without autograd and with autocast, to see whether the forward asks for those."""
    reads = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _watching(reads), _defaults():
                graph = _Tracer(call, inside).trace(module)
                with _opposites():
                    other = _Tracer(call, inside).trace(module)
        except Untraceable:
            raise
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            raise Untraceable(f"torch.fx does not trace it ({type(error).__name__}: {first[:120]})") from error
    if _text(graph) != _text(other):
        raise Untraceable("its forward depends on the autograd or autocast mode")
    return Trace(graph, _watched(module, inside, reads))


@contextlib.contextmanager
def _defaults():
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def _opposites():
    before = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    with torch.no_grad():
        try:
            for device in ("cpu", "cuda"):
                torch.set_autocast_enabled(device, True)
            yield
        finally:
            for device, enabled in zip(("cpu", "cuda"), before, strict=True):
                torch.set_autocast_enabled(device, enabled)


def _text(graph):
    """A graph in a form that can be compared."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def name(argument):
        return fx.node.map_arg(argument, lambda n: f"%{number[n]}")

    return [(n.op, n.target, repr(name(n.args)), repr(name(n.kwargs))) for n in graph.nodes]


@contextlib.contextmanager
def _kept(module):
    """Put back what a traced forward changes in modules and random generators, and say that it did."""

    def contents(m):
        found = {}
        for name, value in m.__dict__.items():
            if isinstance(value, (list, dict, set)):
                value = (value, copy.copy(value))
            found[name] = value
        return found

    modules = {m: contents(m) for m in module.modules()}
    generators = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    if torch.cuda.is_initialized():
        generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if (numpy := sys.modules.get("numpy")) is not None:
        generators.append((numpy.random.get_state, numpy.random.set_state))
    states = [get() for get, _ in generators]
    complaint = error = None
    try:
        yield
    except Untraceable as raised:
        error = raised
    finally:
        for m, before in modules.items():
            now = m.__dict__
            if not _same(contents(m), before):
                complaint = "its forward changes attributes of modules, or uses tensors that it makes itself"
            for name in set(now) - set(before):
                del now[name]
            for name, value in before.items():
                if type(value) is tuple and len(value) == 2 and isinstance(value[0], (list, dict, set)):
                    value, contents_before = value
                    if not _same_contents(value, contents_before):
                        value.clear()
                        (value.extend if isinstance(value, list) else value.update)(contents_before)
                now[name] = value
        for state, (get, set_state) in zip(states, generators, strict=True):
            if _as_lists(get()) != _as_lists(state):
                complaint = "its forward draws random numbers"
            set_state(state)
    if complaint:  # the more telling of the two
        raise Untraceable(complaint)
    if error is not None:
        raise error


def _as_lists(state):
    if isinstance(state, (list, tuple)):
        return [_as_lists(part) for part in state]
    return state.tolist() if hasattr(state, "tolist") else state


def _same(now, before):
    return now.keys() == before.keys() and all(
        name == "training" or now[name] is value or (
            type(value) is tuple and type(now[name]) is tuple and len(value) == len(now[name]) == 2
            and now[name][0] is value[0] and _same_contents(now[name][1], value[1])
        )
        for name, value in before.items()
    )  # fmt: skip


def _same_contents(now, before):
    if isinstance(before, set):
        return now == before
    if isinstance(before, dict):
        return list(now) == list(before) and all(now[k] is v for k, v in before.items())
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _watched(root, inside, reads):
    paths = {m: name for name, m in root.named_modules()}
    shared = Counter(m for _, m in root.named_modules(remove_duplicate=False))
    attributes, listed = {root: []}, {root, *inside}
    for (_, name), module in reads.items():
        if module not in paths:
            raise Untraceable("its forward looks at a module that is not part of it")
        attributes.setdefault(module, [])
        state = module.__dict__
        if name in state and name not in _OWN:
            value = state[name]
            by_value = _is_simple(value)
            attributes[module].append((name, copy.deepcopy(value) if by_value else value, by_value))
        elif name in ("__dict__", "_parameters", "_buffers"):
            raise Untraceable(f"its forward looks into {name}")
        elif name in ("_modules", "children", "named_children", "modules", "named_modules"):
            listed.update(module.modules())
        elif name in state["_modules"]:
            listed.add(module)
            if shared[state["_modules"][name]] > 1:  # the graph knows only its first name
                attributes[module].append((name, state["_modules"][name], False))
            if isinstance(state["_modules"][name], _CONTAINERS):
                listed.update(_containers(state["_modules"][name]))
        elif name in state["_parameters"] or name in state["_buffers"]:
            if module.__dict__["_parameters"].get(name, state["_buffers"].get(name)) is None:
                raise Untraceable(f"its forward asks for {name}, which is None now and might not stay so")
        elif not hasattr(type(module), name):
            attributes[module].append((name, MISSING, False))
    watched = []
    for module in {*attributes, *listed}:
        inlined = original_class(module) if module in inside else None
        children = [k for k, v in module._modules.items() if v is not None] if module in listed else None
        path = tuple(paths[module].split(".")) if paths[module] else ()
        if path or children or attributes.get(module):
            watched.append((path, inlined, children, attributes.get(module, [])))
    return watched


def _containers(module):
    """A container, and those in it: what a forward can walk through without a trace of the walk."""
    yield module
    for child in module._modules.values():
        if isinstance(child, _CONTAINERS):
            yield from _containers(child)


def _is_simple(value):
    if isinstance(value, (tuple, list)):
        return all(_is_simple(v) for v in value)
    if isinstance(value, dict):
        return all(_is_simple(v) for v in value.values())
    return isinstance(value, (*_SIMPLE, types.FunctionType, types.BuiltinFunctionType, type))
