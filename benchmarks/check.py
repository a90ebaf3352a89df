"""Compares the results of a peer with float64 on the benchmark's tensors, before anything is timed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from suite import Tensors

# Of large cases, random channels of together this many elements are recomputed, or checking would take longer
# than timing. Channels do not depend on each other, and the tests look at all of them.
CHECKED = 750_000
# So many elements are recomputed at a time, to stay in the cache.
CHUNK = 300_000
# Rounding decides on which side of ReLU's kink a value falls, and changes its gradient by all of dy: values nearer
# than this to it are left out. Peers may round to bfloat16 before the ReLU.
KINK, PEERS_KINK = 1e-5, 0.05


class Mismatch(Exception):
    """The results of a variant are wrong, so it is not timed."""


@dataclass
class Wanted:
    """The right values of an output's channels."""

    value: torch.Tensor
    scale: float = 1.0  # the size of what was added up to them
    clear: torch.Tensor | None = None  # where rounding does not decide


class Reference:
    """The results of batch norm and its epilogue for ``tensors``, in float64: one training pass and, where
    nothing follows, one in eval."""

    def __init__(self, tensors: Tensors, epilogue: str = "", elements: int = CHECKED) -> None:
        self.tensors, self.epilogue = tensors, epilogue
        x = tensors.x
        per_channel = max(1, x.numel() // x.shape[1])
        chosen = torch.randperm(x.shape[1], device=x.device)[: max(1, elements // per_channel)]
        self.parts = chosen.split(max(1, CHUNK // per_channel))
        self.known: dict[float, list[dict[str, Wanted]]] = {}

    def check(self, outputs: dict[str, torch.Tensor], slack: float, strided: bool = True) -> None:
        """Raise :class:`Mismatch` unless all ``outputs`` are right. ``slack`` multiplies the errors that are allowed;
        ``strided`` says whether the strides must be those of the input, too."""
        x = self.tensors.x
        for name in ("y", "dx", "dresidual", "y in eval"):
            tensor = outputs.get(name)
            if tensor is not None and (tensor.dtype != x.dtype or (strided and tensor.stride() != x.stride())):
                raise Mismatch(f"{name} has type {tensor.dtype} and strides {tensor.stride()}")
        for name, got, wanted in self._pairs(outputs, KINK if slack == 1 else PEERS_KINK):
            # Half types round to half a unit of their own; below that, everything is computed in float32 or better.
            accuracy = 1e-11 if got.dtype == torch.float64 else 1e-5
            if slack > 1:  # rounded before the residual is added: a unit of what may have cancelled
                accuracy = max(accuracy, torch.finfo(got.dtype).eps / slack)
            want = wanted.value
            allowed = torch.finfo(got.dtype).eps * want.abs() + accuracy * max(wanted.scale, want.abs().max().item())
            error = (got.double() - want).abs() - slack * allowed
            error = error if wanted.clear is None else error * wanted.clear
            if not (error <= 0).all():
                raise Mismatch(f"{name} is wrong by {error.max().item():.2e} more than allowed")

    def errors(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Of each output, the largest difference from float64 over the largest value that float64 gives; not of those
        that float64 says are all zero."""
        largest: dict[str, list[float]] = {}
        for name, got, wanted in self._pairs(outputs, PEERS_KINK):
            difference = (got.double() - wanted.value).abs()
            difference = difference if wanted.clear is None else difference * wanted.clear
            entry = largest.setdefault(name, [0.0, 0.0])
            # not max(): which of a number and NaN it returns depends on their order
            entry[0] = torch.tensor([entry[0], difference.max().item()]).max().item()
            entry[1] = max(entry[1], wanted.value.abs().max().item())
        return {name: difference / value for name, (difference, value) in largest.items() if value}

    def _pairs(self, outputs: dict[str, torch.Tensor], kink: float) -> Iterator[tuple[str, torch.Tensor, Wanted]]:
        """Each output's channels that are looked at, and what they should be."""
        if kink not in self.known:
            self.known[kink] = [self._wanted(part, kink) for part in self.parts]
        for part, wanted in zip(self.parts, self.known[kink], strict=True):
            for name, want in wanted.items():
                if name in outputs:
                    tensor = outputs[name].detach()
                    yield name, (tensor[part] if tensor.dim() == 1 else tensor[:, part]), want

    def _wanted(self, part: torch.Tensor, kink: float) -> dict[str, Wanted]:
        x, dy, start = self.tensors.x.detach(), self.tensors.dy, self.tensors.module
        dims = [d for d in range(x.dim()) if d != 1]
        per_channel = x.numel() // x.shape[1]

        def wide(vector: torch.Tensor) -> torch.Tensor:
            """The part of a vector over the channels, in float64, ready to broadcast."""
            return vector.detach()[part].double().view(1, -1, *[1] * (x.dim() - 2))

        x64, dz = x[:, part].double(), dy[:, part].double()
        var, mean = torch.var_mean(x64, dims, correction=0, keepdim=True)
        rstd = (var + start.eps).rsqrt()
        xhat = (x64 - mean) * rstd
        weight, bias = wide(start.weight), wide(start.bias)
        z = xhat * weight + bias
        if self.tensors.residual is not None:
            z += self.tensors.residual.detach()[:, part].double()
        clear, unclear, y = None, 0.0, z
        if "relu" in self.epilogue:
            clear = z.abs() > kink
            unclear = (dz.abs() * ~clear).sum().item()
            y, dz = z.relu(), dz * (z > 0)
        sum_dz, sum_dz_xhat = dz.sum(dims, keepdim=True), (dz * xhat).sum(dims, keepdim=True)
        # the size of a sum of that many random terms; what is a matter of chance moves the sums in all the others
        terms = math.sqrt(per_channel) + 1e5 * unclear
        spread = 1 + 20 * 1e5 * unclear / per_channel
        dx = (dz - (sum_dz + xhat * sum_dz_xhat) / per_channel) * rstd * weight
        wanted = {
            "y": Wanted(y),
            "dx": Wanted(dx, spread, clear),
            "dweight": Wanted(sum_dz_xhat.flatten(), terms),
            "dbias": Wanted(sum_dz.flatten(), terms),
        }
        if self.tensors.residual is not None:
            wanted["dresidual"] = Wanted(dz, 1.0, clear)
        unbiased = var * per_channel / max(1, per_channel - 1)
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            wanted[name] = Wanted(torch.lerp(wide(getattr(start, name)), batch, start.momentum).flatten())
        if not self.epilogue:
            eval_rstd = (wide(start.running_var) + start.eps).rsqrt()
            wanted["y in eval"] = Wanted((x64 - wide(start.running_mean)) * eval_rstd * weight + bias)
        return wanted
