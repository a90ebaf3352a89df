"""y = act(bn(x) + residual): values and every gradient on each backend, what is saved for them, and how they are asked.
In: tensors of all kinds. Out: close to float64 compositions of torch operations, no further than torch."""

import copy
import itertools
import pickle

import inputs
import numpy as np
import pytest
import torch
from torch import nn

import fastbn
from fastbn import _C, activations, ops
from fastbn.activations import ACTIVATIONS
from fastbn.functional import batch_norm

PARAMS = {"leaky_relu": 0.3, "elu": 0.7}
KINKS = torch.tensor([-3.0, 0, 3, 6], dtype=torch.float64)
MASKED = ("relu", "leaky_relu", "relu6")
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).removeprefix("torch."))


def composed(x, mean, var, weight, bias, residual, training, activation, param, eps=1e-5):
    """The same by torch alone."""
    z = nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, eps)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation].forward(z, activations.check(activation, param))


def gradients(f, x, mean, var, weight, bias, residual, dy, *rest):
    """Output, then gradients of x, weight, bias and residual where they are there."""
    leaves = [t.detach().requires_grad_() if t is not None else None for t in (x, weight, bias, residual)]
    wanted = [t for t in leaves if t is not None]
    # a leaf made from a view keeps its strides
    y = f(leaves[0], mean.clone(), var.clone(), *leaves[1:], *rest)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def fused(x, mean, var, weight, bias, residual, training, activation, param):
    return batch_norm(
        x, mean, var, weight, bias, training, activation=activation, activation_param=param, residual=residual
    )


def check(x, activation, residual, training, ulps=None):
    """Ours and torch's composition against the composition in float64."""
    channels, dtype, device = x.size(1), x.dtype, x.device
    weight, bias, mean = torch.randn(3, channels)
    var = torch.rand(channels) + 0.5
    tensors = [x, *(t.to(device, dtype) for t in (mean, var, weight, bias))]
    tensors.append(torch.empty_like(x).copy_(torch.randn(x.shape)) if residual else None)
    dy = torch.empty_like(x).copy_(torch.randn(x.shape))
    tensors.append(dy)
    rest = training, activation, PARAMS.get(activation)
    z = composed(*(None if t is None else t.double() for t in tensors[:-1]), training, "identity", None)
    dy[((z - KINKS.to(device).view(4, *[1] * x.dim())).abs() < 1e-5).any(0)] = (
        0  # on which side of a kink rounding puts them is chance
    )
    ours = gradients(fused, *tensors, *rest)
    torchs = gradients(composed, *tensors, *rest)
    right = gradients(composed, *(None if t is None else t.double() for t in tensors), *rest)
    names = ["output", "grad_input", "grad_weight", "grad_bias", "grad_residual"]
    allowed = ulps or {torch.float64: 400}.get(dtype, 4)
    for name, found, theirs, expected in zip(names, ours, torchs, right, strict=False):
        assert found.dtype == theirs.dtype and found.shape == theirs.shape, name
        scale = expected.abs().max().item()
        if name in ("grad_weight", "grad_bias"):  # sums that cancel
            scale = max(scale, dy.double().abs().transpose(0, 1).flatten(1).sum(1).max().item())
        error, torchs_error = ((t.double() - expected).abs().max().item() for t in (found, theirs))
        assert error <= torchs_error + allowed * torch.finfo(dtype).eps * scale, (name, error, torchs_error, scale)


# Rows of whole packs and of odd ends, one position a channel, few channels, spare rows, one map in several parts.
SHAPES = [
    (33, 5), (64, 96), (5, 1), (3, 7, 1, 3), (4, 6, 7, 7), (3, 5, 33, 31), (8, 130, 3, 3), (2, 3, 14, 14),
    (2, 4, 65, 64), (40, 3, 4, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 0.0])
def test_elu_of_zero_is_zero_whatever_alpha_is(device, alpha):
    """A constant channel is zero once it is normalized."""
    x = torch.full((4, 3, 5, 5), 2.5, device=device)
    y = batch_norm(x, None, None, training=True, activation="elu", activation_param=alpha)
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(y, nn.functional.elu(torch.zeros_like(x), alpha))


@training
@residuals
@each_activation
@dtypes
def test_values_and_gradients(device, dtype, activation, residual, training):
    shapes = SHAPES[2:6] if ops.SIMULATED else SHAPES  # there it takes seconds
    for shape, layout in itertools.product(shapes, (inputs.contiguous, inputs.channels_last)):
        check(layout(shape, dtype=dtype, device=device), activation, residual, training)


