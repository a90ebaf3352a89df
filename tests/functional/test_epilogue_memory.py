"""What batch norm with an activation and a residual saves for backward, and whose memory its gradients take."""

import inputs
import numpy as np
import pytest
import torch
from epilogue import fused


def saved_by(call):
    """What goes through the hooks for saved tensors."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = call()
    return y, seen


def test_nothing_is_saved_that_is_not_needed(device):
    x, r = (inputs.contiguous((4, 8, 6, 6), device=device).requires_grad_() for _ in range(2))
    w, b = (torch.randn(8, device=device).requires_grad_() for _ in range(2))

    def saved(activation, residual):
        y, seen = saved_by(lambda: fused(x, None, None, w, b, residual, True, activation, None))
        names = {t.data_ptr(): n for n, t in (("x", x), ("w", w), ("b", b), ("r", r), ("y", y))}
        return sorted(names[t.data_ptr()] for t in seen)

    assert saved("identity", None) == saved("identity", r) == ["w", "x"]
    assert saved("relu", None) == saved("gelu", None) == ["b", "w", "x"]
    assert saved("relu", r) == saved("leaky_relu", r) == saved("relu6", r) == ["w", "x"]
    assert saved("silu", r) == ["b", "r", "w", "x"]


def test_a_residual_may_change_once_its_mask_is_made_and_not_otherwise(device):
    x = inputs.contiguous((4, 8, 6, 6), device=device).requires_grad_()
    for activation, residual in (("relu", True), ("silu", False)):
        r = torch.randn_like(x)
        y = fused(x, None, None, None, None, r, True, activation, None)
        r.zero_()
        if residual:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_a_gradient_that_somebody_holds_is_left_alone(device):
    """The residual's gradient takes the memory of dy only if nobody else can see it."""
    x, r = (inputs.contiguous((4, 8, 6, 6), device=device).requires_grad_() for _ in range(2))

    class Passing(torch.autograd.Function):
        """The identity, whose backward pass makes its gradient in a way of its own."""

        @staticmethod
        def forward(ctx, y, make):
            ctx.make = make
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return ctx.make(dy), None

    def run(make=None, hook=None, dy=None):
        y = fused(x, None, None, None, None, r, True, "relu", None)
        if hook:
            y.register_hook(hook)
        z = Passing.apply(y, make) if make else y
        return y, *torch.autograd.grad(z, (x, r), torch.ones_like(z) if dy is None else dy)

    given = torch.ones_like(x)
    y, dx, dr = run(dy=given)
    assert (given == 1).all() and dr.data_ptr() != given.data_ptr()
    seen = []
    run(lambda dy: dy * 3, hook=seen.append)
    assert (seen[0] == 3).all()
    kept = torch.full_like(x, 5)
    for make in (lambda dy: kept, lambda dy: kept.detach(), lambda dy: kept[:], lambda dy: kept.flip(0).flip(0)):
        _, again, alone = run(make)
        assert (kept == 5).all()
        torch.testing.assert_close(alone, 5 * dr)
    other = torch.zeros_like(x).requires_grad_()  # two nodes get the same gradient
    y = fused(x, None, None, None, None, r, True, "relu", None)
    first, second = torch.autograd.grad((y + other).square().sum(), (r, other))
    assert torch.equal(second, 2 * y) and torch.equal(first, torch.where(y > 0, 2 * y, 0))
    if x.device.type == "cpu":
        array = np.full(x.shape, 5, np.float32)
        run(lambda dy: torch.from_numpy(array))
        assert (array == 5).all()


@pytest.mark.cpu
def test_a_gradient_that_nobody_holds_gives_its_memory():
    """Then backward makes dy and dx, and no third tensor of their size."""

    def allocated(activation):
        x, r = (inputs.contiguous((4, 8, 40, 40)).requires_grad_() for _ in range(2))
        z = fused(x, None, None, None, None, r, True, activation, None) * 2
        dz = torch.ones_like(z)
        with torch.profiler.profile(profile_memory=True) as profile:
            z.backward(dz)
        assert torch.equal(r.grad, torch.where(z > 0, 2.0, r.grad if activation == "leaky_relu" else 0.0))
        events = profile.profiler.kineto_results.events()
        return sum(e.name() == "[memory]" and e.nbytes() >= x.nbytes for e in events)

    assert allocated("relu") == 2
    assert allocated("leaky_relu") == 3
