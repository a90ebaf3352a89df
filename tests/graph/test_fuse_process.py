"""fastbn.convert(fuse=True): threads, random generators, errors, and how often a forward is captured."""

import copy
import random
import subprocess
import sys
import threading

import pytest
import torch
from fusing import RELU, ResNet, conv, images, simple
from torch import fx, nn
from torch.nn import functional as F

import fastbn
from fastbn.graph import effects, matching

pytestmark = pytest.mark.cpu


def test_threads_convert_and_call_at_once():
    """All are fused, also after Dynamo has captured in two threads at once."""
    problems = []

    def work():
        try:
            for _ in range(3):
                model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), fuse=True)
                model(images(dtype=torch.float32))
                if fastbn.report(model).fused != {"1": RELU}:
                    problems.append(fastbn.report(model))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_convert_changes_nothing_of_the_process():
    """No trace runs until the model is called: random generators, builtins and torch.nn.Module stay as they are."""
    before = torch.get_rng_state(), random.getstate(), isinstance, dict(vars(nn.Module))
    fastbn.convert(ResNet(), fuse=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), fuse=True)
    assert torch.equal(torch.rand(3), expected)
    assert (random.getstate(), isinstance, dict(vars(nn.Module))) == before[1:]
    x = images(dtype=torch.float32)
    torch.manual_seed(5)
    model(x)
    assert torch.equal(torch.rand(3), expected), "nor does the capture draw"


def test_a_capture_leaves_the_draws_of_other_threads():
    """Dynamo puts torch's generator back after a capture, and what was drawn meanwhile came a second time."""
    stop, drawn = threading.Event(), []

    def draw():
        while not stop.is_set():
            drawn.append(torch.randint(0, 2**62, ()).item())

    functions = torch.random.set_rng_state, torch.cuda.set_rng_state
    other = threading.Thread(target=draw)
    other.start()
    try:
        for _ in range(3):
            model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), fuse=True)
            model(images(dtype=torch.float32))
    finally:
        stop.set()
        other.join()
    assert len(drawn) > 100 and len(set(drawn)) == len(drawn)
    assert (torch.random.set_rng_state, torch.cuda.set_rng_state) == functions


FORKS = """
import os, signal, threading, torch
from fastbn.graph.generators import left_alone

function, stop = torch.random.set_rng_state, threading.Event()

def open_regions():
    while not stop.is_set():
        with left_alone():
            pass

others = [threading.Thread(target=open_regions) for _ in range(2)]
for other in others:
    other.start()
right = 0
for _ in range(100):
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)  # ends a child that waits for a lock
        alone = torch.random.set_rng_state is function
        with left_alone():
            replaced = torch.random.set_rng_state is not function
        os._exit(0 if alone and replaced and torch.random.set_rng_state is function else 1)
    if os.waitpid(pid, 0)[1] != 0:
        break
    right += 1
stop.set()
for other in others:
    other.join()
print(right, torch.random.set_rng_state is function)
"""


def test_a_fork_during_captures_of_other_threads():
    """The child neither waits for a lock of a thread that it does not have, nor keeps what that thread replaced."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True)
    assert done.stdout == "100 True\n", (done.stdout, done.stderr[-2000:])


def test_a_forward_that_draws_gets_the_numbers_of_the_unfused_one():
    def forward(self, x):
        x = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)
        return x + torch.rand(1, dtype=x.dtype) + torch.randn_like(x)

    model = simple(forward)
    fused = fastbn.convert(copy.deepcopy(model), fuse=True)
    x = images(dtype=torch.float32)
    results = []
    for m in (model, fused):
        torch.manual_seed(5)
        results.append([*(m(x) for _ in range(3)), torch.rand(3)])
    torch.testing.assert_close(results[1], results[0])
    assert fastbn.report(fused).fused


def test_a_forward_may_set_the_generator():
    def forward(self, x):
        state = torch.random.get_rng_state()
        x = F.relu(self.bn(self.conv(x))) + torch.rand(1, dtype=x.dtype)
        torch.random.set_rng_state(state)
        return x

    model, x = fastbn.convert(simple(forward), fuse=True), images(dtype=torch.float32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model(x)
    assert torch.equal(torch.rand(3), expected)


def test_an_error_in_a_forward_is_the_models_own():
    model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), fuse=True)
    with pytest.raises(RuntimeError, match="to have 6 channels, but got 5") as raised:
        model(torch.randn(2, 5, 4, 4))
    assert type(raised.value) is RuntimeError
    model(torch.randn(2, 6, 4, 4))
    assert fastbn.report(model).fused == {"1": RELU}


def test_many_modes_dtypes_layouts_and_sizes_stay_fused(monkeypatch):
    """More captures than the eight that Dynamo allows by default."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    ours = fastbn.convert(copy.deepcopy(model), fuse=True)
    for dtype in (torch.float32, torch.float64):
        for m in (ours, model):
            m.to(dtype)
        for training in (True, False):
            for grad in (True, False):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    for size in (4, 6, 7):
                        x = torch.randn(2, 3, size, 5, dtype=dtype).contiguous(memory_format=memory_format)
                        with torch.set_grad_enabled(grad):
                            torch.testing.assert_close(ours.train(training)(x), model.train(training)(x))
    monkeypatch.setattr(matching, "batch_norm", None)
    with pytest.raises(TypeError, match="NoneType"):
        ours(x)  # the last capture still calls the fused batch norm


def test_a_forward_that_counts_is_not_captured_for_each_number(monkeypatch):
    def counts(self, x):
        self.steps += 1
        return F.relu(self.bn(self.conv(x)))

    captures = []
    original = matching.find
    monkeypatch.setattr(matching, "find", lambda graph: captures.append(1) or original(graph))
    model = simple(counts)
    model.steps = 0
    model = fastbn.convert(model, fuse=True)
    for _ in range(12):
        model(images(dtype=torch.float32))
    assert model.steps == 12 and len(captures) <= 3


def test_module_compile_is_asked_first():
    """Whoever calls module.compile() gets the backend that was asked for."""
    graphs = []
    model = fastbn.convert(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), fuse=True)
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph)
    model(images(dtype=torch.float32))
    assert len(graphs) == 1


@pytest.mark.parametrize("keyword", [False, True])
def test_what_an_operator_writes_to_is_read_from_its_schema(keyword):
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    for node in (x, other):
        node.meta["example_value"] = torch.zeros(2)
    args, kwargs = ((), {"self": x, "other": other}) if keyword else ((x, other), {})
    node = graph.call_function(torch.ops.aten.mul_.Tensor, args, kwargs)
    assert effects.writes(node, lambda _: None) == effects.storages(x) != effects.storages(other)