@pytest.mark.simt_quick
@pytest.mark.sanitize
@training
@residuals
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients_of_some(device, dtype, activation, residual, training):
    for shape, layout in itertools.product(
        [(33, 5), (2, 8, 9, 7), (4, 64, 3, 3)], (inputs.contiguous, inputs.channels_last)
    ):
        check(layout(shape, dtype=dtype, device=device), activation, residual, training)


@residuals
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layout", inputs.LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(device, layout, activation, residual):
    for shape in ((2, 6, 5, 7), (3, 1, 4, 4), (2, 16, 12, 11)):
        check(layout(shape, device=device), activation, residual, True)


# Over 4 MB, in both walks, with rows left over after those that are taken together. 70 channels are no whole lines in
# channels_last, and 1000 positions are none in contiguous: there two make a row.
@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(67, 64, 17, 16), (19, 64, 33, 32), (18, 70, 1000)], ids=str)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_stores_past_the_cache(device, shape, layout):
    check(layout(shape, device=device), "relu", True, True, ulps=16)
    check(layout(shape, device=device), "identity", True, False, ulps=16)


# Wide maps of whole lines, four samples together and two left over: in eval, and, over 4 MB, in training.
@pytest.mark.cpu
@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape, training", [((6, 5, 64, 32), False), ((18, 64, 33, 64), True)], ids=["eval", "training"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_four_samples_together(device, dtype, shape, training):
    for activation, residual in (("relu", True), ("identity", False)):
        check(inputs.contiguous(shape, dtype=dtype, device=device), activation, residual, training)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 300, 301), (16, 64, 56, 56), (64, 256, 14, 14), (1, 40, 2, 4100)], ids=str)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_large_tensors(device, shape, layout):
    """Items in several segments, and stores past the cache."""
    for activation, residual in (("relu", True), ("relu", False), ("leaky_relu", True), ("tanh", True)):
        check(layout(shape, device=device), activation, residual, True, ulps=16)
    check(layout(shape, dtype=torch.bfloat16, device=device), "relu", True, True)


@residuals
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_mixed_layouts_and_half_inputs_with_float_parameters(device, activation, residual):
    x, r, dy = (inputs.contiguous((3, 8, 5, 6), dtype=torch.bfloat16, device=device) for _ in range(3))
    weight, bias = torch.randn(2, 8, device=device)
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    rest = True, activation, PARAMS.get(activation)
    alike = gradients(fused, x, mean, var, weight, bias, r if residual else None, dy, *rest)
    r, dy = (t.contiguous(memory_format=torch.channels_last) for t in (r, dy))
    mixed = gradients(fused, x, mean, var, weight, bias, r if residual else None, dy, *rest)
    for a, b in zip(alike, mixed, strict=True):
        assert torch.equal(a, b)
    assert mixed[2].dtype == torch.float32


