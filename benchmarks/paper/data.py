"""MNIST and Fashion-MNIST from IDX files, or scikit-learn's digits where there are none.

A data set is named by the SHA-256 of what its files hold, not by its folder: files with other content are "unknown".
The last sixth of the training images is the validation set, which chooses learning rates; the test set chooses nothing.
"""

import functools
import gzip
import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHA256 = {
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "Fashion-MNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
FOLDERS = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist"}
Part = tuple[torch.Tensor, torch.Tensor]  # images (N, 1, H, W), float32, and labels (N,), int64


class BadData(Exception):
    """A file is missing or damaged; the message names it and says what was expected."""


@dataclass(frozen=True)
class Data:
    name: str
    sha256: tuple[str, ...]  # of the files' content, uncompressed; none of digits
    train: Part
    validation: Part
    test: Part

    def about(self) -> dict:
        sizes = {part: len(getattr(self, part)[1]) for part in ("train", "validation", "test")}
        return {"name": self.name, "sha256": list(self.sha256), **sizes}


def content_of(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            try:
                return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            except (OSError, EOFError) as error:
                raise BadData(f"{path}: cannot be read ({error})") from None
    raise BadData(f"{folder}: has neither {name} nor {name}.gz, expected the IDX files {', '.join(FILES)}")


def parse_idx(name: object, content: bytes, dimensions: int) -> np.ndarray:
    """An IDX file's values, as an array of so many dimensions."""
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions  # 8 stands for unsigned bytes
    if content[:4] != magic or len(content) < start:
        raise BadData(f"{name}: begins with {content[:start].hex() or 'nothing'}, expected {magic.hex()} (IDX, "
                      f"unsigned bytes, {dimensions} dimensions) and the sizes")  # fmt: skip
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(sizes):
        raise BadData(f"{name}: has {len(content)} bytes, expected {start + math.prod(sizes)} for sizes {sizes}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def load_idx(folder: Path) -> Data:
    contents, parts = [content_of(folder, name) for name in FILES], []
    for images_at in (0, 2):
        names = [folder / name for name in FILES[images_at : images_at + 2]]
        images, labels = (parse_idx(names[i], contents[images_at + i], 3 - 2 * i) for i in (0, 1))
        if len(images) != len(labels) or len(images) < 6 or labels.max() > 9:
            raise BadData(f"{names[1]}: has {len(labels)} labels, expected one from 0 to 9 for each of the "
                          f"{len(images)} images in {names[0]}, and at least 6")  # fmt: skip
        parts.append((torch.tensor(images).float().unsqueeze(1) / 255, torch.tensor(labels).long()))
    hashes = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    known = {expected: name for name, expected in SHA256.items()}
    return split(known.get(hashes, f"unknown images (SHA-256 {hashes[0][:12]}...)"), hashes, *parts)


def split(name: str, hashes: tuple[str, ...], train: Part, test: Part) -> Data:
    count = len(train[1]) - len(train[1]) // 6
    return Data(name, hashes, (train[0][:count], train[1][:count]), (train[0][count:], train[1][count:]), test)


@functools.cache
def load(folder: Path, name: str) -> Data:
    """The data set in ``folder``'s folder for this name, pixels from 0 to 1; digits if there is no such folder."""
    if (folder / FOLDERS[name]).exists():
        return load_idx(folder / FOLDERS[name])
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # whatever the seeds
    return split("scikit-learn's digits", (), *((images[some], labels[some]) for some in (order[:-400], order[-400:])))


@functools.cache
def load_small(folder: Path, name: str) -> Data:
    """Images averaged down to a side of at most 14, with the training set's mean 0 and standard deviation 1."""
    data = load(folder, name)
    factor = math.ceil(data.train[0].shape[-1] / 14)
    std, mean = torch.std_mean(F.avg_pool2d(data.train[0], factor))
    parts = {part: (F.avg_pool2d(getattr(data, part)[0], factor).sub(mean).div(std), getattr(data, part)[1])
             for part in ("train", "validation", "test")}  # fmt: skip
    return replace(data, **parts)


def batches(part: Part, size: int, seed: int, shuffle: bool = True) -> Iterator[Part]:
    """Batches without end, each of exactly this size; every epoch in a new order, less what does not fill one."""
    images, labels = part
    size, generator = min(size, len(labels)), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    while True:
        for chosen in order.split(size):
            if len(chosen) == size:
                yield images[chosen], labels[chosen]
        if shuffle:
            order = torch.randperm(len(labels), generator=generator)
