"""Leaves torch's random generators alone while a fused module's forward is captured.

Dynamo reads the state of torch's default generators before it captures a frame and puts it back afterwards, so that
what another thread drew meanwhile is drawn again. A capture draws nothing itself (it computes with sizes, dtypes and
strides alone), so there is nothing to put back.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

_FUNCTION = "set_rng_state"
_MODULES = (torch.random, torch.cuda)
_RESTORED_BY = "torch._dynamo.convert_frame"

_lock = threading.Lock()
_active = 0  # regions that are open, in all threads
_originals: list[Callable[..., None]] = []
_thread = threading.local()


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Within it, Dynamo does not set torch's default generators back in this thread.

    While any thread is within it, ``torch.random.set_rng_state`` and ``torch.cuda.set_rng_state`` are replaced by
    functions that do what they did, except where Dynamo calls them in such a thread. ``torch.set_rng_state`` stays.
    """
    global _active
    with _lock:
        if _active == 0:
            _originals[:] = [_replace(module) for module in _MODULES]
        _active += 1
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1
        with _lock:
            _active -= 1
            if _active == 0:
                _restore()


def _restore() -> None:
    for module, original in zip(_MODULES, _originals, strict=True):
        setattr(module, _FUNCTION, original)


def _after_fork_in_child() -> None:
    """The child has the thread that forked, and the regions of that thread alone."""
    global _active
    replaced, _active = _active > 0, getattr(_thread, "depth", 0)
    if replaced and not _active:
        _restore()
    _lock.release()


# A child must not inherit the lock from a thread that it does not have.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


def _replace(module: ModuleType) -> Callable[..., None]:
    original: Callable[..., None] = getattr(module, _FUNCTION)

    def set_rng_state(new_state: Tensor, *args: object, **kwargs: object) -> None:
        by_dynamo = sys._getframe(1).f_globals.get("__name__") == _RESTORED_BY
        if not (by_dynamo and getattr(_thread, "depth", 0)):
            original(new_state, *args, **kwargs)

    setattr(module, _FUNCTION, set_rng_state)
    return original
