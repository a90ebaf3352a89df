"""Benchmark runs: results that are written, interrupted, resumed and compared, and the reports made from them."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
HEAD = {
    "kind": "environment", "csrc": "ab" * 32, "fastbn": "0", "torch": "2", "cpu": "x", "threads": 1, "cores": 2,
    "pace": "quick", "seed": 0, "missing": {"jax": "no"}, "not_asked": ["apex groupbn"], "capability": "avx2",
    "date": "2026-01-01T00:00:00", "cache_bytes": 1 << 25,
    "build": {"compiler": "g++ 1"},
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def console(bench):
    from rich.console import Console

    return Console(file=io.StringIO(), width=200, highlight=False)


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
def test_the_hash_is_of_code_alone(bench, code):
    from environment import code_of

    assert code_of(f"/* two\nlines */ {code}   // why\n") == code_of(code) != code_of(code.replace("1", "2"))


def test_a_failure_is_recorded_and_does_not_stop_the_rest(console, tmp_path):
    from session import Session

    log, path = [], tmp_path / "r.jsonl"
    Session(console, path, HEAD).run(units(log, "a", "b", "c", raising="b"))
    assert log == ["a", "b", "c"]
    (failed,) = [r for r in lines_of(path) if r["kind"] == "failed"]
    assert failed == {"kind": "failed", "unit": "b", "error": "ValueError: b is bad"}
    assert "b: failed: ValueError: b is bad" in console.file.getvalue()


def test_interrupted_and_resumed(console, tmp_path):
    """What is finished stays; the unit that was stopped, and one that failed, are measured again."""
    from session import Session

    log, path = [], tmp_path / "r.jsonl"
    session = Session(console, path, HEAD)
    session.run(units(log, "a", "b", "c", "d", raising="b", interrupting="c"))
    assert session.interrupted and log == ["a", "b", "c"]
    assert "what was measured so far" in console.file.getvalue()
    with path.open("a") as file:
        file.write('{"kind": "x", "na')  # as if the machine had stopped while writing
    log.clear()
    records = Session(console, path, HEAD, resume=True).run(units(log, "a", "b", "c", "d"))
    assert log == ["b", "c", "d"]
    assert lines_of(path) == records
    assert [r["unit"] for r in records if r["kind"] == "done"] == ["a", "b", "c", "d"]
    assert [r["name"] for r in records if r["kind"] == "x"] == list("aabbccdd")
    assert not any(r["kind"] == "failed" for r in records)


def test_only_the_same_run_is_resumed(console, tmp_path):
    from session import CannotResume, Session

    path = tmp_path / "r.jsonl"
    Session(console, path, HEAD).run(units([], "a"))
    before = path.read_text()
    with pytest.raises(CannotResume, match="csrc 'abab.*', now 'other'"):
        Session(console, path, {**HEAD, "csrc": "other"}, resume=True)
    assert path.read_text() == before
    path.write_text("nonsense\n" + before)
    with pytest.raises(CannotResume, match="line 1 is not JSON"):
        Session(console, path, HEAD, resume=True)


def test_no_time_left_is_told(console, tmp_path):
    from session import Session

    records = Session(console, tmp_path / "r.jsonl", HEAD).run(units([], "a", "b"), seconds=1e-9)
    assert records[-1] == {"kind": "left out", "cases": ["a", "b"]}
    assert "no time left for 2 of 2" in console.file.getvalue()


def small_run(output, *more):
    arguments = ["--shapes", "2x3x4x4", "4x64", "--dtypes", "float32", "--threads", "1", "--output", output, *more]
    return [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)]


def test_the_program_runs_resumes_and_compares(bench, tmp_path):
    path = tmp_path / "r.jsonl"
    first = subprocess.run(small_run(path), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    records = lines_of(path)
    assert {tuple(r["shape"]) for r in records if r["kind"] == "case"} == {(2, 3, 4, 4), (4, 64)}
    assert {r["inputs"] for r in records if r["kind"] == "case"} == {"warm", "cold"}
    assert records[0]["csrc"] and records[0]["clock"] and records[0]["build"]["compiler"]
    for peer in ("jax", "timm"):
        assert (peer in records[0]["missing"]) == (importlib.util.find_spec(peer) is None)
    # everything is in the file: it is only compared, with the file itself and with one in which torch was slower
    same = subprocess.run(small_run(path, "--resume", "--compare", path), capture_output=True, text=True)
    assert same.returncode == 0 and "0 slower" in same.stdout, same.stdout + same.stderr
    old = tmp_path / "old.jsonl"
    for r in records:
        if r["kind"] == "case" and r["pass"] == "forward" and r["inputs"] == "warm":
            r["seconds"]["torch"]["median"] *= 100
    old.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    worse = subprocess.run(small_run(path, "--resume", "--compare", old), capture_output=True, text=True)
    assert worse.returncode == 1 and "Slower than before" in worse.stdout, worse.stdout + worse.stderr


def test_ctrl_c_keeps_what_was_measured(bench, tmp_path):
    path = tmp_path / "r.jsonl"
    command = [*small_run(path, "--suites", "small", "odd", "1d", "3d"), "--full", "--peers", "torch"]
    # What a shell starts in the background ignores Ctrl-C, and so would what the tests start then.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=hearing) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and path.read_text().count('"done"') >= 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in output and "Traceback" not in errors
    records = lines_of(path)
    assert sum(r["kind"] == "done" for r in records) >= 2 and any(r["kind"] == "case" for r in records)


@pytest.mark.parametrize("words", [["--shapes", "2x3x"], ["--shapes", "7"], ["--peers", "nobody"], ["--shapes", "0x3"]])
def test_wrong_arguments(bench, words):
    import run

    with pytest.raises(SystemExit):
        run.parse_arguments(words)


def test_what_does_not_fit_into_memory_is_told(bench, monkeypatch):
    import run

    arguments = run.parse_arguments(["--full", "--suites", "scaling"])
    monkeypatch.setattr(run, "available_memory", lambda: 10**9)
    skipped = [r for u in run.cpu_units(arguments, ["fastbn", "torch"]) if "scaling" in u.name and u.cost == 0.1
               for r in u.measure()]  # fmt: skip
    assert skipped and all(r["kind"] == "skipped" and "GB of memory" in r["error"] for r in skipped)


def test_a_quick_run_has_what_other_work_relies_on(bench):
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


# --- made-up records: comparing, tables, pictures, README ---


def times(**seconds):
    names = {name: name.replace("_", " ").replace("compile", "torch.compile") for name in seconds}
    return {names[n]: {"median": s, "low": s, "high": s, "samples": [s] * 5} for n, s in seconds.items()}


def case(pass_="forward", shape=(32, 64, 56, 56), ours=1.0, suite="resnet50", dtype="float32", **more):
    tensors = {"forward": 1.0, "forward+backward": 2.5, "eval": 1.0}[pass_]
    seconds = times(fastbn=ours * tensors, fastbn_again=ours * tensors, torch=2 * tensors, copy=0.5, clone=1.0, add=1.5)
    nbytes = 4
    for size in shape:
        nbytes *= size
    return {"kind": "case", "suite": suite, "shape": list(shape), "dtype": dtype, "layout": "contiguous", "count": 2,
            "tensor_bytes": nbytes, "inputs": "warm", "pass": pass_, "torch_backend": "Native",
             "seconds": seconds, **more}  # fmt: skip


def some_records():
    passes = ("forward", "forward+backward", "eval")
    shapes = [(32, 64, 56, 56), (32, 512, 7, 7)]
    records = [HEAD, *(case(p, s, dtype=d) for s in shapes for d in ("float32", "bfloat16") for p in passes)]
    records += [case(p, inputs="cold", ours=0.5) for p in passes]
    records += [case(p, (n, 64, 9, 9), suite="scaling", dtype=d) for n in (2, 20, 200) for d in ("float32", "bfloat16")
                for p in passes]  # fmt: skip
    for name in ("forward", "forward+backward"):
        fused = times(fastbn=1.0, fastbn_again=1.0, fastbn_plain=1.0, torch=3.0, compile=2.0, copy=0.5, clone=1, add=1)
        records.append({**case(name), "kind": "fused", "suite": "fused", "ending": "relu", "seconds": fused})
    for peer in ("fastbn", "torch"):
        about = {"kind": "accuracy", "dtype": "float32", "layout": "contiguous", "std": 1.0, "peer": peer}
        records += [{**about, "mean": mean, "errors": {"y": 1e-7, "dx": 2e-7}} for mean in (0.0, 10.0, 1e4)]
    about = {"kind": "model", "suite": "model", "model": "ResNet-50", "shape": [8, 3, 96, 96], "dtype": "float32"}
    step = times(torch=1.0, convert=0.9, torch_again=1.0)
    records.append({**about, "seconds": step, "peak_bytes": {"torch": 5e8, "convert": 6e8}})
    rates = {"copy": 1e10, "three streams": 2e10}
    records.append({"kind": "bandwidth", "when": "begin", "bytes": 1 << 20, "rates": rates})
    records.append({"kind": "unsupported", "suite": "resnet50", "peer": "timm", "error": "no"})
    return json.loads(json.dumps(records))


def test_slower_beyond_the_noise(bench, console):
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
    assert "2 measurements are in both runs: 1 slower" in console.file.getvalue()
    assert not compare(console, [case()], [case()])


def test_figures_of_made_up_records(bench):
    import figures
    import records as r

    found = some_records()
    forward = case()
    assert r.speedup(forward) == 2 and r.of_limit(forward) == 0.5 and r.of_fresh_limit(forward) == 1
    assert r.of_limit(case("forward+backward")) == pytest.approx(0.5)
    assert r.of_limit(forward, "torch") == 0.25
    values = {f.name: f.measure(found) for f in figures.FIGURES}
    assert values["training forward: torch / fastbn, mean"][0] == pytest.approx(2)
    assert values["BN + ReLU, forward+backward: torch / fastbn, mean"][0] == pytest.approx(3)
    assert values["both: the faster of torch and torch.compile / fastbn"][0] == pytest.approx(2)
    assert values["import fastbn after torch, seconds"] is None
    cold = case(inputs="cold", ours=100.0)
    larger = case(shape=(256, 64, 56, 56), ours=100.0)
    again = {f.name: f.measure([*found, cold, larger]) for f in figures.FIGURES[:2]}
    assert again["training forward: torch / fastbn, mean"][0] == pytest.approx(2), "of the smallest batch, warm"


def test_the_tables(bench, console):
    from report import case_line, show_summary

    found = some_records()
    show_summary(console, found)
    text = console.file.getvalue()
    for words in ("batch 32", "Figures to reach", "Training step", "Bandwidth", "Time for each element", "fused relu",
                  "timm: unsupported in 1 cases (no)", "jax: not there (no)", "groupbn: not asked for"):  # fmt: skip
        assert words in text, words
    assert "2.00   50%" in case_line([case(), case("forward+backward"), case("eval")])
    assert case_line([{"kind": "unsupported"}]) == ""
    large = case()
    del large["seconds"]["clone"], large["seconds"]["add"]
    assert "2.00   50%" in case_line([large])
    show_summary(console, [*found, *({**large, "shape": [256, 64, 56, 56], "pass": p} for p in ("forward", "eval"))])
    assert "batch 256" in console.file.getvalue()


@pytest.fixture
def written(bench, tmp_path, monkeypatch):
    """A README, results and pictures as make report leaves them."""
    import plots
    import readme

    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "sources_hash", lambda: HEAD["csrc"])
    source = tmp_path / "cpu.jsonl"
    source.write_text("".join(f"{json.dumps(r)}\n" for r in some_records()))
    pictures = tmp_path / "pictures"
    assert {p.stem for p in plots.draw(readme.load(source), pictures)} == set(plots.PLOTS)
    section = readme.section(readme.load(source), source, readme.pictures_there(pictures))
    text = readme.replaced(f"before\n\n{readme.BEGIN}\noutdated\n{readme.END}\n\nafter\n", section)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "outdated" not in text
    return readme, text, source, pictures


def test_readme_as_written_counts_as_unedited(written):
    readme, text, source, pictures = written
    assert readme.edited(text, source, pictures) == []
    assert all(f"({path.relative_to(source.parent)})" in text for path in pictures.iterdir())


def test_warm_and_cold_are_both_shown(written):
    readme, *_ = written
    lines = readme.cold_section(some_records())
    assert "| forward, 1 cases | 2.00 | 4.00 |" in lines, lines


def test_readme_edited_by_hand_is_seen(written):
    readme, text, source, pictures = written
    (told,) = readme.edited(text.replace("2.00", "4.00", 1), source, pictures)
    assert "is not what make report writes" in told


def test_a_changed_picture_is_seen(written):
    readme, text, source, pictures = written
    path = pictures / "speedup.svg"
    path.write_text(path.read_text() + " ")
    assert readme.edited(text, source, pictures)
    path.unlink()
    assert readme.edited(text, source, pictures)


def test_stale_results_are_named(written, monkeypatch):
    readme, text, source, pictures = written
    (source.parent / "without-environment.jsonl").write_text('{"kind": "case"}\n')
    assert readme.stale(source.parent) == []
    monkeypatch.setattr(readme, "sources_hash", lambda: "other")
    (told,) = readme.stale(source.parent)
    assert told.startswith("cpu.jsonl is stale: measured on ") and "abababababab" in told and "other" in told
    assert readme.edited(text, source, pictures) == [], "README is still what its results give"


@pytest.mark.parametrize("current", [True, False])
def test_report_check_fails_where_results_are_stale(written, monkeypatch, capsys, current):
    readme, text, source, pictures = written
    monkeypatch.setattr(readme, "edited", lambda text: [])
    monkeypatch.setattr(readme, "stale", lambda: [] if current else ["cpu.jsonl is stale"])
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    if current:
        readme.main()
        assert "are of the kernels in csrc/" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="cpu.jsonl is stale"):
            readme.main()


def test_pictures_are_the_same_every_time(written, tmp_path):
    import plots

    readme, _, source, pictures = written
    for path in plots.draw(readme.load(source), tmp_path / "again"):
        assert path.read_bytes() == (pictures / path.name).read_bytes()


def test_markers_must_be_there(bench):
    import readme

    for text in ("", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)):
        with pytest.raises(ValueError, match="once each"):
            readme.replaced(text, "new")


def test_readme_is_what_its_results_give(bench):
    """Results, README and pictures belong together. Whether they are stale is asked by make report-check alone."""
    if not (ROOT / "csrc").is_dir() or not (ROOT / "README.md").exists():
        pytest.skip("not a checkout")
    import readme

    assert os.path.exists(readme.SHOWN), "make bench-full writes it"
    assert readme.edited((ROOT / "README.md").read_text()) == []
