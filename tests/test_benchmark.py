"""The benchmark of the CPU: cases, adapters, the protocol of timing, runs that fail, stop and go on, and comparing two.
In: tiny cases and made-up records. Out: what the files of results must hold."""

import dataclasses
import io
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPES = [(8, 5, 2), (16, 3, 1)]
QUICK = 0.002


@pytest.fixture
def bench(monkeypatch, threads):
    """The folder's modules can be imported, and ResNet-50 is small."""
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import suite

    monkeypatch.setattr(suite, "RESNET50", SHAPES)
    return suite


@pytest.fixture
def console():
    from rich.console import Console

    return Console(file=io.StringIO(), width=160, highlight=False)


def printed(console):
    return console.file.getvalue()


def small_case(suite, **changed):
    return suite.Case(**{"suite": "resnet50", "shape": (2, 8, 5, 5), "dtype": torch.float32, "layout": "contiguous",
                         **changed})  # fmt: skip


def measured(case, peers=("fastbn", "torch"), sets=1):
    from comparing import measure_case
    from timing import Protocol

    records = measure_case(case, list(peers), Protocol(QUICK, least_rounds=3, most_rounds=5), seed=0, sets=sets)
    return [json.loads(json.dumps(record)) for record in records]


# --- suites and limits ---


def test_the_network_has_the_batch_norms_of_the_suite(monkeypatch):
    """ResNet-50 as models.py builds it, hooked while an image of 224 x 224 goes through."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import networks
    import suite

    network, found = networks.ResNet50(), {}
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, args, __: found.update({args[0].shape[1:3]: found.get(args[0].shape[1:3], 0) + 1})
            )
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 224, 224))
    assert found == {(channels, side): count for channels, side, count in suite.RESNET50}
    assert round(sum(p.numel() for p in network.parameters()) / 1e5) == 256
    mobile = networks.MobileNetV2()
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in mobile.modules()) == 52
    assert round(sum(p.numel() for p in mobile.parameters()) / 1e5) == 35


def test_every_suite_has_cases_and_their_least_bytes(bench):
    for name in bench.SUITES:
        cases = list(bench.cases(name, [torch.float32], ["contiguous", "channels_last"], 2, 10**5))
        assert cases, name
        assert len({str(case) for case in cases}) == len(cases), "names identify cases"
        for case in cases:
            assert case.nbytes == math.prod(case.shape) * case.dtype.itemsize
            assert case.passes["forward"] == (3 if case.ending == "add+relu" else 2)
            assert case.passes["forward+backward"] == (7 if case.ending == "add+relu" else 5)
    elements = [math.prod(c.shape) for c in bench.cases("scaling", [torch.float32], ["contiguous"], 1)]
    assert elements == sorted(elements) and elements[0] < 1.1e4 and 1e9 <= elements[-1] < 1.01e9


def test_bandwidths_and_cache(bench, monkeypatch):
    import limits

    monkeypatch.setattr(limits, "SIZES", [1 << 12, 1 << 16])
    limits_of = limits.bandwidth_records("begin", QUICK, random.Random(0))
    assert [r["bytes"] for r in limits_of] == limits.SIZES
    for r in limits_of:
        for name, streams in (("copy", 2), ("three streams", 3)):
            assert r["rates"][name] == streams * r["bytes"] / r["seconds"][name]["median"]
    assert limits.cache_bytes() >= 1 << 18


# --- timing ---


def test_torch_against_itself_is_1_within_its_noise(bench):
    """A third measurement of the same thing, which the noise has not been made from. The noise is of 99 % confidence:
    in a hundred runs one is outside, and two in a row in none."""
    from timing import Protocol, measure, noise

    case = small_case(bench, shape=(16, 32, 14, 14))
    module, x = bench.make_tensors(case, 0).module, bench.make_tensors(case, 0).x.detach()
    for _ in range(3):
        calls = {name: (lambda: module(x)) for name in ("torch", "torch again", "torch a third time")}
        times = measure(calls, Protocol(0.5), random.Random(0))
        allowed = noise(times, "torch a third time", "torch", again="torch again", first="torch")
        ratio = times["torch a third time"]["median"] / times["torch"]["median"]
        assert allowed < 0.5, "a noise that allows everything says nothing"
        if abs(math.log(ratio)) <= allowed:
            return
    pytest.fail(f"{ratio:.3f} is farther from 1 than {allowed:.1%}")


class Clock:
    """Samples that take what a script says."""

    def __init__(self, seconds):
        self.seconds, self.order = seconds, []

    def sample(self, call, repeats):
        name = call()
        self.order.append(name)
        return self.seconds[name]


def test_the_protocol(bench):
    from timing import Protocol, error, measure

    clock = Clock({"fast": 0.001, "slow": 0.3})
    times = measure({n: (lambda n=n: n) for n in clock.seconds}, Protocol(0.08), random.Random(1), clock.sample)
    assert len(times["fast"]["samples"]) == 20, "half of the time, in calls of 1 ms, of which every other is timed"
    assert len(times["slow"]["samples"]) == 5, "the least, whatever it takes"
    assert times["fast"]["median"] == 0.001 and error(times["fast"]) == 0
    turns = [i for i, name in enumerate(clock.order[3:]) if name == "slow"]
    assert turns[-1] - turns[0] > 15, "spread over the rounds"
    both = Clock({"a": 0.001, "b": 0.001})
    measure({n: (lambda n=n: n) for n in "ab"}, Protocol(0.04), random.Random(1), both.sample)
    pairs = ["".join(both.order[i : i + 2]) for i in range(4, len(both.order), 2)]
    assert set(pairs) == {"ab", "ba"}, "in turns, in random order"


def test_the_call_before_a_sample_is_of_the_same_variant(bench):
    from timing import Protocol, measure

    calls, before = [], {"a": [], "b": []}

    def sample(call, repeats):
        last = calls[-1:]
        before[call()] += last
        return 0.001

    measure({n: (lambda n=n: calls.append(n) or n) for n in "ab"}, Protocol(0.1), random.Random(1), sample)
    assert before["a"][-25:] == ["a"] * 25 and before["b"][-25:] == ["b"] * 25


def test_who_cannot_be_the_fastest_is_timed_once(bench):
    from timing import Protocol, measure

    clock = Clock({"ours": 0.005, "torch": 0.002, "other": 0.003, "hopeless": 0.005})
    protocol = Protocol(1.0, most_rounds=9, base="torch", others=("other", "hopeless"))
    times = measure({n: (lambda n=n: n) for n in clock.seconds}, protocol, random.Random(1), clock.sample)
    assert {n: len(t["samples"]) for n, t in times.items()} == {"ours": 9, "torch": 9, "other": 9, "hopeless": 1}


def test_noise_of_made_up_times(bench):
    from timing import noise, summary

    times = {"a": summary([1.0] * 5), "b": summary([2.0] * 5), "b again": summary([2.2] * 5)}
    assert noise(times, "a", "b", again="b again", first="b") == pytest.approx(math.log(1.1))
    times["a"] = summary([0.9, 1.0, 1.1, 1.0, 1.0, 1.2, 0.8])
    assert noise(times, "a", "b") > 0.05


def until_clear(monkeypatch, *runs):
    """What measure_until_clear makes of these runs, and how many it asked for."""
    import comparing
    from timing import Protocol

    left = list(runs)
    monkeypatch.setattr(comparing, "measure", lambda *_, **__: left.pop(0))
    found = comparing.measure_until_clear(dict.fromkeys(runs[0]), Protocol(1.0), random.Random(0), {})
    return found, len(runs) - len(left)


def test_what_was_disturbed_is_measured_once_more(bench, monkeypatch):
    from timing import summary

    calm = {"torch": summary([2.0, 2.1, 2.0]), "fastbn": summary([1.0, 1.1, 1.0])}
    wild = {**calm, "fastbn": summary([1.0, 3.0, 5.0])}
    assert until_clear(monkeypatch, calm, calm) == (calm, 1)
    assert until_clear(monkeypatch, wild, calm, calm) == (calm, 2)
    far = {"torch": summary([80.0, 90.0, 100.0]), "fastbn": wild["fastbn"]}
    assert until_clear(monkeypatch, far, {**far, "torch": far["fastbn"]}, far) == (far, 2)
    hopeless = {"torch": wild["fastbn"], "fastbn": wild["fastbn"]}
    assert until_clear(monkeypatch, hopeless, hopeless, hopeless) == (hopeless, 2), "more rounds would say nothing"


def test_rounds_go_on_until_it_is_clear_who_is_faster(bench, monkeypatch):
    from comparing import PATIENCE
    from timing import summary

    close = {"torch": summary([1.0, 1.1, 1.2]), "fastbn": summary([1.0, 1.1, 1.0]), "copy": summary([0.9] * 3)}
    far = {"torch": summary([2.0] * 9), "fastbn": summary([1.0] * 9), "copy": summary([0.8] * 9)}
    found, runs = until_clear(monkeypatch, close, far, far)
    assert runs == 2 and found["torch"]["samples"] == [1.0, 1.1, 1.2] + [2.0] * 9
    assert found["torch"]["median"] == 2.0 and found["copy"]["median"] == 0.8, "all rounds count, of everyone"
    found, runs = until_clear(monkeypatch, *[close] * (PATIENCE + 2))
    assert runs == PATIENCE + 1 and len(found["torch"]["samples"]) == 3 * runs
    alone = {"fastbn": close["fastbn"]}
    assert until_clear(monkeypatch, alone, alone) == (alone, 1)


# --- adapters ---


def test_every_adapter_here_passes_the_check(bench):
    """Those that can be imported. What they cannot do is told, and nothing of theirs is wrong or failed."""
    from peers import OTHERS, available

    here, missing = available(OTHERS)
    assert "torch separate" in here and set(here) | set(missing) == set(OTHERS)
    assert all(missing.values()), "a reason for each that is not there"
    here.remove("torch.compile")  # it takes its time, in a test of its own
    for ending in ("", "relu", "add+relu"):
        for layout in ("contiguous", "channels_last"):
            records = measured(small_case(bench, layout=layout, ending=ending), ["fastbn", "torch", *here])
            assert {r["kind"] for r in records} <= {"case", "fused", "unsupported"}
            told = {r["peer"] for r in records if r["kind"] == "unsupported"}
            timed = {v for r in records if r["kind"] != "unsupported" for v in r["seconds"]}
            assert timed | told >= {"fastbn", "torch", "fastbn again", "copy", *here}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "add+relu"])
def test_torch_compile_passes_the_check(bench, ending):
    records = measured(small_case(bench, ending=ending), ["fastbn", "torch", "torch.compile"])
    assert all("torch.compile" in r["seconds"] for r in records)


def test_jax_computes_what_torch_does(bench):
    pytest.importorskip("jax")
    torch.set_num_threads(os.cpu_count())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in ("contiguous", "channels_last"):
            for ending in ("", "add+relu"):
                case = small_case(bench, dtype=dtype, layout=layout, ending=ending)
                assert all("jax" in r["seconds"] for r in measured(case, ["fastbn", "torch", "jax"]))


def test_copies_of_cold_inputs_take_turns(bench):
    from limits import limits

    sets = [bench.make_tensors(small_case(bench), seed) for seed in range(3)]
    functions = limits(sets)
    copies = [functions["copy"]() for _ in range(6)]
    assert len({id(c) for c in copies}) == 3
    for i, t in enumerate(sets):
        assert torch.equal(copies[i], t.x)
    for i, t in enumerate(sets):
        assert torch.equal(functions["clone"](), t.x) and torch.equal(functions["add"](), t.x + t.dy), i


def test_cold_inputs_are_used_in_turn(bench):
    from peers import PEERS, ModuleRunner

    case = small_case(bench)
    sets = [bench.make_tensors(case, seed) for seed in range(3)]
    runner = ModuleRunner(PEERS["torch"], case, sets)
    seen = []
    runner.module.register_forward_hook(lambda module, args, output: seen.append(id(args[0])))
    forward = runner.calls()["forward"]
    for _ in range(6):
        forward()
    assert len(set(seen[:3])) == 3 and seen[:3] == seen[3:]
    assert {r["inputs"] for r in measured(case, sets=3)} == {"cold"}


def wrong(ending_error):
    """A peer whose output is off by a percent."""
    from peers import PEERS, Ended

    class Wrong(Ended):
        def forward(self, x, residual=None):
            return super().forward(x, residual) * (1 + ending_error)

    return dataclasses.replace(
        PEERS["torch"], make=lambda module, ending: Wrong(PEERS["torch"].make(module, ""), ending, in_place=False)
    )


@pytest.mark.parametrize("ending", ["", "relu", "add+relu"])
def test_a_wrong_peer_is_told_and_not_timed(bench, monkeypatch, ending):
    import peers

    monkeypatch.setitem(peers.PEERS, "timm", dataclasses.replace(wrong(0.01), slack=1.0))
    records = measured(small_case(bench, ending=ending), ["fastbn", "torch", "timm"])
    (told,) = [r for r in records if r["kind"] == "wrong"]
    assert told["peer"] == "timm" and "y is wrong by" in told["error"]
    rest = [r for r in records if r["kind"] in ("case", "fused")]
    assert rest and all("timm" not in r["seconds"] and "torch" in r["seconds"] for r in rest)


@pytest.mark.parametrize("ending", ["", "add+relu"])
def test_wrong_gradients_are_seen(bench, ending):
    """The check alone, with one output at a time spoilt."""
    from check import Mismatch, Reference
    from peers import PEERS, ModuleRunner

    case = small_case(bench, ending=ending)
    tensors = bench.make_tensors(case, 0)
    outputs = ModuleRunner(PEERS["fastbn"], case, [tensors]).outputs()
    reference = Reference(tensors, ending)
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

    def broken(module, ending):
        raise RuntimeError("broken\nin many lines")

    class Tired(torch.nn.BatchNorm2d):
        """Works in training and raises in eval, after the check."""

        calls = 0

        def forward(self, x):
            type(self).calls += not self.training
            if type(self).calls > 1:
                raise RuntimeError("tired")
            return super().forward(x)

    def tired(module, ending):
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


# --- whole networks, and accuracy ---


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

    def naive(module, ending):
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
