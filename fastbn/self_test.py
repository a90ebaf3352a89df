"""A self-test in well under two seconds: what the installed kernels compute, compared with float64."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional, ops
from .composed import composed_forward

EPS = 1e-5
# Largest error allowed, as a part of the largest value of a result: float32 sums and rounds in 2^-24, and bfloat16 has
# 8 digits. Kernels that compute something else miss both by far.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
# training, fused (residual and relu)
PASSES = {"training": (True, False), "training, add + relu": (True, True), "eval": (False, False),
          "eval, add + relu": (False, True)}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    grad_output: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(getattr(self, name).to(dtype) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Result:
    """How many tensors were compared, what was wrong with them, and how long it took."""

    compared: int
    problems: list[str]
    seconds: float

    def __str__(self) -> str:
        if self.problems:
            return f"FAILED: {'; '.join(self.problems)}"
        return f"OK: {self.compared} results compared with float64 in {self.seconds:.2f} s"


def _inputs(dtype: torch.dtype, device: torch.device, channels_last: bool) -> Inputs:
    random = torch.Generator().manual_seed(2015)
    sizes = (6, 20, 9, 11)
    x, residual, grad_output = (torch.randn(sizes, generator=random).to(device, dtype) for _ in range(3))
    weight, bias, mean, var = (torch.randn(sizes[1], generator=random).to(device) for _ in range(4))
    if channels_last:
        x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    return Inputs(x, residual, weight, bias, mean, var.abs() + 0.5, grad_output)


def _reference(i: Inputs, training: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """y, and z before relu, in torch operations on float64 tensors."""
    moments = None if training else torch.stack([i.mean, i.var])
    z = composed_forward(i.x, i.weight, i.bias, moments, EPS, residual=i.residual if fused else None)
    return (z.relu() if fused else z), z


def _leaves(i: Inputs, fused: bool) -> dict[str, Tensor]:
    leaves = {"grad_input": i.x, "grad_weight": i.weight, "grad_bias": i.bias}
    if fused:
        leaves["grad_residual"] = i.residual
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves


def _errors(given: Inputs, training: bool, fused: bool) -> Iterator[tuple[str, float]]:
    """Name and error of each result, as a part of the largest value that it should have."""
    exact = given.to(torch.float64)
    leaves = _leaves(exact, fused)
    y, z = _reference(exact, training, fused)
    # At the edge of relu, rounding decides which derivative is right: no gradient comes in there.
    grad_output = given.grad_output * (z.abs() > 1e-3)
    wanted = [y, *torch.autograd.grad(y, list(leaves.values()), grad_output.double())]

    own_leaves = _leaves(given, fused)
    mean, var = given.mean.clone(), given.var.clone()
    activation = "relu" if fused else "identity"
    output = functional.batch_norm(
        given.x, mean, var, given.weight, given.bias, training, 1.0, EPS, activation=activation,
        residual=given.residual if fused else None,
    )  # fmt: skip
    found = [output, *torch.autograd.grad(output, list(own_leaves.values()), grad_output)]
    names = ["output", *leaves]
    if training:  # with momentum 1 the running statistics are those of the batch
        names += ["running_mean", "running_var"]
        found += [mean, var]
        wanted += [exact.x.mean((0, 2, 3)), exact.x.var((0, 2, 3))]
    for name, a, b in zip(names, found, wanted, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        yield name, error


def run() -> Result:
    """Forward and backward, plain and fused, in training and eval, in both layouts, on every device with kernels."""
    start = time.perf_counter()
    devices = [name for name in ops.DEVICES if name == "cpu" or (name == "cuda" and torch.cuda.is_available())]
    compared, problems = 0, []
    for device, (dtype, tolerance), channels_last, (what, flags) in itertools.product(
        devices, TOLERANCES.items(), (False, True), PASSES.items()
    ):
        layout = "channels_last" if channels_last else "contiguous"
        case = f"{what}, {str(dtype).removeprefix('torch.')}, {layout}, {device}"
        try:
            for name, error in _errors(_inputs(dtype, torch.device(device), channels_last), *flags):
                compared += 1
                if not error <= tolerance:  # a NaN is no small error
                    problems.append(f"{name} of {case}: error {error:.2g}, allowed {tolerance:.2g}")
        except RuntimeError as error:
            problems.append(f"{case}: {error}")
    return Result(compared, problems, time.perf_counter() - start)
