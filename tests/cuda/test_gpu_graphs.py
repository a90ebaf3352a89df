"""Batch norm in captured CUDA graphs, held against the same call without a graph."""

import copy

import pytest
import torch
from on_gpu import KINDS, SMALL, assert_same_bits, kinds, problem, step, training

import fastbn

pytestmark = pytest.mark.cuda


def captured(shape, train=True):
    """A graph of a whole step, its inputs and results."""
    x, dy, weight, bias = problem(shape)
    mean, var = torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(x, dy, weight, bias, mean.clone(), var.clone(), train)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, dy, weight, bias, mean, var, train)
    return graph, (x, dy, weight, bias), (mean, var), results


@kinds
@training
def test_capture_and_replay(shape, training):
    graph, call, stats, results = captured(shape, training)
    stats[0].zero_(), stats[1].fill_(1)
    for seed in range(3):
        torch.manual_seed(seed)
        call[0].normal_(seed, 1 + seed)
        own = [s.clone() for s in stats]
        graph.replay()
        torch.cuda.synchronize()
        expected = step(*call, *own, training)
        assert_same_bits(results, expected, "in a graph")
        assert_same_bits(stats, own, "in a graph, of the running statistics")


def test_two_graphs_replayed_at_the_same_time():
    graphs = [captured(KINDS["groups"]) for _ in range(2)]
    expected = [step(*call) for _, call, _, _ in graphs]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, *_) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (*_, results), right in zip(graphs, expected, strict=True):
        assert_same_bits(results, right, "beside another graph")


def test_a_graph_beside_eager_calls():
    graph, call, _, results = captured(KINDS["groups"])
    other = problem(KINDS["groups"])
    expected, right = step(*call), step(*other)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(stream):
            graph.replay()
        found = step(*other)
    torch.cuda.synchronize()
    assert_same_bits(results, expected, "beside eager calls")
    assert_same_bits(found, right, "beside a graph")


@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}], ids=str)
def test_make_graphed_callables(kwargs):
    torch.manual_seed(0)
    eager = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3), fastbn.BatchNorm2d(6, **kwargs)).cuda()
    twin = copy.deepcopy(eager)
    sample = torch.randn(SMALL, device="cuda", requires_grad=True)
    state = copy.deepcopy(eager.state_dict())
    graphed = torch.cuda.make_graphed_callables(eager, (sample,))
    eager.load_state_dict(state)
    for _ in range(3):
        grads = []
        x = torch.randn(SMALL, device="cuda")
        for model in (graphed, twin):
            leaf = x.clone().requires_grad_()
            model(leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(eager.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-3)
    assert eager[1].num_batches_tracked == 3
