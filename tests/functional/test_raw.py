"""The operators, and the functions of fastbn._C, with good and bad arguments: an exception or a right answer, never a
crash.

The calls are made in child processes, which return how many calls they made."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError, MemoryError)
GOOD = (4, 3, 5, 2)


def tensors_like_inputs():
    x = torch.randn(GOOD)
    accepted = [
        x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x.double(), x.half(), x.bfloat16(),
        torch.randn(4, 3), torch.randn(2, 3, 1, 1, 2, 2), torch.randn(0, 3, 2), torch.randn(2, 3, 0),
        torch.randn(1, 3), torch.full(GOOD, float("nan")), x.clone().requires_grad_(), torch.nn.Parameter(x),
        torch.randn(1, 3, 1, 1).expand(GOOD),
    ]  # fmt: skip
    odd = [
        torch.randn(2, 0, 3), torch.tensor(1.0), torch.randn(3), torch.randn(0), torch.randn(4, 5, 3, 2),
        x.long(), x > 0, x.to(torch.complex64), x.to(torch.float8_e4m3fn), x.to("meta"), x.to_sparse(),
        x.to_mkldnn(), torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ]  # fmt: skip
    huge = [torch.randn(1).expand(2**40, 3), torch.randn(1, 1).expand(3, 2**40)]
    return [*accepted, *odd, *huge, x.numpy(), None, 1.0, "x", [1.0], object()]


def tensors_like_parameters():
    p = torch.randn(3)
    return [
        None, p, p + 1, p.view(1, 3), p.view(3, 1), torch.randn(9)[::3], torch.randn(2), torch.randn(0),
        torch.randn(300), torch.tensor(1.0), p.double(), p.half(), p.bfloat16(), p.long(), p.to("meta"),
        torch.randn(1).expand(2**40), p.to_sparse(), p.clone().requires_grad_(), torch.randn(3, 2),
        "w", 1.0, [1.0, 2.0, 3.0],
    ]  # fmt: skip


def moments():
    good = torch.tensor([[0.1, -0.2, 0.3], [1.0, 0.5, 2.0]], dtype=torch.float64)
    return [
        None, good, good, good.t().contiguous().t(), good.t(), good.float(), good.flatten(), good[:1],
        good[:, :2], good[:, :0], -good, good.to("meta"), good.half(), good.long(), torch.cat([good] * 2),
        good[None], torch.tensor(1.0), good.to_sparse(), good.to(torch.complex128), good * float("nan"),
        torch.zeros(1, 1).double().expand(2, 2**40), "moments", 1.0, [good],
    ]  # fmt: skip


def all_stats():
    """Of two ranks, then of one."""
    good = torch.tensor([[0.1, -0.2, 0.3], [1.0, 0.5, 2.0], [20, 20, 20]], dtype=torch.float64)
    return [
        torch.stack([good, good]), good, good.t().contiguous().t(), torch.stack([good, good * 0])[1:], -good, good[:2],
        good[:, :2], good[:, :0], good.float(), good.half(), good.long(), good.flatten(), good[None, None],
        torch.stack([good] * 3)[::2], good[None][:0], good.to("meta"), good.to_sparse(), good * float("nan"), None,
        torch.tensor(1.0), torch.zeros(1, 1, 1).double().expand(2, 3, 2**40), "all_stats", 1.0, [good],
    ]  # fmt: skip


def choices():
    """For each function, the values to try for each of its parameters; the first ones are good."""
    counter = [
        None, torch.tensor(1), torch.tensor(0), torch.tensor(-3), torch.tensor(1.0), torch.tensor([1, 2]),
        torch.tensor(1, device="meta"), torch.tensor(True), torch.ones(0).long(), "n", 3,
    ]  # fmt: skip
    momentum = [0.1, None, 0, 1, -1, float("nan"), 1e308, "m", [0.1], torch.tensor(0.1), True]
    eps = [1e-5, 0.0, -1.0, float("nan"), float("inf"), 1e300, 1, "e", None, [1e-5]]
    flags = [True, False, None, 1, 0, "t", 2.5]
    masks = [
        (True,) * 4, (True, False, False, False), (False, True, False, True), (False, False, True, False), (False,) * 4,
        [True] * 4, (False, False, False, True), (True, True), (True,) * 3, (), None, "abcd", (1, 0, 1, 1), (None,) * 4,
    ]  # fmt: skip
    activations = [
        "identity", "relu", "leaky_relu", "relu6", "elu", "silu", "hardswish", "gelu", "sigmoid", "tanh",
        "", "Relu", "softplus", "relu\0", "\ud800", None, 3, b"relu",
    ]  # fmt: skip
    params = [None, 0.2, -1.0, float("nan"), float("inf"), 0, 1, "p", [0.1], torch.tensor(0.1), True]
    counts = [40, 2, 1, 0, -1, -(2**62), 2**62, 2**63, 2**80, 1.5, None, "n"]
    x, p = tensors_like_inputs(), tensors_like_parameters()
    residuals = [None, *x]
    return {
        "forward": [x, p, p, moments(), eps, activations, params, residuals],
        "backward": [x, x, p, moments()[1:] + [None], eps, flags, masks, activations, params, p, residuals],
        "update_running_stats": [moments()[1:], counts, momentum, p[1:], p[1:], counter],
        "batch_norm": [x, p, p, p, p, counter, flags, momentum, eps, activations, params, residuals],
        "ghost_batch_norm": [x, p, p, p, p, counter, momentum, eps, [2, 4, 3, 1, *counts[1:], 2**63 - 1]],
        "stats": [x],
        "gather_stats": [all_stats(), momentum, p, p, counter],
        "backward_reduce": [x, x, p, all_stats()[1:], eps, activations, params, p, residuals],
        "backward_elemt": [x, x, p, all_stats()[1:], moments()[1:], eps, flags, activations, params, p, residuals],
    }


def one_at_a_time(lists):
    """Every bad value among good ones."""
    for position, values in enumerate(lists):
        for value in values:
            yield [value if i == position else options[0] for i, options in enumerate(lists)]


def mixtures(lists, seed, count):
    """Random combinations; half of the arguments good, so that checks behind the first are reached."""
    source = random.Random(seed)
    for _ in range(count):
        yield [options[0] if source.random() < 0.5 else source.choice(options) for options in lists]


def fresh(value):
    """A copy of small dense tensors: calls write into their arguments."""
    plain = type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized
    if plain and value.numel() < 2**20 and not value.requires_grad and value.is_contiguous():
        return value.clone()
    return value


def assert_right(name, arguments, result):
    """Where a call to forward is accepted, its numbers are those of the formula in float64."""
    from fastbn import activations

    if name in ("stats", "forward") and arguments[0].is_meta:
        return
    if name == "stats":
        x = arguments[0].detach().double().transpose(0, 1).flatten(1)
        assert result.dtype == torch.float64 and result.shape == (3, len(x)) and (result[2] == x.shape[1]).all()
        if x.numel() and torch.isfinite(x).all():
            torch.testing.assert_close(result[0], x.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(result[1], x.var(1, correction=0), rtol=1e-5, atol=1e-8)
    if name != "forward":
        return
    x, weight, bias, given, eps, activation, param, residual = arguments
    activation = activation.decode() if isinstance(activation, bytes) else activation
    output, found = result
    assert output.shape == x.shape and output.dtype == x.dtype, "shape or dtype of the output"
    assert found.dtype == torch.float64 and found.shape == (2, x.shape[1]), "form of the moments"
    if x.numel() == 0:
        return
    wide, axes, view = x.detach().double(), [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    mean, var = (wide.mean(axes), wide.var(axes, correction=0)) if given is None else given
    y = (wide - mean.view(view)) / (var.view(view) + float(eps)).sqrt()
    y = y if weight is None else y * weight.detach().double().reshape(view)
    y = y if bias is None else y + bias.detach().double().reshape(view)
    y = y if residual is None else y + residual.detach().double()
    # An operator takes whatever is a number, as it does for eps; activations.check asks for a float.
    param = activations.check(activation, None if param is None else float(param))
    y = activations.ACTIVATIONS[activation].forward(y, param)
    if torch.isfinite(y).all() and y.abs().max() < 6e4:
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(x.dtype, 1e-4)
        torch.testing.assert_close(output.detach().double(), y, rtol=tolerance, atol=tolerance)


def function(name):
    from fastbn import _C, ops

    return getattr(_C if name in ("batch_norm", "ghost_batch_norm") else ops, name)


def child(name, mode, seed, count):
    lists = choices()[name]
    made = one_at_a_time(lists) if mode == "single" else mixtures(lists, seed, count)
    tally = {"returned": 0, "raised": 0, "deferred": 0}
    for arguments in made:
        arguments = [fresh(a) for a in arguments]
        try:
            result = function(name)(*arguments)
        except ERRORS as error:
            assert str(error).strip(), "an error without a message"
            tally["raised"] += 1
        else:
            tally["deferred" if result is NotImplemented else "returned"] += 1
            if result is not NotImplemented:
                assert_right(name, arguments, result)
    print(json.dumps(tally))


def run_child(*arguments):
    """The tally of a child process; a crash of it is this test's failure, with what it said last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", __file__, *map(str, arguments)],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def refused(name, tally):
    """Batch norm may leave what is not plain to the Python way, which checks it; the others have to raise."""
    assert name in ("batch_norm", "ghost_batch_norm") or tally["deferred"] == 0
    return tally["raised"] + tally["deferred"]


