"""Runs of the paper's experiments (benchmarks/paper): every experiment for a few steps, the page, going on."""

import json
import math
import time

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("paper")]

NAMES = ["sigmoids", "sweep", "inception", "ensemble", "population", "shift", "ablation", "demonstrations"]
PICTURES = NAMES[:6]


def quick(folder, *arguments):
    """A quick run in one process, on digits."""
    import run

    places = ["--data", str(folder / "none"), "--output", str(folder / "out"), "--work", str(folder / "work")]
    assert run.main(["--quick", "--jobs", "1", *places, *arguments]) == 0
    return json.loads((folder / "out" / "paper.json").read_text())


@pytest.fixture(scope="module")
def first(paper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, quick(folder)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [] if value is None or isinstance(value, str) else [value]


def test_every_experiment_gives_its_numbers(first):
    _, found = first
    results = found["results"]
    assert list(results) == NAMES
    assert all(math.isfinite(n) for n in numbers(found))
    assert all(d["name"] == "scikit-learn's digits" for d in found["data"])
    assert found["environment"]["torch"] and found["run"]["cpu_s"] > 0 and found["run"]["found_s"] == 0
    rates = results["inception"]["rates"]
    assert rates["P"] == 0.0015 and rates["T"] in found["settings"]["sweep"]["rates"]
    names = ["Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid", "Inception-Sigmoid"]
    assert [list(v) for v in results["inception"]["protocols"].values()] == [names] * 2
    assert all(len(v["top1"]) == 2 for p in results["inception"]["protocols"].values() for v in p.values())
    assert "probabilities" not in json.dumps(results)
    assert len(results["population"]["networks"]["4 with"]) == 6 + 6 + 2  # accuracies, losses, ratios of variances
    assert len(results["shift"]["networks"]["sigmoids"]["with"]["cosine"][0]) == 2


def test_the_page_shows_every_experiment(first):
    folder, found = first
    page = (folder / "out" / "paper.md").read_text()
    for name in PICTURES:
        svg = (folder / "out" / f"{name}.svg").read_text()
        assert f"({name}.svg)" in page and svg.count("<svg") == 1
        assert len(svg) < 40_000 and "<text" in svg and "</svg>" in svg
    assert page.count("\n## ") == len(NAMES)
    for shown in ("BN-x5-Sigmoid", "scikit-learn's digits", "14.8", "74.8 %", "4.82 %", found["environment"]["torch"]):
        assert shown in page, shown
    assert "nan" not in page.replace("explanat", "") and "{" not in page and "[]" not in page and "None" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) > 60 and all(line.endswith("|") for line in tables)


def test_without_data_the_page_does_not_speak_of_mnist_s_images(first):
    folder, _ = first
    text = (folder / "out" / "paper.md").read_text()
    assert "on scikit-learn's digits" in text and "learns Fashion-MNIST" not in text and "ReLUs on MNIST" not in text


