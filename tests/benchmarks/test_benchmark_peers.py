"""The benchmark of the CPU: adapters of peers, results that are checked before they are timed, accuracy, models."""

import dataclasses
import os
import random

import pytest
import torch
from benchmark_cases import QUICK, measured, small_case

pytestmark = pytest.mark.cpu


def test_every_adapter_here_passes_the_check(bench):
    """Those that can be imported. What they cannot do is reported, and nothing of theirs is wrong or failed."""
    from peers import OTHERS, available

    here, missing = available(OTHERS)
    assert "torch separate" in here and set(here) | set(missing) == set(OTHERS)
    assert all(missing.values()), "a reason for each that is not there"
    here.remove("torch.compile")  # it takes its time, in a test of its own
    for epilogue in ("", "relu", "add+relu"):
        for layout in ("contiguous", "channels_last"):
            records = measured(small_case(bench, layout=layout, epilogue=epilogue), ["fastbn", "torch", *here])
            assert {r["kind"] for r in records} <= {"case", "fused", "unsupported"}
            reported = {r["peer"] for r in records if r["kind"] == "unsupported"}
            timed = {v for r in records if r["kind"] != "unsupported" for v in r["seconds"]}
            assert timed | reported >= {"fastbn", "torch", "fastbn again", "copy", *here}


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", ["", "add+relu"])
def test_torch_compile_passes_the_check(bench, epilogue):
    records = measured(small_case(bench, epilogue=epilogue), ["fastbn", "torch", "torch.compile"])
    assert all("torch.compile" in r["seconds"] for r in records)


def test_jax_computes_what_torch_does(bench):
    pytest.importorskip("jax")
    torch.set_num_threads(os.cpu_count())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in ("contiguous", "channels_last"):
            for epilogue in ("", "add+relu"):
                case = small_case(bench, dtype=dtype, layout=layout, epilogue=epilogue)
                assert all("jax" in r["seconds"] for r in measured(case, ["fastbn", "torch", "jax"]))


def wrong(epilogue_error):
    """A peer whose output is off by a percent."""
    from peers import PEERS, Ended

    class Wrong(Ended):
        def forward(self, x, residual=None):
            return super().forward(x, residual) * (1 + epilogue_error)

    return dataclasses.replace(
        PEERS["torch"], make=lambda module, epilogue: Wrong(PEERS["torch"].make(module, ""), epilogue, in_place=False)
    )


@pytest.mark.parametrize("epilogue", ["", "relu", "add+relu"])
def test_a_wrong_peer_is_reported_and_not_timed(bench, monkeypatch, epilogue):
    import peers

    monkeypatch.setitem(peers.PEERS, "timm", dataclasses.replace(wrong(0.01), slack=1.0))
    records = measured(small_case(bench, epilogue=epilogue), ["fastbn", "torch", "timm"])
    (reported,) = [r for r in records if r["kind"] == "wrong"]
    assert reported["peer"] == "timm" and "y is wrong by" in reported["error"]
    rest = [r for r in records if r["kind"] in ("case", "fused")]
    assert rest and all("timm" not in r["seconds"] and "torch" in r["seconds"] for r in rest)


@pytest.mark.parametrize("epilogue", ["", "add+relu"])
def test_wrong_gradients_are_seen(bench, epilogue):
    """The check alone, with one output at a time spoilt."""
    from check import Mismatch, Reference
    from peers import PEERS, ModuleRunner

    case = small_case(bench, epilogue=epilogue)
    tensors = bench.make_tensors(case, 0)
    outputs = ModuleRunner(PEERS["fastbn"], case, [tensors]).outputs()
    reference = Reference(tensors, epilogue)
    reference.check(outputs, 1.0)
    assert set(reference.errors(outputs)) == set(outputs)
    assert max(reference.errors(outputs).values()) < 1e-5
    for name in outputs:
        with pytest.raises(Mismatch, match=name):
            reference.check({**outputs, name: outputs[name] * 1.01}, 1.0)
    with pytest.raises(Mismatch, match="strides"):
        reference.check({**outputs, "y": outputs["y"].to(memory_format=torch.channels_last)}, 1.0)


