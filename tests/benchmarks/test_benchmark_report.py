"""The report of a run: figures, tables, pictures, and the measured parts of README.md and docs/benchmarks.md."""

import json
import subprocess
from pathlib import Path

import pytest
from benchmark_cases import HEAD, case, printed, some_records

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


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


def test_the_tables(scripts, console):
    from report import case_line, show_summary

    found = some_records()
    show_summary(console, found)
    text = printed(console)
    titles = ("batch 32", "Targets", "Training steps", "Bandwidth", "ns for each element", "fused relu")
    for words in (*titles, "timm: unsupported in 1 cases (no)", "jax: not installed (no)", "groupbn: not asked for"):
        assert words in text, words
    assert "2.00   50%" in case_line([case(), case("forward+backward"), case("eval")])
    assert case_line([{"kind": "unsupported"}]) == ""
    large = case()
    del large["seconds"]["clone"], large["seconds"]["add"]
    assert "2.00   50%" in case_line([large])
    show_summary(console, [*found, *({**large, "shape": [256, 64, 56, 56], "pass": p} for p in ("forward", "eval"))])
    assert "batch 256" in printed(console)


@pytest.fixture
def written(scripts, tmp_path, monkeypatch):
    """Both pages, results and pictures as make report leaves them."""
    import readme
    from summaries import summarized, write

    pages = {"README": tmp_path / "README.md", "PAGE": tmp_path / "docs" / "benchmarks.md"}
    (tmp_path / "docs").mkdir()
    for name, path in pages.items():
        path.write_text(f"before\n\n{readme.BEGIN}\noutdated\n{readme.END}\n\nafter\n")
        monkeypatch.setattr(readme, name, path)
    monkeypatch.setattr(readme, "sources_hash", lambda: HEAD["csrc"])
    monkeypatch.setattr(readme, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(readme.pictures_there, "__defaults__", (tmp_path / "pictures",))
    source = tmp_path / "cpu.jsonl"
    write(source, summarized(some_records()))
    readme.write(source)
    for path in pages.values():
        text = path.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "outdated" not in text
    return readme, source, tmp_path / "pictures"


def test_pages_as_written_count_as_unedited(written):
    import plots

    readme, source, pictures = written
    assert readme.edited(source, pictures) == []
    assert {path.stem for path in pictures.iterdir()} == set(plots.PLOTS)
    assert all(f"(../pictures/{path.name})" in readme.PAGE.read_text() for path in pictures.iterdir())
    assert "(pictures/speedup.svg)" in readme.README.read_text() and "limit" not in readme.README.read_text()


def test_both_renderers_show_the_same_tables(written, console):
    """What is in a cell on the terminal is in one of the page."""
    from report import show_summary
    from tables import tables_of

    readme, source, _ = written
    show_summary(console, readme.load(source))
    page, terminal = readme.PAGE.read_text(), printed(console)
    tables = tables_of(readme.load(source))
    assert len(tables) >= 7
    for table in tables:
        assert f"### {table.title}\n" in page
        for cells in table.rows:
            assert f"| {' | '.join(cells)} |" in page
            assert all(word in terminal for cell in cells for word in cell.split()), cells


def test_warm_and_cold_are_both_shown(written):
    readme, *_ = written
    assert "| forward, 1 cases | 2.00 | 4.00 |" in readme.PAGE.read_text()


@pytest.mark.parametrize("name", ["README", "PAGE"])
def test_a_page_edited_by_hand_is_seen(written, name):
    readme, source, pictures = written
    page = getattr(readme, name)
    page.write_text(page.read_text().replace("2.00", "4.00", 1))
    (complaint,) = readme.edited(source, pictures)
    assert complaint.startswith(page.name) and "is not what make report writes" in complaint


def test_a_changed_picture_is_seen(written):
    readme, source, pictures = written
    path = pictures / "speedup.svg"
    path.write_text(path.read_text() + " ")
    assert readme.edited(source, pictures)
    path.unlink()
    assert readme.edited(source, pictures)


def test_stale_results_are_named(written, monkeypatch):
    readme, source, pictures = written
    (source.parent / "without-environment.jsonl").write_text('{"kind": "case"}\n')
    other = json.dumps({**HEAD, "csrc": "repetitions are not committed"})
    (source.parent / "cpu.rounds.jsonl").write_text(f"{other}\n")
    assert readme.stale(source.parent) == []
    monkeypatch.setattr(readme, "sources_hash", lambda: "other")
    (line,) = readme.stale(source.parent)
    assert line.startswith("cpu.jsonl is stale: measured on ") and "abababababab" in line and "other" in line
    assert readme.edited(source, pictures) == [], "the pages are still what their results give"


@pytest.mark.parametrize("current", [True, False])
def test_report_check_fails_where_results_are_stale(written, monkeypatch, capsys, current):
    readme, *_ = written
    monkeypatch.setattr(readme, "edited", list)
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

    readme, source, pictures = written
    for path in plots.draw(readme.load(source), tmp_path / "again"):
        assert path.read_bytes() == (pictures / path.name).read_bytes()


def test_markers_must_be_there(scripts):
    import readme

    for text in ("", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)):
        with pytest.raises(ValueError, match="once each"):
            readme.replaced(text, "new")


def test_the_pages_are_what_their_results_give(scripts):
    """Results, pages and pictures belong together. Whether they are stale is asked by make report-check alone."""
    if not (ROOT / "csrc").is_dir() or not (ROOT / "README.md").exists():
        pytest.skip("not a checkout")
    import readme

    assert readme.SHOWN.exists(), "make bench-full writes it"
    assert readme.edited() == []


def test_committed_results_are_small():
    """All of them, pictures included: summaries, not repetitions."""
    folder = ROOT / "benchmarks" / "results"
    if not folder.is_dir():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "."], cwd=folder, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    sizes = {name: (folder / name).stat().st_size for name in listed.stdout.split("\0") if (folder / name).is_file()}
    assert sum(size for name, size in sizes.items() if not name.startswith("paper/")) < 170_000, sizes