@training
@pytest.mark.parametrize("activation", ["identity", "relu", "elu"])
def test_every_subset_of_gradients(device, activation, training):
    tensors = [inputs.contiguous((4, 6, 5, 5), device=device), *torch.randn(2, 6, device=device)]
    tensors.append(torch.randn_like(tensors[0]))
    mean, var, dy = torch.zeros(6, device=device), torch.ones(6, device=device), torch.randn_like(tensors[0])
    all_of_them = gradients(fused, tensors[0], mean, var, *tensors[1:], dy, training, activation, None)[1:]
    for subset in itertools.product([False, True], repeat=4):
        leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, subset, strict=True)]
        y = fused(leaves[0], mean.clone(), var.clone(), *leaves[1:], training, activation, None)
        assert y.requires_grad == any(subset)
        if any(subset):
            y.backward(dy)
        for leaf, wanted, expected in zip(leaves, subset, all_of_them, strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("activation", MASKED)
@pytest.mark.parametrize("layout", [inputs.contiguous, inputs.channels_last], ids=lambda f: f.__name__)
def test_the_gradient_passes_where_the_output_does(device, layout, activation):
    """The sign of z is that of the forward pass, to the bit, in what is computed again and in what was saved."""
    for residual in (None, layout((4, 24, 9, 9), device=device)):
        x = layout((4, 24, 9, 9), device=device).requires_grad_()
        added = None if residual is None else residual.requires_grad_()
        # many values at zero: a few values, and a bias that is minus one of them
        with torch.no_grad():
            x.copy_((x * 2).round() / 2)
        y = fused(
            x, None, None, torch.ones(24, device=device), torch.zeros(24, device=device), added, True, activation, None
        )
        leaf = x if added is None else added
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        if added is None:  # eval statistics are constants: dx is dz times a positive number
            mean, var = torch.zeros(24, device=device), torch.ones(24, device=device)
            y = fused(x, mean, var, None, torch.full((24,), -0.5, device=device), None, False, activation, None)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        passes = (y > 0) & (y < 6) if activation == "relu6" else y > 0
        assert torch.equal(grad.abs() > 0.5, passes)


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


@pytest.mark.parametrize("activation", MASKED)
@residuals
def test_infinite_gradients_are_blocked(device, activation, residual):
    """In torch dz is zero where z is below zero, whatever dy is; a product with zero would be NaN."""
    x = inputs.contiguous((4, 4, 8, 8), device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    r = torch.randn_like(x) if residual else None
    dy = torch.full_like(x, float("inf"))
    ours = gradients(fused, x, mean, var, None, None, r, dy, False, activation, None)
    torchs = gradients(composed, x, mean, var, None, None, r, dy, False, activation, None)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not ours[1].isnan().any()


@each_activation
def test_a_nan_stays_in_its_channel(device, activation):
    x = inputs.contiguous((3, 4, 5, 5), device=device)
    x[1, 2, 0, 3] = float("nan")
    y = fused(x, None, None, None, None, torch.randn_like(x), True, activation, PARAMS.get(activation))
    bad = y.isnan().transpose(0, 1).flatten(1)
    assert bad[2].all() and not bad[[0, 1, 3]].any()
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = fused(x, mean, var, None, None, None, False, activation, PARAMS.get(activation))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_same_bits_with_any_number_of_threads(threads, activation):
    for shape in ((8, 6, 70, 70), (64, 40, 7, 7), (3, 5, 33, 31)):
        x, r, dy = torch.randn(3, *shape).unbind()
        found = []
        for n in (1, 2, 3):
            threads(n)
            leaves = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = fused(leaves[0], None, None, None, None, leaves[1], True, activation, None)
            found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Differentiation of every other kind: torch operations around the kernels, which take no backend.


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


# The table and the modules.


def test_python_and_the_kernels_have_the_same_table():
    assert _C.activations() == {name: row.default for name, row in ACTIVATIONS.items()}


@each_activation
def test_derivatives_are_those_of_torch(activation):
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    param = activations.check(activation, PARAMS.get(activation))
    (right,) = torch.autograd.grad(ACTIVATIONS[activation].forward(z, param).sum(), z)
    torch.testing.assert_close(ACTIVATIONS[activation].derivative(z.detach(), param), right, rtol=1e-9, atol=1e-12)


MODULES = {
    1: (fastbn.BatchNormAct1d, nn.BatchNorm1d),
    2: (fastbn.BatchNormAct2d, nn.BatchNorm2d),
    3: (fastbn.BatchNormAct3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("rank", MODULES)
@each_activation
def test_modules(device, rank, activation):
    ours_class, torchs_class = MODULES[rank]
    param = PARAMS.get(activation)
    ours = ours_class(6, activation=activation, activation_param=param).to(device)
    torchs = torchs_class(6).to(device)
    with torch.no_grad():
        torchs.weight.uniform_(-1, 1), torchs.bias.uniform_(-1, 1)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict())
    for mode in (True, True, False):
        ours.train(mode), torchs.train(mode)
        x, r = torch.randn(2, 4, 6, *[3] * rank, device=device).unbind()
        for residual in (None, r):
            z = torchs(x) if residual is None else torchs(x) + r
            right = ACTIVATIONS[activation].forward(z, activations.check(activation, param))
            torch.testing.assert_close(ours(x, residual), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=f"expected .*{rank + 2}D input \\(got 7D input\\)"):
        ours(torch.randn(1, 6, 1, 1, 1, 1, 1))


def test_a_module_says_what_it_does_and_survives_a_copy():
    module = fastbn.BatchNormAct2d(3, eps=0.1, activation="leaky_relu", activation_param=0.2)
    assert repr(module).endswith("activation='leaky_relu', activation_param=0.2)")
    assert not isinstance(module, nn.modules.batchnorm._BatchNorm), "tools would replace it and lose the activation"
    x = torch.randn(2, 3, 4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert fastbn.BatchNormAct1d(3).activation == "relu"
    for kwargs in ({"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}):
        other = fastbn.BatchNormAct2d(3, **kwargs)
        right = nn.functional.relu(nn.functional.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(other(x), right)


@pytest.mark.parametrize(
    "kwargs, error",
    [({"activation": "softplus"}, ValueError), ({"activation": 1}, TypeError), ({"activation_param": 1.0}, ValueError)],
    ids=str,
)
def test_a_module_refuses_what_is_not_there(kwargs, error):
    with pytest.raises(error, match="activation"):
        fastbn.BatchNormAct2d(3, **kwargs)
