"""In: a model whose batch norms are fastbn's. Out: the same modules, where some forwards run fused operations.

Nothing moves in the tree: a module that calls a batch norm and an activation gets a subclass of its own class, whose
forward is the traced one with `Site`s in it. Where what the trace depends on has changed (`tracing.holds`), and under
anything that records operations itself (torch.compile, torch.export, torch.jit.trace, torch.fx), the class's own
forward runs, with all modules as they were.
"""

import abc
import copy
import copyreg
import functools
import pickle
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from . import patterns
from .scripting import scripted_as
from .tracing import Call, Untraceable, holds, is_plain, original_class, trace

_ATTRIBUTE = "_fastbn_fusion"


@dataclass
class Fusion:
    """What a fused module keeps. call: how it is to be called, or None if it could not be pickled. variants: (what it
    depends on, a forward), or None in a pickle."""

    call: Call | None
    inlined: tuple
    sites: list  # of (path of the batch norm, pattern), to print
    variants: list | None = None

    def __getstate__(self):  # functions made at run time cannot be pickled, and what they depend on may be gone
        try:
            pickle.dumps(self.call)
        except Exception:  # a default argument that is a lambda, for one: the copy runs its own forward
            return {**self.__dict__, "call": None, "variants": []}
        return {**self.__dict__, "variants": None}

    def __deepcopy__(self, memo):
        watched = None if self.variants is None else [(copy.deepcopy(w, memo), f) for w, f in self.variants]
        return Fusion(self.call, self.inlined, self.sites, watched)

    def forward_for(self, module, args, kwargs):
        """The forward to run and its tensors, or None."""
        tensors = None if not self.variants else self.call.tensors(module, args, kwargs)
        if tensors is None:
            return None
        for watched, forward in self.variants:
            if holds(watched, module):
                return forward, tensors
        return None


def _rebuilt(fusion, module):
    try:
        return _variants(trace(module, fusion.call, fusion.inlined), module)[0]
    except Untraceable:
        return []


def _variants(traces, module):
    """[(watched, forward)], [(batch norm, pattern)] of all traces, and [(batch norm, why it has none)]."""
    modules = dict(module.named_modules(remove_duplicate=False))
    variants, matches, others = [], {}, []
    for mode, t in zip(("training", "eval"), traces, strict=False):
        found, rest = patterns.find(t.graph, modules)
        for m in found:
            matches.setdefault((m.bn.target, str(m)), {})[mode] = True
        others += [(node.target, why) for node, why in rest]
        patterns.replace(t.graph, found)
        variants.append((t.watched, _compiled(t.graph)))
    sites = [
        (name, what if len(modes) == len(traces) else f"{what} ({next(iter(modes))} only)")
        for (name, what), modes in matches.items()
    ]
    return variants, sites, others


def _compiled(graph):
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fastbn fused forward>", "exec"), scope)
    return scope["forward"]


@functools.cache
def _fused_class(cls):
    """A subclass that cannot be told from cls, but for the forward, the repr, and pickles that do not name it."""

    def forward(self, *args, **kwargs):
        fusion = self.__dict__.get(_ATTRIBUTE)
        if fusion is not None and not _is_recorded() and not _torch_module._has_any_global_hook():
            found = fusion.forward_for(self, args, kwargs)
            if found is not None:
                return found[0](self, *found[1])
        return cls.forward(self, *args, **kwargs)

    def extra_repr(self):
        own, fusion = cls.extra_repr(self), self.__dict__.get(_ATTRIBUTE)
        sites = "" if fusion is None else "fused: " + "; ".join(f"{name} = {what}" for name, what in fusion.sites)
        return "\n".join(filter(None, (own, sites)))

    def reduce(self, protocol):
        make, args, *rest = super(fused, self).__reduce_ex__(max(protocol, 2))
        return _remake, (cls, *args[1:]), *rest

    names = {
        "forward": scripted_as(forward, cls.forward),
        "extra_repr": extra_repr,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fastbn_original": cls,
    }
    fused = type(cls)(cls.__name__, (cls,), names)
    return fused


