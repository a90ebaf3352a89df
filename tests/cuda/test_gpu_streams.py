"""Streams, threads and devices: work goes to the current stream and device, and results do not depend on them."""

import ctypes
import threading

import pytest
import torch
from on_gpu import KINDS, SMALL, assert_same_bits, kinds, problem, step
from reference import check

from fastbn.functional import batch_norm

pytestmark = pytest.mark.cuda


@kinds
def test_the_current_stream_is_used(shape):
    """On another stream the input is written late: a kernel on the default stream would read it too early."""
    x, dy, weight, bias = problem(shape)
    expected = step(x, dy, weight, bias)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = step(late, dy, weight, bias)
    stream.synchronize()
    assert_same_bits(found, expected, "on a second stream")


@kinds
def test_backward_runs_on_the_stream_of_forward(shape):
    x, dy, weight, bias = problem(shape)
    expected = step(x, dy, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
    y.backward(dy)  # called from the default stream
    torch.cuda.synchronize()
    assert_same_bits([y.detach(), *(t.grad for t in leaves)], expected, "with backward called from another stream")


@kinds
def test_many_streams_at_once(shape):
    """Barriers and tickets of one stream must not count for another."""
    problems = [problem(shape) for _ in range(6)]
    expected = [step(*p) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*p))
        torch.cuda.synchronize()
        for results, right in zip(found, expected, strict=True):
            assert_same_bits(results, right, "beside other streams")


def test_threads_with_streams_of_their_own():
    problems = [problem(KINDS["groups"]) for _ in range(4)]
    expected, failures = [step(*p) for p in problems], []
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results = step(*problems[i])
                torch.cuda.current_stream().synchronize()
                failures.extend(1 for a, b in zip(results, expected[i], strict=True) if not torch.equal(a, b))

    pool = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in pool]
    [t.join() for t in pool]
    assert not failures


def test_a_stream_that_torch_did_not_make():
    """Its handle may come back as another stream's: its counters are of one call alone."""
    libcuda = ctypes.CDLL("libcuda.so.1")
    x, dy, weight, bias = problem(KINDS["groups"])
    expected = step(x, dy, weight, bias)
    torch.cuda.synchronize()
    for _ in range(3):
        handle = ctypes.c_void_p()
        assert libcuda.cuStreamCreate(ctypes.byref(handle), 1) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
            found = step(x, dy, weight, bias)
        torch.cuda.synchronize()
        assert_same_bits(found, expected, "on an external stream")
        del found
        torch.cuda.synchronize()
        assert libcuda.cuStreamDestroy_v2(handle) == 0
    # cudaStreamPerThread; forward only, as backward runs in a thread of autograd, where it is another stream
    with torch.cuda.stream(torch.cuda.ExternalStream(2)), torch.no_grad():
        y = batch_norm(x, None, None, weight, bias, True)
    torch.cuda.synchronize()
    assert torch.equal(y, expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@kinds
def test_a_second_device_that_is_not_current(shape):
    call = problem(shape)
    expected = step(*call)
    found = step(*(t.to("cuda:1") for t in call))
    assert torch.cuda.current_device() == 0
    assert found[0].device == torch.device("cuda:1")
    assert_same_bits([t.to("cuda:0") for t in found], expected, "on another device")


def test_the_cpu_is_still_there():
    """A build with CUDA computes tensors of the CPU there."""
    check(torch.randn(SMALL))
    assert batch_norm(torch.randn(SMALL), None, None, training=True).is_cpu
