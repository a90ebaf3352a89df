"""The paper's experiments in small (benchmarks/paper): IDX files, networks, every experiment for a few steps, the page.
In: small files and `--quick`. Out: the expected numbers, the same ones twice, and errors that say what is wrong."""

import gzip
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cpu

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
MODULES = [path.stem for path in PAPER.glob("*.py")]
NAMES = ["sigmoids", "inception", "ensemble", "population", "batch_size", "shift"]


@pytest.fixture(scope="module", autouse=True)
def paper():
    """The folder's modules can be imported, although others of benchmarks/ have the same names."""
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    threads = torch.get_num_threads()
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(PAPER))
    yield
    sys.path.remove(str(PAPER))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
    torch.set_num_threads(threads)


def quick(folder, *arguments):
    import run

    assert run.main(["--quick", "--output", str(folder), *arguments]) == 0
    return json.loads((folder / "paper.json").read_text())


@pytest.fixture(scope="module")
def first(paper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, quick(folder, "--jobs", "1")


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [] if value is None or isinstance(value, str) else [value]


# IDX files


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder like MNIST's: 80 images of 28 x 28 to train, 40 to test, one file of them gzipped."""
    from data import PARTS

    rng = np.random.default_rng(0)
    for name, shape in zip(PARTS, [(80, 28, 28), (80,), (40, 28, 28), (40,)], strict=True):
        content = idx(rng.integers(0, 256 if len(shape) > 1 else 10, shape))
        if name == PARTS[0]:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    return tmp_path


def test_idx_files_are_read(mnist):
    from data import PARTS, load

    data = load(mnist)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 28, 28)), rng.integers(0, 10, (80,))
    assert data.train_images.shape == (80, 1, 28, 28) and data.test_images.shape == (40, 1, 28, 28)
    assert np.array_equal((data.train_images[:, 0] * 255).round().numpy(), images)
    assert data.train_labels.tolist() == labels.tolist()
    assert not (mnist / PARTS[0]).exists()  # it was the gzipped one that was read


def broken(mnist, part, change):
    from data import PARTS, BadData, load

    path = mnist / PARTS[part]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadData) as error:
        load(mnist)
    assert path.name in str(error.value)
    return str(error.value)


def test_what_is_wrong_with_an_idx_file_is_said(mnist):
    from data import PARTS, BadData, load, read_idx

    good = (mnist / PARTS[1]).read_bytes()
    assert "00000801" in broken(mnist, 1, lambda c: b"\0\0\x08\x03" + c[4:])
    (mnist / PARTS[1]).write_bytes(good)
    assert "expected 88" in broken(mnist, 1, lambda c: c[:-3])
    assert "header" in broken(mnist, 1, lambda _: good[:6])
    assert "nothing" in broken(mnist, 1, lambda _: b"")
    assert "79 labels" in broken(mnist, 1, lambda _: idx([1] * 79))
    assert "label 10" in broken(mnist, 1, lambda _: idx([10] * 80))
    (mnist / PARTS[1]).write_bytes(good)
    (mnist / f"{PARTS[0]}.gz").write_bytes(b"\x1f\x8b\x08 no gzip")
    with pytest.raises(BadData, match="cannot be read"):
        read_idx(mnist / f"{PARTS[0]}.gz", 3)
    (mnist / f"{PARTS[0]}.gz").unlink()
    with pytest.raises(BadData, match=f"neither {PARTS[0]} nor"):
        load(mnist)


def test_a_folder_without_data_ends_the_run(tmp_path, capsys):
    import run

    assert run.main(["--quick", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(mnist):
    import batch_size
    from data import load
    from settings import QUICK
    from workers import Workers

    with Workers(load(mnist), mnist, 1) as one, Workers(load(mnist), mnist, 2) as two:
        found = [batch_size.run(replace(QUICK, seeds=(0,)), workers.data, workers) for workers in (one, two)]
    assert found[0]["networks"] == found[1]["networks"]


# data and networks


def test_images_are_placed_whole_and_at_random():
    from data import place

    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 0, 0] = images[:, :, 7, 7] = 1
    placed = place(images, 2, 0.0, torch.Generator().manual_seed(0))
    assert placed.shape == (200, 1, 12, 12)
    torch.testing.assert_close(placed.mean((1, 2, 3)), torch.zeros(200), atol=1e-6, rtol=0)
    torch.testing.assert_close(placed.std((1, 2, 3)), torch.ones(200))
    bright = (placed > 0).flatten(1)
    assert bright.sum(1).tolist() == [2] * 200  # no corner was cut off
    assert len(set(bright.int().argmax(1).tolist())) == 25  # each of 5 x 5 places


def test_batches_are_full_and_pass_over_everything():
    from data import batches

    images, labels = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    stream = batches(images, labels, 4, torch.Generator().manual_seed(0))
    seen = [next(stream)[1] for _ in range(4)]
    assert [len(part) for part in seen] == [4] * 4
    assert len(set(torch.cat(seen[:2]).tolist())) == 8


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_inception_has_the_paper_s_shapes(norm, activation):
    from networks import Inception, Variant

    import fastbn

    network = Inception(Variant(norm=norm, activation=activation), 12, width=8, strides=(1, 2, 1))
    shapes, x = [], torch.randn(5, 1, 12, 12)
    for layer in network:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 6, 6), (32, 6, 6), (48, 3, 3), (32, 3, 3), (32, 1, 1), (32,), (10,)]
    norms = [m for m in network.modules() if isinstance(m, fastbn.BatchNormAct2d)]
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(norms) == (len(convolutions) if norm else 0)
    assert all((m.bias is None) == norm for m in convolutions)