def test_a_run_goes_on_where_another_one_ended(first, tmp_path, monkeypatch):
    import run
    import sweep

    folder, found = first
    trained = []
    fit = sweep.fit
    monkeypatch.setattr(sweep, "fit", lambda *a, **k: trained.append(1) or fit(*a, **k))
    work = folder / "work"
    files = sorted(work.glob("*.json"))
    assert len(files) > 50
    jobs = [(path, json.loads(path.read_text())) for path in files]
    lost = [path for path, job in jobs if isinstance(job["value"], dict) and "top1" in job["value"]][:2]
    for path in lost:
        path.unlink()
    lost[0].write_text("{")  # as if it had been stopped while it wrote
    again = quick(folder)
    assert len(trained) == 2
    assert again["results"] == found["results"]
    assert again["run"]["found_s"] > 0 and again["run"]["cpu_s"] == pytest.approx(found["run"]["cpu_s"], rel=0.5)
    assert run.page(again).split("\n## ")[1:] == run.page(found).split("\n## ")[1:]


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(first, tmp_path):
    import run

    _, found = first
    places = ["--data", str(tmp_path / "none"), "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    assert run.main(["--quick", "--jobs", "2", *places, "--only", *NAMES[::-1]]) == 0
    again = json.loads((tmp_path / "paper.json").read_text())
    assert {name: again["results"][name] for name in NAMES} == found["results"]


def test_a_job_is_done_once_and_depends_on_what_it_was_given(tmp_path):
    import population  # a module whose source is known
    from workers import Workers

    calls = []

    def job(images, seed, factor=1):
        calls.append(seed)
        return {"product": seed * factor}

    job.__module__ = population.__name__
    with Workers(tmp_path, tmp_path, "one") as workers:
        assert workers.map(job, {"a": {"factor": 2}, "b": {"seed": 1}}, [1, 2], 1) == {
            "a": {"product": [2, 4]}, "b": {"product": [2, 3]}}  # fmt: skip
        workers.map(job, {"c": {"factor": 2}}, [2], 1)
        assert len(calls) == 4
    with Workers(tmp_path, tmp_path, "one") as workers:
        assert workers.map(job, {"a": {"factor": 2}}, [1], 1) == {"a": {"product": [2]}}
        assert len(calls) == 4 and workers.found_s == 1
    with Workers(tmp_path, tmp_path, "other data") as workers:
        workers.map(job, {"a": {"factor": 2}}, [1], 1)
        assert len(calls) == 5 and workers.found_s == 0


def test_progress_says_how_long_the_rest_takes(tmp_path, capsys):
    import population
    from workers import Workers

    def job(images, seed):
        time.sleep(0.02)
        return seed

    job.__module__ = population.__name__
    with Workers(tmp_path, tmp_path, 0) as workers:
        workers.map(job, {"a": {}}, [0], 50.0)
    assert capsys.readouterr().out == ""
    with Workers(tmp_path, tmp_path, 0, total_s=100.0) as workers:
        workers.start, workers.shown = workers.start - 40, workers.shown - 40
        workers.map(job, {"a": {}}, [0, 1], 50.0)  # one of them was done before, so 40 s are for the other 25
    assert " 50% done, 0:40 gone, about 1:20 left" in capsys.readouterr().out


def test_a_job_that_fails_ends_the_run(tmp_path, monkeypatch):
    import run
    import sweep

    monkeypatch.setattr(sweep, "fit", lambda *_, **__: 1 / 0)
    places = ["--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(ZeroDivisionError):
        run.main(["--quick", "--jobs", "1", *places])
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    import run
    import shift

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shift, "run", stop)
    places = ["--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert run.main(["--quick", "--jobs", "1", *places]) == 130
    assert "KeyboardInterrupt(): stopping" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run.main(["--quick", "--jobs", "1", *places]) == 0


def test_other_seeds_give_other_numbers(first):
    import sigmoids
    from settings import QUICK, Plan
    from workers import Workers

    folder, found = first
    with Workers(folder / "work", folder / "none", 0) as workers:
        results = sigmoids.run(Plan(QUICK, seeds=[7, 8]), workers)
    assert results["networks"]["with"]["curve"] != found["results"]["sigmoids"]["networks"]["with"]["curve"]


def test_damaged_data_end_the_run(tmp_path, capsys):
    import run

    (tmp_path / "mnist").mkdir()
    assert run.main(["--quick", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--only", "inceptoin"], ["--jobs", "0"], ["--jobs", "none"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    import run

    with pytest.raises(SystemExit) as error:
        run.parse_arguments(arguments)
    assert error.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_pictures_and_page_are_made_again_from_the_file(first, tmp_path):
    import run

    folder, found = first
    part = {**found, "results": {name: found["results"][name] for name in ("shift", "ensemble")}}
    (tmp_path / "paper.json").write_text(json.dumps(part))
    assert run.main(["--pictures", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "shift.svg").read_bytes() == (folder / "out" / "shift.svg").read_bytes()
    assert (tmp_path / "paper.md").read_text().count("\n## ") == 2
