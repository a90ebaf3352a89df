"""The benchmark for GPUs, tested on a machine without one: a stand-in for the GPU runs batches of calls directly."""

import argparse
import copy
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = [(8, 5, 2), (16, 3, 1)]


class StandIn:
    """What gpu_timing.Gpu does, on the CPU."""

    device = torch.device("cpu")

    def cache_bytes(self):
        return 4096

    def captured(self, batch):
        return batch

    def sample(self, call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    wall_sample = sample

    def release(self):
        pass


@pytest.fixture
def run_gpu(monkeypatch, threads):
    pytest.importorskip("rich")
    threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run_gpu
    import suite

    monkeypatch.setattr(suite, "RESNET50", SHAPES)
    monkeypatch.setattr(run_gpu, "BIG_COPY", 4096)
    monkeypatch.setattr(run_gpu, "SECONDS", {"quick": 0.002})
    return run_gpu


def measure(run_gpu, **changed):
    """The records, as a file of results has them, and what was printed."""
    from rich.console import Console
    from session import Session
    from summaries import load, rounds_of

    chosen = {"dtypes": ["bfloat16", "float32"], "layouts": ["contiguous", "channels_last"], "batch": [2, 3]}
    arguments = argparse.Namespace(**{**chosen, "suites": ["resnet50"], "seed": 0, "pace": "quick", **changed})
    console = Console(file=io.StringIO(), width=400, highlight=False)
    units = run_gpu.gpu_units(arguments, ["fastbn", "torch"], StandIn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        Session(console, path, {"kind": "environment"}).run(units, changed.get("seconds", 0))
        records = load(rounds_of(path))
        summary = load(path)
    kinds = sorted(r["kind"] for r in records if r["kind"] not in ("done", "wrong"))
    assert kinds == sorted(r["kind"] for r in summary if r["kind"] not in ("done", "wrong"))
    return [r for r in records if r["kind"] not in ("environment", "done")], console.file.getvalue().splitlines()


@pytest.mark.slow
def test_every_pass_of_every_case(run_gpu):
    records, printed = measure(run_gpu)
    assert records[0]["kind"] == "big copy"
    cases = [r for r in records if r["kind"] == "gpu"]
    assert len(cases) == len(records) - 1 == 3 * len(SHAPES) * 2 * 2 * 2
    assert {r["pass"] for r in cases} == {"forward", "backward", "eval"}
    assert [r["shape"][0] for r in cases[:7]] == [3] * 6 + [2], "the largest batch first"
    for r in cases:
        assert set(r["graph"]) == {"fastbn", "fastbn again", "torch", "copy"}
        assert set(r["eager"]) == {"fastbn", "fastbn again", "torch"}
        assert all(0 < t["low"] <= t["median"] <= t["high"] for t in (*r["graph"].values(), *r["eager"].values()))
        assert r["sets"] * 2 * r["tensor_bytes"] >= 3 * 4096, "more than the cache holds"
    assert len(printed) == len(cases) / 3


def test_a_time_is_of_one_call(run_gpu, monkeypatch):
    """A batch of as many calls as there are sets takes that many units."""
    monkeypatch.setattr(
        run_gpu,
        "measure",
        lambda variants, *_: {v: {"median": len(call()), "error": 0.0} for v, call in variants.items()},
    )
    monkeypatch.setattr(run_gpu, "copy_record", lambda *_: {"kind": "big copy"})
    records, _ = measure(run_gpu, dtypes=["float32"])
    calls = [r for r in records if r["kind"] == "gpu"]
    assert calls and all(t["median"] == 1 for r in calls for t in (*r["graph"].values(), *r["eager"].values()))


def test_the_limit_moves_the_bytes_of_the_pass(run_gpu):
    import suite

    case = suite.Case("resnet50", (2, 8, 5, 5), torch.bfloat16, "contiguous")
    sets = [suite.make_tensors(case, seed) for seed in range(3)]
    for tensors in suite.GPU_PASSES.values():
        copied = run_gpu.copies(sets, tensors)()
        assert len(copied) == 3
        assert all(2 * c.numel() * c.element_size() == tensors * case.nbytes for c in copied)


def test_no_time_left(run_gpu):
    records, printed = measure(run_gpu, seconds=1e-9)
    assert [r["kind"] for r in records] == ["big copy", "left out"]
    assert len(records[1]["cases"]) == len(SHAPES) * 2 * 2 * 2
    assert "no time left for 16 of 16 cases" in printed


def test_a_wrong_result_is_not_timed(run_gpu, monkeypatch):
    class Wrong(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 1.01

    def wrong(module, epilogue):
        wrong = copy.deepcopy(module)
        wrong.__class__ = Wrong
        return wrong

    monkeypatch.setitem(run_gpu.PEERS, "fastbn", dataclasses.replace(run_gpu.PEERS["fastbn"], make=wrong))
    records, printed = measure(run_gpu, dtypes=["float32"], layouts=["contiguous"], batch=[2])
    assert [r["kind"] for r in records] == ["big copy", "wrong", "wrong"]
    assert "wrong" in printed[0]


def test_the_tables(run_gpu):
    import report_gpu
    from rich.console import Console

    records, _ = measure(run_gpu, batch=[3], dtypes=["bfloat16"], layouts=["contiguous"])
    records += measure(run_gpu, batch=[3], dtypes=["float32"], layouts=["channels_last"])[0][1:]  # one big copy
    console = Console(width=200, record=True, file=io.StringIO())
    report_gpu.show_gpu_summary(console, records)
    text = console.export_text()
    assert "bf16 contig N=3" in text and "f32 ch_last N=3" in text
    assert "slowest single case" in text


def test_figures_are_what_they_say(run_gpu):
    """Made-up times: a copy at 1 GB/s, fastbn at a half of it or at all of it, torch twice as slow as fastbn."""
    import report_gpu

    def case(count, nbytes, seconds, dtype="bfloat16", batch=256):
        times = {"fastbn": seconds, "torch": 2 * seconds, "copy": 2 * nbytes / 1e9}
        graph = {name: {"median": value} for name, value in times.items()}
        fields = {"shape": [batch, 8, 1, 1], "dtype": dtype, "layout": "contiguous", "pass": "forward"}
        return {"kind": "gpu", "count": count, "tensor_bytes": nbytes, "graph": graph, **fields}

    copy = {"kind": "big copy", "bytes": 2e9, "seconds": {"copy": {"median": 2.0}}}
    fast, slow = case(3, 1e6, 2e-3), case(1, 1e6, 4e-3)
    assert report_gpu.bandwidth([copy]) == 1e9
    assert report_gpu.of_limit([fast], 1e9) == pytest.approx(1)
    assert report_gpu.of_limit([slow], 1e9) == pytest.approx(0.5)
    assert report_gpu.of_limit([fast, slow], 1e9) == pytest.approx(8 / 10), "as often as the network has them"
    assert report_gpu.of_copy([fast, slow]) == pytest.approx(8 / 10)
    assert report_gpu.over_fastest(fast) == pytest.approx(2)
    slow["graph"]["torch.compile"] = {"median": 3e-3}
    assert report_gpu.over_fastest(slow) == pytest.approx(0.75)
    figure = report_gpu.FIGURES[0]
    assert "256" in figure.name and "forward" in figure.name and figure.target == 0.9
    assert figure.measure([copy, fast]) is None, "the figure is of all twelve shapes"
    records = [copy, *[fast] * 12, *[case(1, 1e6, 8e-3, "float32")] * 12]
    assert figure.measure(records)[0] == pytest.approx(0.25), "of the worse type"


@pytest.fixture
def gpu_script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    return gpu


def test_one_failure_does_not_hide_the_rest(gpu_script, tmp_path):
    """Parts that pass, fail, and hang with a child that holds the log open."""

    def part(name, command, limit=60.0):
        return gpu_script.Part(name, "tests", ["bash", "-c", command], limit)

    parts = [
        part("good", "echo ==== 3 passed in 1.2s ====; echo bye"),
        part("bad", "echo ==== 1 failed, 2 passed in 1.2s ====; exit 3"),
        part("stuck", "echo begun; sleep 1000 & wait", limit=1.0),
    ]
    start = time.monotonic()
    gpu_script.run(parts, 60)
    assert time.monotonic() - start < 30
    assert [p.status for p in parts] == ["passed", "failed (3)", "timed out"]
    assert [p.detail for p in parts] == ["3 passed in 1.2s", "1 failed, 2 passed in 1.2s", "begun"]
    assert [p.failed for p in parts] == [False, True, True]
    parts.append(gpu_script.Part("absent", "sanitizers", [], 0, detail="is not there"))
    gpu_script.write(parts, 1.0)
    summary = json.loads((tmp_path / "gpu-summary.json").read_text())
    assert summary["failed"] == ["bad", "stuck"] and summary["not run"] == ["absent"]
    assert len(summary["csrc"]) == 64
    assert "==> stuck: timed out\nbegun" in (tmp_path / "gpu-tests.log").read_text()


def test_no_time_for_a_part(gpu_script):
    part = gpu_script.Part("late", "probe", ["bash", "-c", "exit 1"], 10)
    gpu_script.run([part], 1)
    assert (part.status, part.detail, part.failed) == ("not run", "no time left", False)


def test_the_files_of_the_suite_are_all_shared_out(gpu_script, monkeypatch):
    monkeypatch.setattr(gpu_script, "has", lambda module: False)
    parts = gpu_script.test_parts()
    named = [argument for p in parts for argument in p.command if argument.endswith(".py")]
    absent = [p.name for p in parts if not p.command]
    assert absent == sorted(gpu_script.NEEDS), "what needs a missing package is named, not lost"
    tests = BENCHMARKS.parent / "tests"
    everything = [path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")]
    assert sorted([*named, *absent]) == sorted(everything)


def test_whole_kernels_against_the_skeleton(gpu_script):
    probe = [{"measurement": 9, "shape": "256x56x56 N=32", "us": us} for us in (30.0, 25.0)]
    graph = {"fastbn": {"median": 50e-6}}
    record = {
        "shape": [32, 256, 56, 56],
        "dtype": "bfloat16",
        "layout": "contiguous",
        "pass": "forward",
        "graph": graph,
    }
    lines = gpu_script.against_skeleton(probe, [record, {**record, "pass": "backward"}, {"kind": "big copy"}])
    assert lines == ["256x56x56 N=32: forward 50.0 us, the skeleton 25.0 us (50%)"]
