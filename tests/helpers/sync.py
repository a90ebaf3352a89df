"""What tests of synchronized batch norm share: parts of a batch, and what float64 batch norm makes of all of them.
In: a batch and counts of samples. Out: the values, statistics and gradients of each rank's part."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn.activations import ACTIVATIONS

C = 5
# Relative to the largest right value: roundings of the type itself, and of float sums where it is float or half.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# Samples a rank.
EVEN, UNEVEN, EMPTY, ONE_EACH = (3, 3, 3, 3), (1, 4, 2, 7), (4, 0, 3, 0), (1, 1, 1, 1)
PLAIN, RELU, ADD_RELU = (None, None, False), ("relu", None, False), ("relu", None, True)
LEAKY, ADD_GELU, ADD = ("leaky_relu", 0.2, True), ("gelu", None, True), ("identity", None, True)


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within, of any kind."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        collective = function.namespace in ("c10d", "_c10d_functional")
        if collective and "wait" not in function.__name__:
            self.names.append(function.__name__)
        return function(*arguments, **(kwargs or {}))


def assert_near(found, right, what, dtype=None, least=1e-3):
    """least: the size of what is added up, where it may cancel."""
    dtype = dtype or found.dtype
    assert found.shape == right.shape, f"{what} has sizes {found.shape}, not {right.shape}"
    scale = right.abs().max().item() if right.numel() else 0
    error = (found.detach().double() - right).abs().max().item() if right.numel() else 0
    assert error <= TOLERANCE[dtype] * max(scale, least), f"{what} is off by {error}, at a scale of {scale}"


def module_for(activation, param, dtype, affine=True, channels=C, **arguments):
    if activation is None:
        return fastbn.SyncBatchNorm(channels, affine=affine, dtype=dtype, **arguments)
    return fastbn.SyncBatchNormAct(
        channels, affine=affine, dtype=dtype, activation=activation, activation_param=param, **arguments
    )


def whole_batch(shape, layout, dtype):
    """The same in every rank."""
    torch.manual_seed(7)
    return [(layout(shape, dtype=torch.float64) * 2 + shift).to(dtype) for shift in (3, 0, 1)]


def expected(parts, residuals, grads, params, activation, param, eps, penalty=None):
    """Outputs, gradients of each rank's input, residual, weight and bias, and the moments, in float64.

    Each rank has parameters of its own, equal in value, so that their gradients are those of its part.
    """
    xs = [x.detach().double().requires_grad_() for x in parts]
    rs = [None if r is None else r.detach().double().requires_grad_() for r in residuals]
    ps = [[None if p is None else p.detach().double().requires_grad_() for p in params] for _ in parts]
    whole = torch.cat(xs)
    axes = [i for i in range(whole.dim()) if i != 1]
    view = [1, -1] + [1] * (whole.dim() - 2)
    mean, var = whole.mean(axes), whole.var(axes, correction=0)
    ys = []
    for x, r, (w, b) in zip(xs, rs, ps, strict=True):
        z = (x - mean.view(view)) * torch.rsqrt(var + eps).view(view)
        z = z if w is None else z * w.view(view)
        z = z if b is None else z + b.view(view)
        z = z if r is None else z + r
        ys.append(z if activation is None else ACTIVATIONS[activation].forward(z, param))
    leaves = [t for t in (*xs, *rs, *(p for pair in ps for p in pair)) if t is not None]
    found = torch.autograd.grad(
        ys, leaves, [g.double() for g in grads], create_graph=penalty is not None, allow_unused=True
    )
    if penalty is not None:
        loss = sum(penalty(g) for g in found if g is not None)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    by_leaf = dict(zip(map(id, leaves), found, strict=True))
    pick = lambda ts: [None if t is None else by_leaf[id(t)] for t in ts]  # noqa: E731
    return ys, pick(xs), pick(rs), [pick(pair) for pair in ps], (mean.detach(), var.detach())