def _remake(cls, *args):
    """What a pickle of a fused module begins with: an instance of its own class, which its state makes a fused one.

    Fused classes have no names to be found by. torch.load(weights_only=True) gives a state only to instances of classes
    that it was told of, and to those by the ``__setstate__`` that they have, be it their own.
    """
    module = copyreg.__newobj__(cls, *args)
    module.__dict__["__setstate__"] = functools.partial(_restore, module)
    return module


def _restore(module, state):
    del module.__dict__["__setstate__"]
    cls = original_class(module)
    cls.__setstate__(module, state)
    module.__class__ = _fused_class(cls)
    fusion = module.__dict__.get(_ATTRIBUTE)
    if fusion is not None and fusion.variants is None:  # not later: a forward may run in a thread among others
        fusion.variants = _rebuilt(fusion, module)


def _is_recorded():
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _objection(cls):
    """Why a class cannot have a subclass that nobody notices, or None."""
    if type(cls) not in (type, abc.ABCMeta):
        return f"{cls.__name__} has a metaclass"
    for name in ("__reduce_ex__", "__reduce__", "__deepcopy__", "__copy__", "__init_subclass__"):
        if any(name in vars(base) for base in cls.__mro__[:-1]):
            return f"{cls.__name__} defines {name}"
    return None


def is_fused(module):
    return "_fastbn_original" in type(module).__dict__


def unfuse(root):
    for module in root.modules():
        if is_fused(module):
            module.__class__ = original_class(module)
            module.__dict__.pop(_ATTRIBUTE, None)


def _has_forward(module):
    """Whether the module's forward is someone's own, or that of a Sequential: worth to look into."""
    cls = original_class(module)
    if isinstance(module, torch.jit.ScriptModule) or cls.forward is nn.Module.forward:
        return False
    return cls is nn.Sequential or not cls.__module__.startswith(("torch.", "fastbn."))


