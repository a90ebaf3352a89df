"""Batch norm followed by ReLU, and by add and ReLU: what fusing saves, against torch with separate operations.

Cases flow in from suite.py; records of kind "fused" flow out, one for each pass of each ending.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator

import torch
from check import PEERS_SLACK, Mismatch, verify_fused
from peers import compiled
from suite import Case, Tensors, make_tensors
from timing import Protocol, measure

# Tensors of the activation's size that each cannot avoid: x, y; x, dy, dx; with an add its other operand and that
# one's gradient, too.
ENDINGS = {"relu": {"forward": 2, "forward+backward": 5}, "add+relu": {"forward": 3, "forward+backward": 7}}
# A peer that takes this many times torch's time is timed once only: it cannot be the faster one.
HOPELESS = 2


class Eager(torch.nn.Module):
    """As the networks of torchvision are written: the add and the ReLU in place, which is torch's fastest way."""

    def __init__(self, bn: torch.nn.Module):
        super().__init__()
        self.bn = copy.deepcopy(bn)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        z = self.bn(x)
        if residual is not None:
            z += residual
        return torch.relu_(z)


class Fused(torch.nn.Module):
    def __init__(self, bn: torch.nn.Module):
        super().__init__()
        import fastbn

        self.bn = fastbn.BatchNormAct2d(bn.num_features, eps=bn.eps, momentum=bn.momentum, dtype=bn.weight.dtype)
        self.bn.load_state_dict(bn.state_dict())

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.bn(x, residual)


class Plain(torch.nn.Module):
    """fastbn's batch norm without anything behind it: what fusing is to add nothing to."""

    def __init__(self, bn: torch.nn.Module):
        super().__init__()
        import fastbn

        self.bn = fastbn.convert(copy.deepcopy(bn))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.bn(x)


def _function(x, residual, weight, bias, mean, var, momentum, eps):
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
    return torch.relu(z if residual is None else z + residual)


# One compilation for all shapes of a kind: 3 to 7 s for each shape are more than the benchmark has. Where both were
# measured, this one took 0.65 to 1.09 of the time of one that knows the shape.
_compiled_function = compiled(_function, dynamic=True)


class Compiled(Eager):
    """torch.compile of the same, not in place: that is left to the compiler."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        bn = self.bn
        return _compiled_function(x, residual, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.momentum, bn.eps)


VARIANTS = {"fastbn": Fused, "fastbn again": Fused, "torch": Eager, "torch.compile": Compiled}


def calls(tensors: Tensors, residual: torch.Tensor | None, module: torch.nn.Module) -> dict[str, Callable[[], object]]:
    bn = module.bn
    leaves = [t for t in (tensors.x, residual, bn.weight, bn.bias) if t is not None]
    return {
        "forward": lambda: module(tensors.x, residual),
        "forward+backward": lambda: torch.autograd.grad(module(tensors.x, residual), leaves, tensors.dy),
    }


def measure_fused(case: Case, protocol: Protocol, seed: int) -> Iterator[dict[str, object]]:
    tensors = make_tensors(case, seed)
    rng = random.Random(seed)
    destination = torch.zeros_like(tensors.dy)
    for ending, passes in ENDINGS.items():
        residual = tensors.dy.flip(0).contiguous(memory_format=_format_of(tensors.dy)) if "add" in ending else None
        residual = residual if residual is None else residual.requires_grad_()
        modules = {name: make(tensors.module) for name, make in VARIANTS.items()}
        try:
            verify_fused(tensors, residual, modules["fastbn"], 1.0)
            verify_fused(tensors, residual, modules["torch.compile"], PEERS_SLACK)
        except Mismatch as error:
            yield {"kind": "wrong", **case.fields(), "ending": ending, "error": str(error)}
            continue
        by_variant = {name: calls(tensors, residual, module) for name, module in modules.items()}
        for name, tensors_moved in passes.items():
            functions = {variant: by_pass[name] for variant, by_pass in by_variant.items()}
            functions["copy"] = lambda: destination.copy_(tensors.dy)
            if name == "forward":
                del functions["torch.compile"]  # whose backward pass decides what it is worth
                functions["fastbn plain"] = calls(tensors, None, Plain(tensors.module))[name]
            once = {}
            if "torch.compile" in functions:
                functions["torch"]()  # the other one has run when it was checked
                once = {peer: _once(functions[peer]) for peer in ("torch", "torch.compile")}
                if once["torch.compile"]["median"] > HOPELESS * once["torch"]["median"]:
                    del functions["torch.compile"]
            seconds = {**once, **measure(functions, protocol, rng)}
            yield {
                "kind": "fused", **case.fields(), "ending": ending, "pass": name, "tensors": tensors_moved,
                "seconds": seconds,
            }  # fmt: skip


def _once(call: Callable[[], object]) -> dict[str, float]:
    """One call's time in the form of several."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"median": seconds, "low": seconds, "high": seconds}


def _format_of(tensor: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last