FUNCTIONS = (
    "forward", "backward", "update_running_stats", "batch_norm", "ghost_batch_norm", "stats", "gather_stats",
    "backward_reduce", "backward_elemt",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_bad_argument(name):
    tally = run_child(name, "single", 0, 0)
    least = 15 if name == "stats" else 20  # it has but one argument
    assert tally["returned"] >= 5 and refused(name, tally) >= least, tally


@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_mixtures(name):
    tally = run_child(name, "mixed", 0, 2000)
    assert sum(tally.values()) == 2000 and tally["returned"] > 5 and refused(name, tally) > 100, tally


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_random_mixtures(name, seed):
    assert sum(run_child(name, "mixed", seed, 12000).values()) == 12000


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_numbers_of_arguments(name):
    for count in (0, 2, 20):
        with pytest.raises((TypeError, RuntimeError)):
            function(name)(*[None] * count)
    with pytest.raises((TypeError, RuntimeError)):
        function(name)(nonsense=1)


@pytest.mark.sanitize
@pytest.mark.parametrize("moments_shape", [(2, 4), (2, 2), (1, 3), (3, 2), (6,), (2, 3, 1), (2, 0)], ids=str)
def test_mis_sized_moments_are_refused(moments_shape):
    from fastbn import ops

    x, wrong = torch.randn(GOOD), torch.ones(moments_shape, dtype=torch.float64)
    stats = torch.zeros(3), torch.ones(3)
    for call in (
        lambda: ops.forward(x, None, None, wrong, 1e-5),
        lambda: ops.backward(x, x, None, wrong, 1e-5, True, (True,) * 4),
        lambda: ops.update_running_stats(wrong, 40, 0.1, *stats, None),
        lambda: ops.backward_elemt(x, x, None, torch.ones(3, 3).double(), wrong, 1e-5, False),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", [(3, 4), (3, 2), (2, 3), (4, 3), (9,), (3, 3, 1), (1, 3, 3, 1), (3, 0)], ids=str)
def test_mis_sized_batch_stats_are_refused(sizes):
    from fastbn import ops

    x, wrong = torch.randn(GOOD), torch.ones(sizes, dtype=torch.float64)
    for call in (
        lambda: ops.gather_stats(wrong, 0.1, torch.zeros(3), torch.ones(3), None),
        lambda: ops.gather_stats(wrong[None], 0.1, torch.zeros(3), torch.ones(3), None),
        lambda: ops.backward_reduce(x, x, None, wrong, 1e-5),
        lambda: ops.backward_elemt(x, x, None, wrong, torch.ones(2, 3).double(), 1e-5, False),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@pytest.mark.sanitize
def test_operators_are_right():
    """The happy path of each, by numbers."""
    from fastbn import ops

    x, dy, weight, bias = torch.randn(GOOD), torch.randn(GOOD), torch.randn(3), torch.randn(3)
    leaf, parameters = (
        x.clone().requires_grad_(),
        [weight.clone().requires_grad_(), bias.clone().requires_grad_()],
    )
    expected = torch.nn.functional.batch_norm(leaf, None, None, *parameters, True, 0.1, 1e-5)
    grads = torch.autograd.grad(expected, [leaf, *parameters], dy)
    output, found = ops.forward(x, weight, bias, None, 1e-5)
    torch.testing.assert_close(output, expected.detach())
    for mask in itertools.product((True, False), repeat=4):
        results = ops.backward(dy, x, weight, found, 1e-5, True, mask)
        for ours, right, wanted in zip(results, (*grads, dy), mask, strict=True):
            assert (ours.numel() > 0) == wanted
            if wanted:
                torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    mean, var = torch.zeros(3), torch.ones(3)
    ops.update_running_stats(found, 40, 0.1, mean, var, None)
    torch.testing.assert_close(mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var((0, 2, 3)))
    ops.update_running_stats(found, 40, None, mean, var, torch.tensor(1))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    all_stats = torch.stack([ops.stats(x[:1]), ops.stats(x[:0]), ops.stats(x[1:])])
    batch_stats = ops.gather_stats(all_stats, 1.0, mean, var, None)
    torch.testing.assert_close(batch_stats, torch.cat([found, torch.full((1, 3), 40.0)]))
    torch.testing.assert_close(var, x.var((0, 2, 3)))
    total = ops.backward_reduce(dy[:1], x[:1], weight, batch_stats, 1e-5) + ops.backward_reduce(
        dy[1:], x[1:], weight, batch_stats, 1e-5
    )
    torch.testing.assert_close(total.float(), torch.stack(grads[1:]), rtol=1e-5, atol=1e-5)
    parts = [
        ops.backward_elemt(dy[i], x[i], weight, batch_stats, total, 1e-5, True) for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat([dx for dx, _ in parts]), grads[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([dr for _, dr in parts]), dy)


def test_the_operators_check_as_well():
    forward = torch.ops.fastbn.forward
    x = torch.randn(GOOD)
    wrong = [
        (x, torch.randn(2), None, None, 1e-5),
        (x.long(), None, None, None, 1e-5),
        (x, None, None, torch.ones(2, 3), 1e-5),
        (torch.tensor(1.0), None, None, None, 1e-5),
    ]
    for arguments in wrong:
        with pytest.raises(ERRORS):
            forward(*arguments)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
