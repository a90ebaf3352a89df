"""The same bits in every run and with any number of threads; each instruction set passes a part of the parity tests."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import inputs
import pytest
import torch

import fastbn
from fastbn.functional import batch_norm

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
CAPABILITIES = ("baseline", "avx2", "avx512")
CASES = [
    (inputs.contiguous, (8, 64, 28, 28)),
    (inputs.channels_last, (8, 64, 28, 28)),
    (inputs.contiguous, (64, 256, 7, 7)),
    (inputs.channels_last, (64, 256, 7, 7)),
    (inputs.contiguous, (16, 3, 112, 112)),
    (inputs.contiguous, (1, 2, 700, 701)),
    (inputs.contiguous, (4096, 65)),
    (inputs.contiguous, (70000, 2)),
    (inputs.channels_last, (3, 1000, 14, 14)),
    (inputs.offset, (16, 33, 3, 31, 7)),
    (inputs.contiguous, (5, 3, 2, 2)),
    (inputs.contiguous, (2, 1, 300000)),
]


def step(x, dy, weight, bias, training=True):
    """Everything that a training step computes, statistics included."""
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = batch_norm(leaves[0], mean, var, leaves[1], leaves[2], training, 0.1, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var]


def assert_same_bits(found, expected, what):
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
    for name, a, b in zip(names, found, expected, strict=True):
        assert torch.equal(a, b), f"{name} differs {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_bits_do_not_depend_on_the_run_or_the_thread_count(device, threads, case, dtype):
    layout, shape = case
    x, dy = layout(shape, dtype=dtype, device=device), torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype)
    for training in (True, False):
        threads(1)
        expected = step(x, dy, weight, bias, training)
        assert_same_bits(step(x, dy, weight, bias, training), expected, "on a repeat")
        for count in (2, 3, 4):
            threads(count)
            assert_same_bits(step(x, dy, weight, bias, training), expected, f"with {count} threads")


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(7, 40, 64, 64), (1, 80, 64, 64), (3, 400, 28, 28), (5, 900, 14, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_batch_for_each_thread_change_nothing(device, threads, shape, dtype):
    """Passes without sums go by samples, as many parts as there are threads: eval, and the input's gradient in it."""
    x, residual, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    mean, var, weight, bias = torch.rand(4, shape[1], device=device).to(dtype)

    def step():
        leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
        y = batch_norm(leaves[0], mean, var, weight, bias, activation="relu", residual=leaves[1])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    threads(1)
    expected = step()
    for count in (2, 3, 4, 8):
        threads(count)
        for name, a, b in zip(("output", "grad_input", "grad_residual"), step(), expected, strict=True):
            assert torch.equal(a, b), f"{name} differs with {count} threads"
    exact = [t.double().requires_grad_() for t in (x, residual)]
    z = torch.nn.functional.batch_norm(exact[0], *(t.double() for t in (mean, var, weight, bias))) + exact[1]
    y = z.relu()
    close = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    sure = z.abs() > close  # where the mask cannot depend on rounding
    for a, b in zip(expected, (y, *torch.autograd.grad(y, exact, dy.double())), strict=True):
        torch.testing.assert_close(a.double()[sure], b.detach()[sure], rtol=close, atol=close)


def test_bits_do_not_depend_on_other_work_in_the_process(device):
    x, dy = torch.randn(8, 32, 28, 28, device=device), torch.randn(8, 32, 28, 28, device=device)
    weight, bias = torch.randn(2, 32, device=device)
    expected = step(x, dy, weight, bias)
    for size in (1, 1000, 100000):
        torch.randn(size).sort()
        assert_same_bits(step(x, dy, weight, bias), expected, "after other work")


def test_a_module_trains_to_the_same_bits(device, threads):
    states = []
    for count in (1, 2, 4):
        threads(count)
        torch.manual_seed(3)
        bn = fastbn.BatchNorm2d(16, device=device)
        for _ in range(4):
            y = bn(torch.randn(8, 16, 15, 15, device=device, requires_grad=True))
            y.square().sum().backward()
            with torch.no_grad():
                bn.weight -= 0.1 * bn.weight.grad
        states.append(bn.state_dict())
    assert all(torch.equal(s[name], states[0][name]) for s in states for name in s)


def python(code, capability=None):
    """Run code in a fresh interpreter with FASTBN_CPU_CAPABILITY set, or not set at all."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTBN_CPU_CAPABILITY"}
    if capability is not None:
        environment["FASTBN_CPU_CAPABILITY"] = capability
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else code)]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)


@pytest.fixture(scope="module")
def best():
    done = python("from fastbn import _C; print(_C.cpu_capability())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in CAPABILITIES
    return done.stdout.strip()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "capability", [pytest.param(name, marks=[pytest.mark.slow] * (name == "avx2")) for name in CAPABILITIES]
)
def test_each_capability(best, capability):
    """One lower than the best passes a subset of the parity tests; one that is missing is refused in one line."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        done = python("import fastbn", capability)
        assert done.returncode != 0 and "FASTBN_CPU_CAPABILITY" in done.stderr.splitlines()[-1]
        return
    done = python("from fastbn import _C; print(_C.cpu_capability())", capability)
    assert done.stdout.strip() == capability, done.stderr
    if capability == best:
        return  # which all the other tests run with
    chosen = (
        "test_shapes or test_row_lengths or test_channel_counts or constant_channel or no_multiple or gradients_of_some"
    )
    files = [f"functional/test_{name}.py" for name in ("parity", "numerics", "layouts", "epilogue")]
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "sanitize", "-k", chosen, *files], capability)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 200, "the subset has become empty"


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES[:2])
def test_lower_capabilities_pass_everything_numerical(best, capability):
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this machine has {best} only")
    files = [f"functional/test_{name}.py" for name in ("parity", "numerics", "layouts", "sizes", "epilogue")]
    done = python([*PYTEST, "-m", "not slow", *files], capability)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.cpu
@pytest.mark.parametrize("value", ["avx1024", "AVX2 ", "", "none"])
def test_unknown_capabilities_are_refused(value):
    done = python("import fastbn", value)
    if value == "":  # an empty variable is one that is not set
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "FASTBN_CPU_CAPABILITY" in done.stderr.splitlines()[-1]


@pytest.mark.cpu
def test_capabilities_agree_closely(best):
    """Not in bits, as vectors of another width sum in another order; to a few units in the last place."""
    code = (
        "import sys, torch, fastbn; torch.manual_seed(0); x = torch.randn(8, 33, 14, 14, requires_grad=True);"
        "bn = fastbn.BatchNorm2d(33); y = bn(x); y.pow(3).sum().backward();"
        "torch.save([y.detach(), x.grad, bn.weight.grad, bn.running_var], sys.argv[1])"
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for capability in CAPABILITIES[: CAPABILITIES.index(best) + 1]:
            path = os.path.join(folder, capability)
            done = python(["-c", code, path], capability)
            assert done.returncode == 0, done.stderr
            results.append(torch.load(path))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
