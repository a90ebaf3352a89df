"""What is made from benchmark results: comparisons, figures, tables, pictures, and README's section."""

import json
import os

import pytest
from benchmark_cases import BENCHMARKS, HEAD

pytestmark = pytest.mark.cpu
ROOT = BENCHMARKS.parent


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


def test_slower_beyond_the_noise(scripts, wide_console):
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
    assert compare(wide_console, [case(), case("eval")], [case(ours=1.5), case("eval")])
    assert "2 measurements are in both runs: 1 slower" in wide_console.file.getvalue()
    assert not compare(wide_console, [case()], [case()])


def test_figures_of_made_up_records(scripts):
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


def test_the_tables(scripts, wide_console):
    from report import case_line, show_summary

    found = some_records()
    show_summary(wide_console, found)
    text = wide_console.file.getvalue()
    for words in ("batch 32", "Figures to reach", "Training step", "Bandwidth", "Time for each element", "fused relu",
                  "timm: unsupported in 1 cases (no)", "jax: not there (no)", "groupbn: not asked for"):  # fmt: skip
        assert words in text, words
    assert "2.00   50%" in case_line([case(), case("forward+backward"), case("eval")])
    assert case_line([{"kind": "unsupported"}]) == ""
    large = case()
    del large["seconds"]["clone"], large["seconds"]["add"]
    assert "2.00   50%" in case_line([large])
    show_summary(
        wide_console, [*found, *({**large, "shape": [256, 64, 56, 56], "pass": p} for p in ("forward", "eval"))]
    )
    assert "batch 256" in wide_console.file.getvalue()


@pytest.fixture
def written(scripts, tmp_path, monkeypatch):
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
    (message,) = readme.edited(text.replace("2.00", "4.00", 1), source, pictures)
    assert "is not what make report writes" in message


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
    (message,) = readme.stale(source.parent)
    assert message.startswith("cpu.jsonl is stale: measured on ") and "abababababab" in message and "other" in message
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


def test_markers_must_be_there(scripts):
    import readme

    for text in ("", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)):
        with pytest.raises(ValueError, match="once each"):
            readme.replaced(text, "new")


def test_readme_is_what_its_results_give(scripts):
    """Results, README and pictures belong together. Whether they are stale is asked by make report-check alone."""
    if not (ROOT / "csrc").is_dir() or not (ROOT / "README.md").exists():
        pytest.skip("not a checkout")
    import readme

    assert os.path.exists(readme.SHOWN), "make bench-full writes it"
    assert readme.edited((ROOT / "README.md").read_text()) == []
