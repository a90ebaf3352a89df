"""Runs of the benchmark: files that are written, summarized, stopped, resumed and compared."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from benchmark_cases import BENCHMARKS, HEAD, case, printed, some_records

pytestmark = pytest.mark.cpu


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def units(log, *names, raising=(), interrupting=()):
    from session import Unit

    def work(name):
        log.append(name)
        yield {"kind": "x", "name": name}
        if name in raising:
            raise ValueError(f"{name} is bad\nsecond line")
        if name in interrupting:
            raise KeyboardInterrupt
        yield {"kind": "x", "name": name}

    return [Unit(name, lambda name=name: work(name)) for name in names]


@pytest.mark.parametrize("code", ["int f(){return 1;}", 'const char* s="a b//1";', "#include <1>\n"])
def test_the_hash_is_of_code_alone(scripts, code):
    from environment import code_of

    assert code_of(f"/* two\nlines */ {code}   // why\n") == code_of(code) != code_of(code.replace("1", "2"))


def test_a_failure_is_recorded_and_does_not_stop_the_rest(scripts, console, tmp_path):
    from session import Session
    from summaries import rounds_of

    log, path = [], tmp_path / "r.jsonl"
    Session(console, path, HEAD).run(units(log, "a", "b", "c", raising="b"))
    assert log == ["a", "b", "c"]
    (failed,) = [r for r in lines_of(path) if r["kind"] == "failed"]
    assert lines_of(rounds_of(path))[-1]["kind"] == "done"
    assert failed == {"kind": "failed", "unit": "b", "error": "ValueError: b is bad"}
    assert "b: failed: ValueError: b is bad" in printed(console)


def test_interrupted_and_resumed(scripts, console, tmp_path):
    """What is finished stays; the unit that was stopped, and one that failed, are measured again."""
    from session import Session
    from summaries import rounds_of

    log, path = [], tmp_path / "r.jsonl"
    session = Session(console, path, HEAD)
    session.run(units(log, "a", "b", "c", "d", raising="b", interrupting="c"))
    assert session.interrupted and log == ["a", "b", "c"]
    assert "what was measured so far" in printed(console)
    path.unlink()  # as if the machine had stopped: there is no summary, and the last line is cut off
    with rounds_of(path).open("a") as file:
        file.write('{"kind": "x", "na')
    log.clear()
    records = Session(console, path, HEAD, resume=True).run(units(log, "a", "b", "c", "d"))
    assert log == ["b", "c", "d"]
    assert lines_of(rounds_of(path)) == records
    assert [r["unit"] for r in records if r["kind"] == "done"] == ["a", "b", "c", "d"]
    assert [r["name"] for r in records if r["kind"] == "x"] == list("aabbccdd")
    assert not any(r["kind"] == "failed" for r in records)


def test_only_the_same_run_is_resumed(scripts, console, tmp_path):
    from session import CannotResume, Session
    from summaries import rounds_of

    path = tmp_path / "r.jsonl"
    Session(console, path, HEAD).run(units([], "a"))
    before = rounds_of(path).read_text()
    with pytest.raises(CannotResume, match="csrc 'abab.*', now 'other'"):
        Session(console, path, {**HEAD, "csrc": "other"}, resume=True)
    assert rounds_of(path).read_text() == before
    rounds_of(path).write_text("nonsense\n" + before)
    with pytest.raises(CannotResume, match="line 1 is not JSON"):
        Session(console, path, HEAD, resume=True)


def test_no_time_left(scripts, console, tmp_path):
    from session import Session

    records = Session(console, tmp_path / "r.jsonl", HEAD).run(units([], "a", "b"), seconds=1e-9)
    assert records[-1] == {"kind": "left out", "cases": ["a", "b"]}
    assert "no time left for 2 of 2" in printed(console)


def small_run(output, *more):
    arguments = ["--shapes", "2x3x4x4", "4x64", "--dtypes", "float32", "--threads", "1", "--output", output, *more]
    return [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)]


def test_the_program_runs_resumes_and_compares(scripts, tmp_path):
    path = tmp_path / "r.jsonl"
    first = subprocess.run(small_run(path), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    from summaries import load, rounds_of

    records = load(path)
    assert {tuple(r["shape"]) for r in records if r["kind"] == "case"} == {(2, 3, 4, 4), (4, 64)}
    assert {r["inputs"] for r in records if r["kind"] == "case"} == {"warm", "cold"}
    assert records[0]["csrc"] and records[0]["clock"] and records[0]["build"]["compiler"]
    for peer in ("jax", "timm"):
        assert (peer in records[0]["missing"]) == (importlib.util.find_spec(peer) is None)
    assert all("samples" in time for r in lines_of(rounds_of(path)) for time in r.get("seconds", {}).values())
    assert "samples" not in path.read_text()
    rounds_of(path).unlink()
    # everything is in the summary: it is only compared, with itself and with one in which torch was slower
    same = subprocess.run(small_run(path, "--resume", "--compare", path), capture_output=True, text=True)
    assert same.returncode == 0 and "0 slower" in same.stdout, same.stdout + same.stderr
    old = tmp_path / "old.jsonl"
    for r in records:
        if r["kind"] == "case" and r["pass"] == "forward" and r["inputs"] == "warm":
            r["seconds"]["torch"]["median"] *= 100
    old.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    worse = subprocess.run(small_run(path, "--resume", "--compare", old), capture_output=True, text=True)
    assert worse.returncode == 1 and "Slower than before" in worse.stdout, worse.stdout + worse.stderr


def test_ctrl_c_keeps_what_was_measured(scripts, tmp_path):
    from summaries import load, rounds_of

    path = tmp_path / "r.jsonl"
    command = [*small_run(path, "--suites", "small", "odd", "1d", "3d"), "--full", "--peers", "torch"]
    # What a shell starts in the background ignores Ctrl-C, and so would what the tests start then.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=hearing) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            rounds_of(path).exists() and rounds_of(path).read_text().count('"done"') >= 2
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in output and "Traceback" not in errors
    records = load(path)
    assert sum(r["kind"] == "done" for r in records) >= 2 and any(r["kind"] == "case" for r in records)


@pytest.mark.parametrize("words", [["--shapes", "2x3x"], ["--shapes", "7"], ["--peers", "nobody"], ["--shapes", "0x3"]])
def test_wrong_arguments(scripts, words):
    import run

    with pytest.raises(SystemExit):
        run.parse_arguments(words)


def test_what_does_not_fit_into_memory_is_skipped(scripts, monkeypatch):
    import run

    arguments = run.parse_arguments(["--full", "--suites", "scaling"])
    monkeypatch.setattr(run, "available_memory", lambda: 10**9)
    skipped = [r for u in run.cpu_units(arguments, ["fastbn", "torch"]) if "scaling" in u.name and u.cost == 0.1
               for r in u.measure()]  # fmt: skip
    assert skipped and all(r["kind"] == "skipped" and "GB of memory" in r["error"] for r in skipped)


def test_a_quick_run_has_what_other_work_relies_on(scripts):
    """The 48 cases of ResNet-50, fused ones and costs are in every quick run, once each."""
    import run

    units = run.cpu_units(run.parse_arguments([]), ["fastbn", "torch"])
    names = [u.name for u in units]
    fresh = {u.measure.keywords["fresh"] for u in units if u.name.startswith(("resnet50", "fused"))}
    assert fresh == {True}, "clone and add are figures to reach"
    assert len(set(names)) == len(names)
    assert sum(name.startswith("resnet50 [32, ") for name in names) == 48
    assert sum(name.startswith("fused [32, ") for name in names) == 48
    assert {"call", "import", "memory", "accuracy float32", "model ResNet-50"} <= set(names)
    full = [u.name for u in run.cpu_units(run.parse_arguments(["--full"]), ["fastbn", "torch"])]
    assert len(set(full)) == len(full)
    assert {batch for batch in (32, 128, 256) for name in full if name.startswith(f"resnet50 [{batch}, ")} == {
        32,
        128,
        256,
    }
    assert "model MobileNetV2" in full and any("cold" in name for name in full)


# --- summaries and comparisons ---


def test_a_summary_has_what_the_report_needs(scripts, tmp_path):
    """Written and loaded again, records give the same figures, but for rounding; a summary of a summary is the same."""
    import figures
    from summaries import load, summarized, write

    records = some_records()
    write(tmp_path / "r.jsonl", summarized(records))
    loaded = load(tmp_path / "r.jsonl")
    before, after = ({f.name: f.measure(r)[0] for f in figures.FIGURES if f.measure(r)} for r in (records, loaded))
    assert len(before) >= 8 and after == pytest.approx(before, rel=1e-3)
    assert sum(r["kind"] == "case" for r in records) == sum(r["kind"] == "case" for r in loaded)
    for kind in ("model", "bandwidth", "environment", "unsupported", "done"):
        assert any(r["kind"] == kind for r in loaded), kind
    assert summarized(loaded) == summarized(records)


def test_rows_of_a_summary(scripts):
    """Times in microseconds, errors in percent, null where there was one repetition; passes of a case in one row."""
    from summaries import expanded, summarized

    records = [case(p, ours=s) for p, s in (("forward", 0.0123456), ("eval", 0.02))]
    records[0]["seconds"]["torch"]["error"] = 0.0456
    records[1]["seconds"]["copy"]["error"] = float("inf")
    line, _ = summarized(records)
    assert line["rows"] == [
        [[32, 64, 56, 56], 2, 12350, 0, 12350, 0, 2000000, 4.6, 500000, 0, 1000000, 0, 1500000, 0]
        + [20000, 0, 20000, 0, 2000000, 0, 500000, None, 1000000, 0, 1500000, 0]
    ]
    assert [r["pass"] for r in expanded(line)] == ["forward", "eval"]
    assert expanded(line)[0]["seconds"]["fastbn"] == {"median": 0.01235, "error": 0}
    assert expanded(line)[1]["seconds"]["copy"]["error"] == float("inf")
    assert expanded(line)[0]["tensor_bytes"] == records[0]["tensor_bytes"]


def test_reasons_are_counted(scripts):
    from summaries import summarized

    about = {"suite": "odd", "shape": [2, 3], "dtype": "float32", "layout": "contiguous", "peer": "jax"}
    wrong = [{"kind": "wrong", **about, "error": f"off by {n}"} for n in (1, 2)]
    (line, _) = summarized(wrong)
    assert line == {
        "kind": "wrong",
        "peer": "jax",
        "error": "off by 1",
        "first": "odd [2, 3] float32 contiguous",
        "cases": 2,
    }


def test_slower_beyond_the_noise(scripts, console):
    from compare import changes, compare

    def one(old, new):
        (change,) = changes([case(ours=old)], [case(ours=new)])
        return change

    assert one(1.0, 1.2).slower and not one(1.0, 1.2).faster
    assert one(1.0, 0.8).faster and not one(1.0, 0.8).slower
    assert not one(1.0, 1.05).slower and not one(1.0, 0.95).faster
    noisy = case(ours=1.2)
    noisy["seconds"]["fastbn again"]["median"] *= 1.2
    (change,) = changes([case()], [noisy])
    assert not change.slower, "its own noise is 18 %"
    slow_machine = case()
    for time_ in slow_machine["seconds"].values():
        time_["median"] *= 3
    (change,) = changes([case()], [slow_machine])
    assert change.ratio == pytest.approx(1), "the whole machine was slower"
    assert changes([case()], [case(inputs="cold")]) == []
    assert compare(console, [case(), case("eval")], [case(ours=1.5), case("eval")])
    assert "2 measurements are in both runs: 1 slower" in printed(console)
    assert not compare(console, [case()], [case()])