def test_a_peer_that_raises_does_not_stop_the_others(bench, monkeypatch):
    import peers

    def broken(module, epilogue):
        raise RuntimeError("broken\nin many lines")

    class Tired(torch.nn.BatchNorm2d):
        """Works in training and raises in eval, after the check."""

        calls = 0

        def forward(self, x):
            type(self).calls += not self.training
            if type(self).calls > 1:
                raise RuntimeError("tired")
            return super().forward(x)

    def tired(module, epilogue):
        made = Tired(module.num_features)
        made.load_state_dict(module.state_dict())
        return made

    monkeypatch.setitem(peers.PEERS, "timm", dataclasses.replace(peers.PEERS["torch"], make=broken))
    monkeypatch.setitem(peers.PEERS, "jax", dataclasses.replace(peers.PEERS["torch"], make=tired))
    records = measured(small_case(bench), ["fastbn", "timm", "torch", "jax"])
    failed = [(r["peer"], r.get("pass"), r["error"]) for r in records if r["kind"] == "failed"]
    assert failed == [("timm", None, "RuntimeError: broken"), ("jax", "eval", "RuntimeError: tired")]
    cases = {r["pass"]: r["seconds"] for r in records if r["kind"] == "case"}
    assert set(cases) == {"forward", "forward+backward", "eval"} and "torch" in cases["eval"]
    assert "jax" in cases["forward"] and "jax" not in cases["eval"]


def test_accuracy_tells_a_bad_formula(bench, monkeypatch):
    """E[x^2] - E[x]^2 in float32 loses everything where the mean is large."""
    import accuracy
    import peers

    class Naive(torch.nn.BatchNorm2d):
        def forward(self, x):
            dims = (0, 2, 3)
            mean, square = x.mean(dims, keepdim=True), (x * x).mean(dims, keepdim=True)
            var = (square - mean * mean).clamp(min=0)
            w, b = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias))
            return (x - mean) * (var + self.eps).rsqrt() * w + b

    def naive(module, epilogue):
        made = Naive(module.num_features)
        made.load_state_dict(module.state_dict())
        return made

    monkeypatch.setattr(accuracy, "SHAPE", (4, 4, 9, 9))
    monkeypatch.setitem(peers.PEERS, "timm", dataclasses.replace(peers.PEERS["torch"], make=naive))
    records = list(accuracy.measure_accuracy(torch.float32, "contiguous", ["fastbn", "torch", "timm"], 0))
    error = {(r["peer"], r["mean"], r["std"]): r["errors"]["y"] for r in records}
    assert len(error) == 3 * len(accuracy.REGIMES)
    assert error["timm", 1e4, 1.0] > 1000 * error["fastbn", 1e4, 1.0]
    assert error["fastbn", 1e4, 1.0] < 1e-6 and error["timm", 0.0, 1.0] < 1e-5


@pytest.fixture
def tiny_network(bench, monkeypatch):
    import models
    import networks

    class Tiny(torch.nn.Sequential):
        def __init__(self):
            layers = [*networks.conv_bn(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
            super().__init__(*layers, torch.nn.Linear(4, 1000))

    monkeypatch.setitem(networks.NETWORKS, "tiny", Tiny)
    monkeypatch.setattr(models, "peak_memory", lambda *_: 1)
    return models


def test_a_model_is_measured(tiny_network):
    from timing import Protocol

    (record,) = tiny_network.measure_model("tiny", 2, 8, Protocol(QUICK, most_rounds=3), random.Random(0))
    assert set(record["seconds"]) == {"torch", "convert", "convert(fuse=True)", "torch again"}
    assert set(record["peak_bytes"]) == {"torch", "convert", "convert(fuse=True)"}


def test_a_model_that_learns_something_else_is_not_timed(tiny_network, monkeypatch):
    from timing import Protocol

    import fastbn

    def bad(module, fuse=False):
        module[1].eps = 1e-3
        return module

    monkeypatch.setattr(fastbn, "convert", bad)
    records = list(tiny_network.measure_model("tiny", 2, 8, Protocol(QUICK, most_rounds=3), random.Random(0)))
    assert [r["kind"] for r in records] == ["wrong", "wrong", "model"]
    assert set(records[2]["seconds"]) == {"torch", "torch again"}


@pytest.mark.slow
def test_memory_of_a_model_is_measured_in_a_process_of_its_own(bench):
    from models import peak_memory

    peak = peak_memory("MobileNetV2", "torch", 2, 32, "cpu")
    assert 3.5e6 * 4 < peak < 2e9, "gradients at the least"