@dataclass
class Analysis:
    """All forwards of a model that call batch norms.

    calls: how each module is called by those that contain it. traces: of each, without looking into others.
    reasons: why a module could not be traced. ends: why batch norms at the end of submodules stay there.
    """

    root: nn.Module
    modes: tuple = (True, False)
    calls: dict = field(default_factory=dict)
    traces: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)
    ambiguous: set = field(default_factory=set)
    ends: dict = field(default_factory=dict)

    def __post_init__(self):
        for module in self.root.modules():  # who calls comes before who is called
            if not _has_forward(module) or not any(isinstance(m, _BatchNorm) for m in module.modules()):
                continue
            try:
                self._look_at(module)
            except Untraceable as error:
                self.reasons[module] = str(error)

    def _look_at(self, module):
        if not is_plain(module) and "forward" in module.__dict__:
            raise Untraceable("it has a forward of its own")
        if module in self.ambiguous:
            raise Untraceable("it is called in different ways")
        self.calls.setdefault(module, Call.default(module))
        traces = trace(module, self.calls[module], modes=self.modes)
        for t in traces:
            for node in t.graph.nodes:
                if node.op != "call_module":
                    continue
                child = module.get_submodule(node.target)
                if not _has_forward(child):
                    continue
                try:
                    call = Call.of_node(child, node)
                except Untraceable:
                    self.ambiguous.add(child)
                    continue
                if self.calls.setdefault(child, call) != call:
                    self.ambiguous.add(child)
        self.traces[module] = traces

    def tail(self, module):
        """Where the value that a module returns comes from: (what, paths to look into) or None.

        what: "batch_norm", or "add" for a sum that has a batch norm in it.
        """
        found = {self._tail_of(module, t.graph) for t in self.traces.get(module, ())}
        return found.pop() if len(found) == 1 else None

    def _tail_of(self, module, graph):
        value = next(iter(reversed(graph.nodes))).args[0]
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return None
        modules = dict(module.named_modules(remove_duplicate=False))
        ends = self._source(value, modules)
        if ends is not None:
            return ends
        if not patterns.is_addition(value):
            return None
        for operand in value.args:
            ends = self._source(operand, modules) if isinstance(operand, fx.Node) else None
            if ends is not None and ends[0] == "batch_norm" and len(operand.users) == 1:
                return "add", ends[1]
        return None

    def _source(self, node, modules):
        if patterns.is_batch_norm(node, modules):
            return "batch_norm", ()
        if node.op == "call_module" and is_plain(child := modules[node.target]) and (ends := self.tail(child)):
            return ends[0], (node.target, *(f"{node.target}.{path}" for path in ends[1]))
        return None

    def inlined(self, module):
        """Paths of the submodules that end with a batch norm whose activation or add is in this module."""
        modules = dict(module.named_modules(remove_duplicate=False))
        paths, sums = [], set()
        for t in self.traces[module]:
            for node in t.graph.nodes:
                ends = None if patterns.is_batch_norm(node, modules) else self._source(node, modules)
                if ends is None:
                    continue
                why = self._keeps_its_end(node, ends[0], sums, modules)
                if why is None:
                    paths += ends[1]
                else:
                    self.ends.setdefault(self._last(module, ends[1]), why)
        return tuple(dict.fromkeys(paths))

    def _keeps_its_end(self, node, kind, sums, modules):
        """Why the batch norm at the end of a submodule is not fused with what follows, or None."""
        user = patterns.only_user(node)
        if isinstance(user, str):
            return user
        if patterns.is_addition(user) and kind == "batch_norm":
            if user in sums or any(isinstance(a, fx.Node) and patterns.is_batch_norm(a, modules) for a in user.args):
                return patterns.OTHER_OPERAND
            sums.add(user)
            return None
        return None if patterns.activation(user, node, modules) else f"followed by {patterns.describe(user, modules)}"

    def _last(self, module, paths):
        """The batch norm at the end of the innermost of these submodules."""
        child = module.get_submodule(paths[-1])
        modules = dict(child.named_modules(remove_duplicate=False))
        for node in reversed(self.traces[child][0].graph.nodes):
            if patterns.is_batch_norm(node, modules):
                return modules[node.target]
        return child


def fuse(root):
    """Fuse what can be fused. Returns {batch norm: (pattern, the module that runs it)} and {batch norm: why not}."""
    unfuse(root)
    analysis = Analysis(root)
    fused, left = {}, {}
    for module in analysis.traces:
        fusion, others = _fusion(analysis, module)
        for name, why in others:
            left.setdefault(module.get_submodule(name), []).append(why)
        if fusion is None:
            continue
        why = _objection(type(module))
        for name, pattern in fusion.sites:
            bn = module.get_submodule(name)
            if why is None:
                fused.setdefault(bn, (pattern, module))
            else:
                left.setdefault(bn, []).append(why)
        if why is None:
            module.__dict__[_ATTRIBUTE] = fusion
            module.__class__ = _fused_class(type(module))
    for module in root.modules():
        if module not in analysis.reasons:
            continue
        for bn in module.modules():
            if isinstance(bn, _BatchNorm):
                left.setdefault(bn, []).append(f"{original_class(module).__name__}: {analysis.reasons[module]}")
    for bn, why in analysis.ends.items():
        left[bn] = [why]  # instead of "its output is returned"
    return fused, {bn: reasons for bn, reasons in left.items() if bn not in fused}


def described(fused, names):
    """What fuse returned, in words."""
    return {names[bn]: f"{what} in {names[owner] or type(owner).__name__}" for bn, (what, owner) in fused.items()}


def _fusion(analysis, module):
    call, traces, inlined = analysis.calls[module], analysis.traces[module], analysis.inlined(module)
    if inlined:
        try:
            traces = trace(module, call, inlined)
        except Untraceable:
            inlined = ()
    if not inlined:
        traces = trace(module, call)  # a graph of its own: the analysis still needs the other
    variants, sites, others = _variants(traces, module)
    return (Fusion(call, inlined, sites, variants) if sites else None), others
