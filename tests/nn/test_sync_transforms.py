"""Collectives, derivatives and compilation of synchronized batch norm.
In: ranks. Out: one collective a pass; gradients of gradients of float64 batch norm; the values of eager mode."""

import copy

import pytest
import torch
import torch.distributed as dist
from inputs import contiguous
from sync import PLAIN, C, Collectives, expected, module_for, whole_batch

import fastbn


def check_collectives():
    module = fastbn.SyncBatchNormAct(C, activation="silu")
    x = torch.randn(4, C, 3, 3, requires_grad=True)
    with Collectives() as forward:
        output = module(x, x * 2)
    with Collectives() as backward:
        output.sum().backward()
    with Collectives() as parameters_only:
        module(x.detach()).sum().backward()
    module.eval()
    with Collectives() as evaluation:
        output = module(x)
        output.sum().backward()
    module.running_mean = module.running_var = None
    with Collectives() as without_statistics:  # of the batch at hand, as torch has it
        module(x)
    return [len(c.names) for c in (forward, backward, parameters_only, evaluation, without_statistics)]


def test_one_collective_a_pass(pool):
    assert pool(2).run(check_collectives) == [[1, 1, 1, 0, 0]] * 2


def check_double_backward(activation, param, adds):
    rank, counts = dist.get_rank(), (2, 0, 3)
    x, r, dy = whole_batch((5, C, 3), contiguous, torch.float64)
    module = module_for(activation, param, torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, C))
    parts, residuals, grads = (t.split(counts) for t in (x, r, dy))
    residuals = residuals if adds else [None] * 3
    penalty = lambda g: (g**3).sum()  # noqa: E731
    _, dxs, drs, dps, _ = expected(
        parts, residuals, grads, (module.weight, module.bias), activation,
        None if activation is None else fastbn.activations.check(activation, param), module.eps, penalty,
    )  # fmt: skip
    own = parts[rank].clone().requires_grad_()
    residual = residuals[rank].clone().requires_grad_() if adds else None
    output = module(own, residual) if adds else module(own)
    leaves = [own, *module.parameters(), *([residual] if adds else [])]
    first = torch.autograd.grad(output, leaves, grads[rank], create_graph=True)
    second = torch.autograd.grad(sum(penalty(g) for g in first), leaves, allow_unused=True)
    for name, found, right in zip("xwbr", second, (dxs[rank], *dps[rank], drs[rank]), strict=False):
        if right is None or found is None:
            assert (found is None or not found.any()) and (right is None or not right.any()), name
        else:
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("epilogue", [PLAIN, ("tanh", None, True), ("silu", None, False)], ids=str)
def test_double_backward(pool, epilogue):
    pool(3).run(check_double_backward, *epilogue)


def check_transformations():
    """What has no rule says so."""
    module = fastbn.SyncBatchNorm(C, track_running_stats=False)
    x = torch.randn(3, C)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward.mode|forward AD"):
        torch.func.jvp(module, (x,), (x,))
    with pytest.raises((RuntimeError, NotImplementedError), match="vmap|Batching"):
        torch.func.vmap(module)(torch.randn(2, 3, C))


def test_other_derivatives_are_refused(pool):
    pool(2).run(check_transformations)


def check_compiled(backend):
    torch._dynamo.reset()
    rank = dist.get_rank()
    for activation, track in ((None, True), ("silu", True), (None, False)):
        module = module_for(activation, None, torch.float32, track_running_stats=track)
        other = copy.deepcopy(module)
        compiled = torch.compile(other, backend=backend, fullgraph=True)
        for samples in ((2, 3), (4, 1)):
            x = torch.randn(samples[rank], C, 4, 4)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            residual = () if activation is None else (torch.randn(x.shape),)
            module(a, *residual).sin().sum().backward()
            compiled(b, *residual).sin().sum().backward()
            torch.testing.assert_close(b.grad, a.grad)
        for ours, right in zip(other.buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(ours, right)
        for ours, right in zip(other.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, right.grad)


def test_compiled(pool):
    pool(2).run(check_compiled, "aot_eager")


@pytest.mark.slow
def test_compiled_by_inductor(pool):
    pool(2, timeout=120).run(check_compiled, "inductor")
