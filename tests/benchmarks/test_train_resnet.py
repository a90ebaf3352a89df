"""benchmarks/train_resnet.py: its data, and short trainings in one process and in two."""

import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import fastbn

pytestmark = pytest.mark.cpu
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_resnet.py"
FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import train_resnet

        yield train_resnet
    finally:
        sys.path.remove(str(SCRIPT.parent))


# Small, and slow to learn: at the usual rate, rounding decides which way so few steps go.
SMALL = ["--depth", "8", "--images", "96", "--batch", "16", "--epochs", "2", "--steps", "3", "--lr", "0.02"]


def printed_by(script, *arguments):
    """What a training prints, in this process."""
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
    script.run(script.parse([*SMALL, *arguments]), script.Place(torch.device("cpu")), console)
    return console.file.getvalue()


def started(*arguments, ranks=1):
    """The program in processes of its own."""
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, str(SCRIPT), *SMALL, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def losses_of(printed):
    lines = re.findall(r"^epoch \d/2: loss (\S+), accuracy (\S+)%, (\d+) images/s$", printed, re.MULTILINE)
    assert len(lines) == 2, printed
    assert all(0 <= float(accuracy) <= 100 and int(speed) > 0 for _, accuracy, speed in lines)
    return [float(loss) for loss, *_ in lines]


def write_cifar(folder, changes=None, count=16):
    """Files as published: dicts with bytes for keys, written with protocol 2."""
    random = np.random.default_rng(0)
    for name in FILES:
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {
            b"batch_label": b"training batch",
            b"labels": random.integers(0, 10, count).tolist(),
            b"data": pixels,
        }
        (folder / name).write_bytes(pickle.dumps({**content, **(changes or {})}, protocol=2))


# ---- data ----------------------------------------------------------------------------------------------------------


def test_cifar_is_read(script, tmp_path):
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 9]}, protocol=2))
    found = script.read_cifar(tmp_path, ["test_batch"])
    assert found.labels.tolist() == [3, 9] and found.labels.dtype == torch.int64
    assert torch.equal(found.images, torch.from_numpy(pixels).view(2, 3, 32, 32))
    assert len(script.read_cifar(tmp_path, FILES[:5]).labels) == 5 * 16


def test_a_pickle_as_python_2_and_numpy_1_write_it(script, tmp_path):
    """The published files name numpy.core.multiarray, and have strings where Python 3 has bytes."""
    pixels = np.arange(3072, dtype=np.int64).astype(np.uint8).tobytes()
    text = (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b"
        b"\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff"
        b"\xff\xff\xffK\x00tb\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "test_batch").write_bytes(text)
    found = script.read_cifar(tmp_path, ["test_batch"])
    assert found.labels.tolist() == [7] and found.images.flatten()[:3].tolist() == [0, 1, 2]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


def test_a_pickle_cannot_call_what_it_likes(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(script.DataError, match=r"not a file of CIFAR-10: .*mkdir"):
        script.read_cifar(tmp_path, ["test_batch"])
    assert not (tmp_path / "made by a pickle").exists()
    with pytest.raises(pickle.UnpicklingError, match="builtins.eval"):
        script._Unpickler(io.BytesIO(pickle.dumps(eval))).load()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({b"data": np.zeros((16, 100), np.uint8)}, r"pixels \(16, 100\)"),
        ({b"data": np.zeros((16, 3072), np.float32)}, "float32"),
        ({b"labels": [1, 2]}, r"\(2,\) labels"),
        ({b"labels": [10] * 16}, "from 10 to 10"),
        ({b"labels": None}, r"\(\) labels"),
    ],
)
def test_other_contents_are_refused(script, tmp_path, changes, message):
    write_cifar(tmp_path, changes)
    with pytest.raises(script.DataError, match=message):
        script.read_cifar(tmp_path, FILES)


