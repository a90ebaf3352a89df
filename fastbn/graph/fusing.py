"""convert(model, fuse=True): modules that capture their forward by Dynamo and run it with fused batch norms.

Nothing moves in the tree. A module that contains batch norms gets a subclass of its own class, whose `__call__` goes
through torch.compile with the backend `fastbn_eager`. What the captured graph depends on is guarded by Dynamo. Whatever
records operations itself (torch.compile, torch.export, torch.jit.trace, torch.fx, torch.func) sees the module's own
forward.
"""

import abc
import contextlib
import copyreg
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd import in_forward_mode
from ..ops import _C, is_compiling
from . import generators

_ORIGINAL = "_fastbn_original"
# Each module has a function, and so a code object, of its own: Dynamo counts recompilations by code object.
_runners: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
_failures: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_RETRIES = 8  # as many recompilations as Dynamo allows a function by default
# Guard on hooks too, which may be registered after the capture. If a capture fails, run the module, which raises its
# own error or none. Each mode, dtype and layout is a graph; cache_size_limit is the older name of recompile_limit. In
# newer versions of torch such settings apply to one thread.
_DYNAMO = {
    "skip_nnmodule_hook_guards": False,
    "suppress_errors": True,
    "cache_size_limit": 64,
    "allow_unspec_int_on_nn_module": True,  # not one capture for each number in a forward that counts its calls
}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before fastbn fused it."""
    return getattr(type(module), _ORIGINAL, type(module))


def is_fused(module: nn.Module) -> bool:
    return _ORIGINAL in type(module).__dict__


def fuse(root: nn.Module) -> dict[nn.Module, str]:
    """Give every module that has a forward of its own, and batch norms, its fused class.

    Returns why not, for those that cannot have one.
    """
    refused = {}
    for module in root.modules():
        if is_fused(module) or not _has_forward(module) or not any(isinstance(m, _BatchNorm) for m in module.modules()):
            continue
        cls: Any = type(module)
        why = _objection(cls)
        if why is None:
            module.__class__ = _fused_class(cls)
        else:
            refused[module] = why
    return refused


def unfuse(root: nn.Module) -> None:
    """Give every fused module in root its own class again."""
    for module in root.modules():
        if is_fused(module):
            module.__class__ = original_class(module)
            _runners.pop(module, None)


def _has_forward(module: nn.Module) -> bool:
    """Whether a module's forward is someone's own, or that of a Sequential."""
    cls = type(module)
    if isinstance(module, (torch.jit.ScriptModule, _BatchNorm)) or cls.forward is nn.Module.forward:
        return False
    return cls is nn.Sequential or not cls.__module__.startswith(("torch.", "fastbn."))


def _objection(cls: type) -> str | None:
    """Why a class cannot have a subclass that nobody notices, or None."""
    if type(cls) not in (type, abc.ABCMeta):
        return f"{cls.__name__} has a metaclass"
    for name in ("__reduce_ex__", "__reduce__", "__deepcopy__", "__copy__", "__init_subclass__"):
        if any(name in vars(base) for base in cls.__mro__[:-1]):
            return f"{cls.__name__} defines {name}"
    return None


@functools.cache
def _fused_class(cls: type[Any]) -> type[Any]:
    """A subclass of cls that differs in its calls alone, and that pickles do not refer to."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or _is_observed(self):
            return cls.__call__(self, *args, **kwargs)
        with _capturing(self):
            return _runner(self)(self, args, kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        reduced: Any = super(fused, self).__reduce_ex__(max(protocol, 2))
        _, args, *rest = reduced
        return _remake, (cls, *args[1:]), *rest

    members = {
        "__call__": call, "__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__, _ORIGINAL: cls,
    }  # fmt: skip
    metaclass: Any = type(cls)
    fused: type[nn.Module] = metaclass(cls.__name__, (cls,), members)
    return fused


def _remake(cls: type[nn.Module], *args: Any) -> nn.Module:
    """Create the instance for a pickle of a fused module: of the original class; setting its state makes it fused.

    Pickles cannot refer to fused classes, because no module (in Python's sense) contains them. The instance has a
    ``__setstate__`` of its own, because torch.load(weights_only=True) sets the state by this method, for instances of
    allowed classes.
    """
    module: nn.Module = copyreg.__newobj__(cls, *args)  # type: ignore[attr-defined]
    module.__dict__["__setstate__"] = functools.partial(_restore, module)
    return module


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    del module.__dict__["__setstate__"]
    cls: Any = original_class(module)
    cls.__setstate__(module, state)
    module.__class__ = _fused_class(cls)


def _has_global_hook() -> bool:
    """torch's _has_any_global_hook, which torch 2.6 does not have; the other dicts of hooks only describe these."""
    return bool(
        _torch_module._global_backward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_forward_hooks
    )


def _is_observed(module: nn.Module) -> bool:
    """Whether to run the module's own forward: something records or intercepts the operations of this call, the module
    is compiled (module.compile()), or it is a replica of DataParallel, which lives for one call."""
    return (
        module._compiled_call_impl is not None
        or _C.is_watched()
        or (torch.fx._symbolic_trace._is_fx_tracing_flag and not torch.compiler.is_compiling())
        or in_forward_mode()
        or _has_global_hook()
        or "_is_replica" in module.__dict__
    )


class _Quiet(logging.Filter):
    """Hides Dynamo's warnings about frames that it does not capture: the user did not ask for a compiler."""

    calls = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.calls, "depth", 0)


_quiet = _Quiet()


@functools.cache
def _settings() -> dict[str, Any]:
    """The settings of _DYNAMO that this version of torch has."""
    return {name: value for name, value in _DYNAMO.items() if hasattr(torch._dynamo.config, name)}


@contextlib.contextmanager
def _capturing(module: nn.Module) -> Iterator[None]:
    for name in ("convert_frame", "variables.tensor"):
        logging.getLogger(f"torch._dynamo.{name}").addFilter(_quiet)  # adding it again has no effect
    depth = getattr(_quiet.calls, "depth", 0)
    _quiet.calls.depth = depth + 1
    try:
        with torch._dynamo.config.patch(**_settings()), generators.left_alone():
            yield
    except Exception:
        # After an exception in a capture, such as for bad input, Dynamo does not capture the function again, so the
        # next call gets another function; not without limit, because there are models that always raise.
        _failures[module] = _failures.get(module, 0) + 1
        if _failures[module] < _RETRIES:
            _runners.pop(module, None)
        raise
    finally:
        _quiet.calls.depth = depth


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    # here, because importing them takes longer than importing fastbn
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    from . import backends

    if any(node.target is tag_activation_checkpoint for node in graph.graph.nodes):
        # Without a compiler this operator does not allow that running statistics change. The checkpointed module runs
        # as it is, and the modules in it are captured separately.
        raise NotImplementedError("activation checkpointing within a captured graph")
    return backends.fastbn_eager(graph, inputs)


def _runner(module: nn.Module) -> Callable[..., Any]:
    runner = _runners.get(module)
    if runner is None:
        code = _call.__code__.replace(co_name=f"fused_{type(module).__name__}")
        function = types.FunctionType(code, globals(), code.co_name)
        runner = _runners[module] = torch.compile(function, backend=_backend)
    return runner


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return original_class(module).__call__(module, *args, **kwargs)
