"""The benchmark of the CPU: its cases, the protocol of timing, limits, and inputs that are not in cache."""

import math
import random

import pytest
import torch
from benchmark_cases import BENCHMARKS, QUICK, measured, small_case

pytestmark = pytest.mark.cpu


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
            assert case.passes["forward"] == (3 if case.epilogue == "add+relu" else 2)
            assert case.passes["forward+backward"] == (7 if case.epilogue == "add+relu" else 5)
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
    from timing import Protocol, measure

    clock = Clock({"fast": 0.001, "slow": 0.3})
    times = measure({n: (lambda n=n: n) for n in clock.seconds}, Protocol(0.08), random.Random(1), clock.sample)
    assert len(times["fast"]["samples"]) == 20, "half of the time, in calls of 1 ms, of which every other is timed"
    assert len(times["slow"]["samples"]) == 5, "the least, whatever it takes"
    assert times["fast"]["median"] == 0.001 and times["fast"]["error"] == 0
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