def test_per_activation_statistics_are_in_the_last_module_alone():
    from networks import Inception, PerActivation, Variant

    network = Inception(Variant(per_activation=True, dropout=0.1), 12, width=8)
    assert network(torch.randn(4, 1, 12, 12)).shape == (4, 10)
    found = {name.split(".")[0] for name, m in network.named_modules() if isinstance(m, PerActivation)}
    assert found == {"3"}
    assert any(isinstance(m, torch.nn.Dropout) for m in network)


@pytest.mark.parametrize("norm", [True, False])
def test_the_perceptron_keeps_the_inputs_of_its_last_sigmoids(norm):
    from networks import Perceptron

    network = Perceptron(64, (100, 100, 100), norm, 0.1)
    assert network(torch.randn(60, 1, 8, 8)).shape == (60, 10)
    assert network.inputs.shape == (60, 100)
    if norm:
        torch.testing.assert_close(network.inputs.mean(0), torch.zeros(100), atol=1e-5, rtol=0)


# measures


def test_percentiles_are_numpy_s():
    from sigmoids import percentiles

    values = torch.randn(101, 7)
    expected = np.percentile(values.double().numpy(), [15, 50, 85], axis=0)
    np.testing.assert_allclose(percentiles(values, (15, 50, 85)).numpy(), expected, rtol=1e-12)


def test_the_typical_unit_has_the_median_of_the_paths():
    from sigmoids import travel, typical

    steps = np.array([0.0, 1.0, 0.0])
    tracks = np.stack([np.stack([a * steps - 1, a * steps, a * steps + 1], 1) for a in (3, 1, 2)], 2)
    assert typical(tracks) == 2
    assert travel(tracks[:, :, 0]) == {"path": 3.0, "range": 1.5}


def test_steps_to_a_level():
    from inception import steps_to

    curve = {"steps": [0, 10, 20], "accuracy": [0.1, 0.6, 0.5]}
    assert [steps_to(curve, level) for level in (0.0, 0.6, 0.7)] == [0, 10, None]


def test_distance_of_a_shift_and_of_a_scale():
    from shift import distance

    mean, std = torch.tensor([0.0, 5.0]), torch.tensor([2.0, 2.0])
    assert distance((mean, std), (mean, std)) == (0, 0)
    rms = (5**2 / 2 + 2**2) ** 0.5
    assert distance((mean, std), (mean + 1, std)) == pytest.approx((0.5, 1 / rms))
    assert distance((mean, std), (mean, 2 * std)) == pytest.approx((1, 2 / rms))
    assert distance((10 * mean, 10 * std), (10 * mean + 10, 10 * std)) == pytest.approx((0.5, 1 / rms))


def test_batch_statistics_leave_the_network_alone():
    from population import by_batch

    import fastbn

    network = torch.nn.Sequential(torch.nn.Flatten(), fastbn.BatchNorm1d(4, affine=False)).eval()
    x = 3 + torch.randn(10, 4)
    y = by_batch(network, x, 4)  # batches of 4 and 6
    torch.testing.assert_close(torch.stack([y[:4].mean(0), y[4:].mean(0)]), torch.zeros(2, 4), atol=1e-6, rtol=0)
    assert y[8:].mean(0).abs().max() > 1e-3
    assert not network.training and network[1].running_mean.abs().max() == 0


# runs


