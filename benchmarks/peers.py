"""Who is compared: each peer turns torch's batch norm into its own, with the same parameters.

To add one, write a function that raises ImportError where the peer is not installed, and list it in PEERS.
"""

import copy
from collections.abc import Callable

import torch
from torch._functorch import config as functorch

Peer = Callable[[torch.nn.Module], torch.nn.Module]


def _fastbn(module: torch.nn.Module) -> torch.nn.Module:
    import fastbn

    return fastbn.convert(copy.deepcopy(module))


def _torch(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module)


def compiled(function: Callable, dynamic: bool = False) -> Callable:
    """dynamic: for all shapes at once."""
    if dynamic:
        torch._dynamo.config.cache_size_limit = 64  # types, layouts and sizes of one are kinds of their own
    else:
        torch.compiler.reset()  # or the many shapes of a run make it give up and run eagerly
    functorch.donated_buffer = False  # or a backward pass cannot be timed over and over
    return torch.compile(function, dynamic=dynamic)


def _torch_compile(module: torch.nn.Module) -> torch.nn.Module:
    return compiled(copy.deepcopy(module))


PEERS: dict[str, Peer] = {
    "fastbn": _fastbn,
    "torch": _torch,
    "torch.compile": _torch_compile,
}


def available(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those of ``names`` that run here, and why the others do not."""
    here, missing = [], {}
    for name in names:
        try:
            PEERS[name](torch.nn.BatchNorm2d(1))
            here.append(name)
        except ImportError as error:
            missing[name] = str(error)
    return here, missing
