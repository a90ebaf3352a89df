"""Is a batch norm right? Compared with float64 on the benchmark's own tensors, before anything is timed."""

import math

import torch
from peers import Peer
from suite import Tensors

# Of large cases, random channels of together this many elements are recomputed, or checking would take longer
# than timing. Channels do not depend on each other, and the tests look at all of them.
CHECKED = 3_000_000
# So many elements are recomputed at a time, to stay in the cache.
CHUNK = 300_000

# Others than fastbn may round more than once (torch.compile does, in gradients of half types): they are to compute the
# same function, and no more is asked of them.
PEERS_SLACK = 50.0


class Mismatch(Exception):
    """A variant's numbers are wrong, so that its times mean nothing."""


def _compare(name: str, got: torch.Tensor, want: torch.Tensor, slack: float, scale: float = 1.0) -> None:
    # Half types round to half a unit of their own; below that, everything is computed in float32 or better.
    accuracy = 1e-11 if got.dtype == torch.float64 else 1e-5
    scale = max(scale, want.abs().max().item())
    allowed = torch.finfo(got.dtype).eps * want.abs() + accuracy * scale
    error = (got.double() - want).abs() - slack * allowed
    if not (error <= 0).all():
        raise Mismatch(f"{name} is wrong by {error.max().item():.2e} more than allowed")


def verify_fused(tensors: Tensors, residual: torch.Tensor | None, module: torch.nn.Module, slack: float) -> None:
    """Raise :class:`Mismatch` unless ``module`` computes relu(batch norm + residual) and its gradients rightly."""
    x, dy, start = tensors.x.detach(), tensors.dy, tensors.module
    bn = module.bn
    leaves = [t for t in (tensors.x, bn.weight, bn.bias, residual) if t is not None]
    y = module.train()(tensors.x, residual)
    dx, dweight, dbias, *rest = torch.autograd.grad(y, leaves, dy)
    channels, per_channel = x.shape[1], x.numel() // x.shape[1]
    dims = [d for d in range(x.dim()) if d != 1]
    for c in torch.randperm(channels)[: max(1, min(channels, CHECKED // per_channel))].split(
        max(1, CHUNK // per_channel)
    ):
        x64, dy64 = x[:, c].double(), dy[:, c].double()
        weight, bias = (t.detach()[c].double().view(1, -1, *[1] * (x.dim() - 2)) for t in (start.weight, start.bias))
        var, mean = torch.var_mean(x64, dims, correction=0, keepdim=True)
        rstd = (var + start.eps).rsqrt()
        xhat = (x64 - mean) * rstd
        z = xhat * weight + bias + (0 if residual is None else residual.detach()[:, c].double())
        # On which side of the kink rounding puts a value is chance, and changes its gradient by all of dy.
        clear = z.abs() > (1e-5 if slack == 1 else 0.05)
        dz = dy64 * (z > 0)
        sum_dz, sum_dz_xhat = dz.sum(dims, keepdim=True), (dz * xhat).sum(dims, keepdim=True)
        unclear = (dy64.abs() * ~clear).sum().item()
        terms = math.sqrt(per_channel) + 1e5 * unclear
        _compare("y", y.detach()[:, c], z.relu(), slack)
        want = (dz - (sum_dz + xhat * sum_dz_xhat) / per_channel) * rstd * weight
        spread = 1 + 1e5 * unclear / per_channel * 20  # each moves the sums in the gradients of all the others
        _compare("dx", dx[:, c] * clear, want * clear, slack, spread)
        _compare("dweight", dweight[c], sum_dz_xhat.flatten(), slack, terms)
        _compare("dbias", dbias[c], sum_dz.flatten(), slack, terms)
        for gradient in rest:
            _compare("dresidual", gradient[:, c] * clear, dz * clear, slack)


def verify(tensors: Tensors, peer: Peer, slack: float = 1.0) -> None:
    """Raise :class:`Mismatch` unless ``peer`` computes every pass of ``tensors.module`` rightly. ``slack`` multiplies
    the errors that are allowed."""
    x, dy, start = tensors.x.detach(), tensors.dy, tensors.module
    module = peer(start)
    with torch.no_grad():
        y_eval = module.eval()(x)
    y = module.train()(tensors.x)
    dx, dweight, dbias = torch.autograd.grad(y, (tensors.x, module.weight, module.bias), dy)
    for name, tensor in (("y", y), ("dx", dx), ("y in eval", y_eval)):
        if tensor.dtype != x.dtype or tensor.stride() != x.stride():
            raise Mismatch(f"{name} has type {tensor.dtype} and strides {tensor.stride()}")

    channels, per_channel = x.shape[1], x.numel() // x.shape[1]
    dims = [d for d in range(x.dim()) if d != 1]
    checked = torch.randperm(channels)[: max(1, CHECKED // per_channel)]
    for part in checked.split(max(1, CHUNK // per_channel)):

        def wide(vector: torch.Tensor, part: torch.Tensor = part) -> torch.Tensor:
            """The chunk of a vector over the channels, in float64, ready to broadcast."""
            return vector.detach()[part].double().view(1, -1, *[1] * (x.dim() - 2))

        x64, dy64 = x[:, part].double(), dy[:, part].double()
        var, mean = torch.var_mean(x64, dims, correction=0, keepdim=True)
        rstd = (var + start.eps).rsqrt()
        xhat = (x64 - mean) * rstd
        sum_dy, sum_dy_xhat = dy64.sum(dims, keepdim=True), (dy64 * xhat).sum(dims, keepdim=True)
        weight, bias = wide(start.weight), wide(start.bias)
        unbiased = var * per_channel / max(1, per_channel - 1)
        eval_rstd = (wide(start.running_var) + start.eps).rsqrt()
        terms = math.sqrt(per_channel)  # the size of a sum of that many random terms

        _compare("y", y.detach()[:, part], xhat * weight + bias, slack)
        _compare("dx", dx[:, part], (dy64 - (sum_dy + xhat * sum_dy_xhat) / per_channel) * rstd * weight, slack)
        _compare("dweight", dweight[part], sum_dy_xhat.flatten(), slack, terms)
        _compare("dbias", dbias[part], sum_dy.flatten(), slack, terms)
        _compare("y in eval", y_eval[:, part], (x64 - wide(start.running_mean)) * eval_rstd * weight + bias, slack)
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            want = torch.lerp(wide(getattr(start, name)), batch, start.momentum)
            _compare(name, getattr(module, name)[part], want.flatten(), slack)
