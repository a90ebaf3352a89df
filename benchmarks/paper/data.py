"""In: the name of a folder with MNIST's IDX files, or none for scikit-learn's digits. Out: `Data`, images in [0, 1]
with labels, training and test set, and random batches of them.

Digits are few and easy, which hides differences between networks: `place` makes them harder where an experiment asks
for it. Each image lands at a random place of a larger canvas, under noise, anew each time; so a network never sees the
same image twice, and what counts is how fast it learns, as with ImageNet.
"""

import gzip
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNSIGNED_BYTE = 8  # the third byte of an IDX file: the type of its values; the fourth is the number of dimensions
# Of MNIST's 10,000 test images, this many: the accuracy is asked for often. Digits have fewer.
MOST_TEST_IMAGES = 2000
# Digits are 8 x 8; larger images are averaged down to at most this side before they are placed on a canvas.
LARGEST_SIDE = 14


class BadData(Exception):
    """A file is missing or is not what it should be; the message names it and says what was expected."""


@dataclass(frozen=True)
class Data:
    name: str
    train_images: torch.Tensor  # (N, 1, H, W) float32 in [0, 1]
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @property
    def side(self) -> int:
        return self.train_images.shape[-1]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file, gzipped or not, as an array of so many dimensions."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise BadData(f"{path}: cannot be read ({error})") from None
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise BadData(f"{path}: begins with {content[:4].hex() or 'nothing'}, expected {magic.hex()} "
                      f"(IDX, unsigned bytes, {dimensions} dimensions)")  # fmt: skip
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise BadData(f"{path}: ends within its header: {len(content)} bytes, expected at least {start}")
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(sizes):
        shape = " x ".join(map(str, sizes))
        raise BadData(f"{path}: has {len(content)} bytes, expected {start + math.prod(sizes)} for {shape} values")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise BadData(f"{folder}: has neither {name} nor {name}.gz, expected MNIST's IDX files {', '.join(PARTS)}")


def load_idx(folder: Path) -> Data:
    tensors = []
    for images_name, labels_name in (PARTS[:2], PARTS[2:]):
        images_path, labels_path = find(folder, images_name), find(folder, labels_name)
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels) or len(images) == 0:
            raise BadData(f"{labels_path}: has {len(labels)} labels, expected one for each of the {len(images)} images "
                          f"in {images_path}, and at least one")  # fmt: skip
        if labels.max() > 9:
            raise BadData(f"{labels_path}: has the label {labels.max()}, expected 0 to 9")
        tensors += [torch.tensor(images).float().unsqueeze(1) / 255, torch.tensor(labels).long()]
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        raise BadData(f"{folder}: images for training are {tuple(tensors[0].shape[2:])}, those for the test "
                      f"{tuple(tensors[2].shape[2:])}, expected the same size")  # fmt: skip
    return Data("MNIST", tensors[0], tensors[1], tensors[2][:MOST_TEST_IMAGES], tensors[3][:MOST_TEST_IMAGES])


def load(folder: Path | None = None) -> Data:
    if folder is not None:
        return load_idx(folder)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    # always the same split, whatever the seeds
    split = train_test_split(images, torch.tensor(digits.target), test_size=800, random_state=0, stratify=digits.target)
    train_images, test_images, train_labels, test_labels = split
    return Data("digits", train_images, train_labels, test_images, test_labels)


def small(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, math.ceil(images.shape[-1] / LARGEST_SIDE))


def place(images: torch.Tensor, margin: int, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Each image at a random place of a canvas that is larger by twice the margin, with Gaussian noise on it; then each
    canvas to mean 0 and variance 1, which makes it easier for the networks without batch norm."""
    images = small(images)
    count, _, height, width = images.shape
    # with twice the margin around it, every window that is larger by twice the margin holds the whole image
    windows = F.pad(images, [2 * margin] * 4).unfold(2, height + 2 * margin, 1).unfold(3, width + 2 * margin, 1)
    down, right = torch.randint(2 * margin + 1, (2, count), generator=generator)
    canvas = windows[torch.arange(count), :, down, right]
    canvas = canvas + noise * torch.randn(canvas.shape, generator=generator)
    std, mean = torch.std_mean(canvas, (1, 2, 3), keepdim=True)
    return (canvas - mean) / std


def batches(images: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator,
            margin: int = 0, noise: float = 0.0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Batches without end, each of exactly this size; every epoch in a new order, less what does not fill one."""
    size = min(size, len(labels))
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            if len(chosen) == size:
                batch = images[chosen]
                yield (place(batch, margin, noise, generator) if margin or noise else batch), labels[chosen]
