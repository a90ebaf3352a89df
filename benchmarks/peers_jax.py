"""JAX (XLA) as a peer: batch norm written in jax.numpy and compiled for each shape. Tensors go over without a copy."""

import os
from collections.abc import Callable

# or JAX takes three quarters of a GPU's memory at its first use
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import torch
from suite import Case, Tensors

jax.config.update("jax_enable_x64", True)  # or float64 becomes float32


def _to_jax(tensor: torch.Tensor, channels_last: bool) -> jax.Array:
    """A channels_last tensor becomes the (N, ..., C) array that lies in memory."""
    tensor = tensor.detach()
    return jnp.from_dlpack((tensor.movedim(1, -1) if channels_last else tensor).contiguous())


def _batch_norm(x, residual, weight, bias, running, momentum, eps, axis, epilogue, training):
    """As torch defines it. Returns y, and the running mean and variance."""
    wide = x.astype(weight.dtype)
    axes = tuple(d for d in range(x.ndim) if d != axis)
    shape = [-1 if d == axis else 1 for d in range(x.ndim)]
    if training:
        mean, var = jnp.mean(wide, axes), jnp.var(wide, axes)
        count = x.size // x.shape[axis]
        unbiased = var * (count / max(1, count - 1))
        running = tuple(
            (1 - momentum) * old + momentum * new for old, new in zip(running, (mean, unbiased), strict=True)
        )
    else:
        mean, var = running
    scale = jax.lax.rsqrt(var + eps) * weight
    y = (wide - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
    if residual is not None:
        y = y + residual
    return (jax.nn.relu(y) if "relu" in epilogue else y).astype(x.dtype), running


class JaxRunner:
    """What ModuleRunner is for modules. Calls return when the result is there, as XLA works in the background."""

    strided = False

    def __init__(self, case: Case, sets: list[Tensors]) -> None:
        self.channels_last = case.layout == "channels_last"
        axis = len(case.shape) - 1 if self.channels_last else 1
        bn = sets[0].module
        self.vectors = [_to_jax(t, False) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
        self.sets = [
            [None if t is None else _to_jax(t, self.channels_last) for t in (s.x, s.residual, s.dy)] for s in sets
        ]
        self.turn = 0

        def function(x, residual, weight, bias, mean, var, training=True):
            settings = bn.momentum, bn.eps, axis, case.epilogue, training
            return _batch_norm(x, residual, weight, bias, (mean, var), *settings)

        def train(x, residual, dy, weight, bias, mean, var):
            def of(x, residual, weight, bias):
                return function(x, residual, weight, bias, mean, var)

            y, pull, running = jax.vjp(of, x, residual, weight, bias, has_aux=True)
            return y, pull(dy), running

        self.forward = jax.jit(lambda x, residual, dy, *vectors: function(x, residual, *vectors))
        self.train = jax.jit(train)
        self.evaluate = jax.jit(lambda x, residual, dy, *vectors: function(x, residual, *vectors, training=False)[0])
        self.epilogue = case.epilogue

    def _run(self, function: Callable) -> object:
        self.turn = (self.turn + 1) % len(self.sets)
        return jax.block_until_ready(function(*self.sets[self.turn], *self.vectors))

    def outputs(self) -> dict[str, torch.Tensor]:
        def back(array: jax.Array) -> torch.Tensor:
            tensor = torch.from_dlpack(array)
            return tensor.movedim(-1, 1) if self.channels_last and tensor.dim() > 1 else tensor

        x, residual, dy = self.sets[0]
        y, (dx, dresidual, dweight, dbias), (mean, var) = self.train(x, residual, dy, *self.vectors)
        found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": mean, "running_var": var}
        if residual is not None:
            found["dresidual"] = dresidual
        if not self.epilogue:
            found["y in eval"] = self.evaluate(x, residual, dy, *self.vectors)
        return {name: back(value) for name, value in found.items()}

    def calls(self) -> dict[str, Callable[[], object]]:
        calls = {"forward": lambda: self._run(self.forward), "forward+backward": lambda: self._run(self.train)}
        if not self.epilogue:
            calls["eval"] = lambda: self._run(self.evaluate)
        return calls