def test_other_files_are_refused(script, tmp_path):
    with pytest.raises(script.DataError, match="there is no .*data_batch_1.*cifar-10-batches-py"):
        script.read_cifar(tmp_path, FILES)
    for content in (b"", b"no pickle", pickle.dumps([1]), pickle.dumps({b"data": 1})):
        (tmp_path / "data_batch_1").write_bytes(content)
        with pytest.raises(script.DataError, match="is not a file of CIFAR-10"):
            script.read_cifar(tmp_path, FILES)


def test_made_up_images_can_be_learnt(script):
    """A class has the same pattern in both sets, and the noise differs."""
    one, two = script.make_up(400, 1), script.make_up(400, 2)
    assert one.images.dtype == torch.uint8 and not torch.equal(one.images, two.images)
    means = torch.stack([one.images[one.labels == k].float().mean(0) for k in range(10)])
    nearest = (two.images.float().unsqueeze(1) - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == two.labels).double().mean() > 0.99


def test_moved_images_are_shifted_or_mirrored(script):
    image = torch.zeros(1, 3, 32, 32)
    image[0, :, 10, 12] = torch.tensor([1.0, 2.0, 3.0])
    seen = set()
    for _ in range(300):
        made = script.moved(image)
        assert made.shape == image.shape
        (place,) = (made[0, 0] == 1).nonzero().tolist()
        assert made[0, :, place[0], place[1]].tolist() == [1, 2, 3] and made.sum() == 6
        seen.add(tuple(place))
    rows, columns = {row for row, _ in seen}, {column for _, column in seen}
    assert rows == set(range(6, 15)) and columns == {*range(8, 17), *range(15, 24)}


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_network(script):
    model = script.ResNet(20)
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 million in the paper, 19 batch norms
    model = script.with_norm(model, "fuse", sync=False)
    model(torch.randn(2, 3, 32, 32))
    assert len(fastbn.report(model).fused) == 19 and not fastbn.report(model).left


def test_batches_are_each_image_once(script):
    data = script.Data(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.arange(50))
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    seen = []
    for rank in range(3):
        place = script.Place(torch.device("cpu"), rank, 3)
        train = script.Batches(data, 8, place, zero, one, train=True)
        sizes = [len(labels) for _, labels in train.of_epoch(1)]
        assert sizes == [8, 8] and train.steps() == 2  # of 16 or 17
        test = script.Batches(data, 8, place, zero, one, train=False)
        seen += [label for _, labels in test.of_epoch(0) for label in labels.tolist()]
    assert sorted(seen) == list(range(50))


def test_all_norms_train_alike(script):
    losses = {norm: losses_of(printed_by(script, "--norm", norm)) for norm in ("torch", "convert", "fuse")}
    assert losses["torch"][1] < losses["torch"][0]
    for norm, found in losses.items():
        assert found == pytest.approx(losses["torch"], abs=2e-3), norm


def test_cifar_is_trained_on(script, tmp_path):
    write_cifar(tmp_path)
    printed = printed_by(script, "--data", str(tmp_path), "--channels-last")
    assert "80 images of CIFAR-10" in printed
    losses_of(printed)


@pytest.mark.slow
def test_two_ranks():
    done = started("--sync", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fuse, synchronized; 96 synthetic images, 2 x 16 a step" in done.stdout
    assert done.stdout.count("epoch 1/2") == 1, "the other rank prints, too"
    first, last = losses_of(done.stdout)
    assert last < first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "/nowhere"], "there is no /nowhere/data_batch_1"),
        (["--batch", "97"], "96 images make no batch of 97 on each of 1 ranks"),
        (["--batch", "1"], "make no batch of 1"),
        (["--norm", "torch", "--sync"], "needs a GPU"),
    ],
)
def test_what_cannot_be_is_said(script, arguments, message):
    with pytest.raises(script.DataError, match=message):
        printed_by(script, *arguments)


@pytest.mark.parametrize("arguments, message", [(["--depth", "21"], "6 n"), (["--images", "0"], "should be positive")])
def test_wrong_options_are_refused(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert message in capsys.readouterr().err


def test_it_ends_in_words():
    done = started("--data", "/nowhere")
    assert done.returncode == 1 and done.stderr.startswith("train_resnet: there is no /nowhere"), done.stderr