def test_every_experiment_gives_its_numbers(first):
    _, found = first
    results = found["results"]
    assert list(results) == NAMES
    assert all(math.isfinite(n) for n in numbers(found))
    assert list(results["inception"]["variants"]) == [
        "Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid", "Inception-Sigmoid",
    ]  # fmt: skip
    assert results["inception"]["rates"]["BN-x30"] == 30 * results["inception"]["search"]["rate"]
    assert results["inception"]["search"]["rate"] in found["settings"]["search_rates"]
    assert len(results["ensemble"]["members"]) == 6
    assert results["ensemble"]["best_member"]["mean"] >= results["ensemble"]["mean_member"]["mean"]
    assert len(results["sigmoids"]["networks"]["with"]["track"][0]) == 3
    assert len(results["population"]["methods"]) == 5
    assert all(len(n["steps"]) == found["settings"]["shift"]["steps"] for n in results["shift"]["networks"].values())
    assert all(v > 0 for v in found["times"]["batch_size"]["steps"]["with"].values())
    assert "wall_s" not in json.dumps(results)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_picture(first, tmp_path):
    import run
    from data import load
    from rich.console import Console
    from settings import QUICK
    from workers import Workers

    folder, found = first
    workers, again = Workers(load()), {"settings": found["settings"], "results": {}, "times": {}}
    # in another order, which a seed that is missing somewhere would show
    run.run_all(again, QUICK, NAMES[::-1], workers, Console(quiet=True), tmp_path)
    assert json.dumps(again["results"]) == json.dumps(found["results"])
    again["results"] = {"sigmoids": again["results"]["sigmoids"]}
    run.draw(again, tmp_path, ("svg",))
    assert (tmp_path / "sigmoids.svg").read_bytes() == (folder / "sigmoids.svg").read_bytes()


def test_other_seeds_give_other_numbers(first):
    import sigmoids

    _, found = first
    from data import load
    from settings import QUICK
    from workers import Workers

    workers = Workers(load())
    results = sigmoids.run(replace(QUICK, seeds=(7, 8)), workers.data, workers)
    assert results["networks"]["with"]["curve"] != found["results"]["sigmoids"]["networks"]["with"]["curve"]


def test_the_page_shows_every_experiment(first):
    folder, found = first
    page = (folder / "paper.md").read_text()
    for name in NAMES:
        assert f"({name}.svg)" in page
        assert (folder / f"{name}.svg").read_text().count("<svg") == 1
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for shown in ("31.0M", "74.8 %", "4.82 %", "BN-x5-Sigmoid", found["data"]["name"]):
        assert shown in page
    assert "nan" not in page and "{" not in page and "[]" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) > 30 and all(line.endswith("|") for line in tables)


def test_a_run_of_one_experiment_keeps_the_others_of_the_same_settings(first, tmp_path):
    import run
    from data import load
    from settings import QUICK, Shift

    folder, found = first
    (tmp_path / "paper.json").write_text((folder / "paper.json").read_text())
    data, other = load(), replace(QUICK, shift=Shift(steps=5))
    assert run.begin(QUICK, data, 1, NAMES, tmp_path) == found
    assert run.begin(other, data, 1, ["shift"], tmp_path)["results"] == found["results"]
    assert run.begin(other, data, 1, ["inception"], tmp_path)["results"] == {}
    assert run.begin(QUICK, data, 2, NAMES, tmp_path)["results"] == {}
    (tmp_path / "paper.json").write_text("no JSON")
    assert run.begin(QUICK, data, 1, NAMES, tmp_path)["results"] == {}


def test_what_is_not_as_in_the_paper_is_said(first):
    from report import what_differs

    def variant(best, steps):
        values = {"mean": best, "sd": 0.0, "values": [best]}
        return {"best": values, "steps_to_control": steps and {"mean": steps, "sd": 0.0, "values": [steps]}}

    names = ["Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid", "Inception-Sigmoid"]
    papers = [(0.722, 31.0), (0.727, 13.3), (0.730, 2.1), (0.748, 2.7), (0.698, None), (0.1, None)]
    variants = {name: variant(*numbers) for name, numbers in zip(names, papers, strict=True)}
    assert what_differs({"variants": variants}) == []
    changed = {**variants, "BN-x30": variant(0.7, None), "BN-x5-Sigmoid": variant(0.73, 9)}
    assert [text.split(" ")[0] for text in what_differs({"variants": changed})] == ["BN-x30"] * 3 + ["BN-x5-Sigmoid"]


@pytest.mark.parametrize("arguments", [["--only", "inceptoin"], ["--seeds", "0"], ["--jobs", "none"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    import run

    with pytest.raises(SystemExit) as error:
        run.parse_arguments(arguments)
    assert error.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_pictures_and_page_are_made_again_from_the_file(first, tmp_path):
    import run

    folder, found = first
    part = {**found, "results": {"batch_size": found["results"]["batch_size"]}}
    (tmp_path / "paper.json").write_text(json.dumps(part))
    assert run.main(["--pictures", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "batch_size.svg").read_bytes() == (folder / "batch_size.svg").read_bytes()
    assert "## Batch size" in (tmp_path / "paper.md").read_text()
