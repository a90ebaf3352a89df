"""gradcheck, torch.func, opcheck and torch.compile of batch norm with an activation and a residual."""

import copy
import itertools

import pytest
import torch
from epilogue import PARAMS, composed, each_activation, fused, residuals, training

import fastbn


def doubles(shape=(3, 2, 4)):
    x, r = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    w, b = (torch.randn(shape[1], dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, w, b, r


@pytest.mark.cpu
@training
@residuals
@each_activation
def test_gradcheck(activation, residual, training):
    x, w, b, r = doubles()
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def f(x, w, b, r=None):
        return fused(x, mean.clone(), var.clone(), w, b, r, training, activation, PARAMS.get(activation))

    leaves = (x, w, b, r) if residual else (x, w, b)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves, check_batched_grad=False)


@pytest.mark.cpu
@training
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_functorch(activation, training):
    x, w, b, r = (t.detach() for t in doubles((5, 3, 4)))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def loss(f):
        return lambda x, w, b, r: f(x, mean.clone(), var.clone(), w, b, r, training, activation, None).square().sum()

    ours, right = (torch.func.grad(loss(f), (0, 1, 2, 3))(x, w, b, r) for f in (fused, composed))
    torch.testing.assert_close(ours, right)
    many = [torch.stack([t, t * 2 + 0.1]) for t in (x, w, b, r)]
    mapped = torch.func.vmap(torch.func.grad(loss(fused), (0, 1, 2, 3)), randomness="error")
    if training:
        # statistics are written, and each of the mapped passes would want its own: not asked for here
        mapped = torch.func.vmap(
            torch.func.grad(
                lambda x, w, b, r: fused(x, None, None, w, b, r, True, activation, None).square().sum(), (0, 1, 2, 3)
            )
        )
    found = mapped(*many)
    for i in range(2):
        one = torch.func.grad(loss(composed), (0, 1, 2, 3))(*(t[i] for t in many))
        torch.testing.assert_close([t[i] for t in found], list(one))


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "tanh"])
def test_opcheck(activation):
    x, w, b, r = (t.detach() for t in doubles())
    moments = torch.stack([torch.zeros(2), torch.ones(2)]).double()
    operators, param = torch.ops.fastbn, PARAMS.get(activation)
    for leaf, given, residual in itertools.product((x, x.clone().requires_grad_()), (None, moments), (None, r)):
        torch.library.opcheck(operators.forward, (leaf, w, b, given, 1e-5, activation, param, residual))
    for mode, residual in itertools.product((True, False), (None, r)):
        torch.library.opcheck(
            operators.backward,
            (torch.randn_like(x), x, w, moments, 1e-5, mode, [True] * 4, activation, param, b, residual),
        )


@pytest.mark.cpu
@training
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compile_without_graph_breaks(activation, training):
    torch._dynamo.reset()
    module = fastbn.BatchNormAct2d(4, activation=activation).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x, r = (torch.randn(n, 4, 6, 6).requires_grad_() for _ in range(2))
        dy = torch.randn(n, 4, 6, 6)
        ours, right = (torch.autograd.grad(m(x, r), (x, r), dy) for m in (compiled, twin))
        torch.testing.assert_close(ours, right)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
