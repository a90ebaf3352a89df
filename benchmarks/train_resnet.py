"""Train a ResNet for 32 x 32 images (He et al. 2015, section 4.2), with torch's batch norms or fastbn's.

On synthetic images, or on CIFAR-10 from a folder (nothing is downloaded); in one process or under torchrun; on GPUs
where there are any. It prints loss, accuracy and images a second after each epoch.

    python benchmarks/train_resnet.py --norm fuse
    torchrun --standalone --nproc-per-node=2 benchmarks/train_resnet.py --sync
"""

import argparse
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastbn

CLASSES, SIDE = 10, 32
TRAINING_FILES, TEST_FILES = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: every second position, zeros for new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(y + x)


class ResNet(nn.Sequential):
    """depth = 6 n + 2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, a linear layer."""

    def __init__(self, depth: int = 20) -> None:
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
        inputs = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                layers.append(Block(inputs, width, 1 if inputs == width else 2))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


# ---- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """uint8 images (N, 3, 32, 32) and int64 labels (N,)."""

    images: Tensor
    labels: Tensor


class DataError(Exception):
    """A folder without CIFAR-10 in it."""


class _Unpickler(pickle.Unpickler):
    """A pickle can call any function that it names. This one only allows numpy's arrays."""

    # What numpy calls to make an array is named differently by its versions.
    reconstruct = np.empty(0).__reduce__()[0]
    allowed = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
    }

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes the bytes of an array for Python 2
            return lambda text, encoding: text.encode(encoding)
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_cifar(folder: Path, names: list[str]) -> Data:
    """Files of the Python version of CIFAR-10, as published."""
    images, labels = [], []
    for name in names:
        path = folder / name
        try:
            with open(path, "rb") as file:
                found = _Unpickler(file, encoding="bytes").load()
            pixels, classes = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
        except FileNotFoundError:
            raise DataError(
                f"there is no {path}. --data is the folder cifar-10-batches-py of the Python version of CIFAR-10, with "
                f"{', '.join(TRAINING_FILES + TEST_FILES)}"
            ) from None
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(f"{path} is not a file of CIFAR-10: {type(error).__name__}: {error}") from error
        right = pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == 3 * SIDE * SIDE
        if not right or classes.shape != pixels.shape[:1]:
            raise DataError(
                f"{path} has {pixels.dtype} pixels {pixels.shape} and {classes.shape} labels, not uint8 (N, 3072), (N,)"
            )
        if len(classes) and not (classes.min() >= 0 and classes.max() < CLASSES):
            raise DataError(f"{path} has labels from {classes.min()} to {classes.max()}, not from 0 to {CLASSES - 1}")
        images.append(torch.from_numpy(pixels.copy()).view(-1, 3, SIDE, SIDE))
        labels.append(torch.from_numpy(classes.astype(np.int64)))
    return Data(torch.cat(images), torch.cat(labels))


def make_up(count: int, seed: int) -> Data:
    """Images of noise with a pattern in it, one for each class, which does not depend on the seed."""
    patterns = F.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0)), size=SIDE)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    images = 128 + 25 * patterns[labels] + 50 * torch.randn(count, 3, SIDE, SIDE, generator=random)
    return Data(images.clamp(0, 255).to(torch.uint8), labels)


def moved(images: Tensor) -> Tensor:
    """Each image is shifted by up to 4 pixels and padded with zeros; half of them are mirrored."""
    n = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, n, 1), device=images.device)
    along = torch.arange(SIDE, device=images.device)
    rows, columns = down + along, right + along
    mirrored = torch.rand(n, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    every, channels = torch.arange(n, device=images.device), torch.arange(3, device=images.device)
    return padded[
        every[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None]
    ]


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """The device and the rank of this process."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        if self.ranks == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()


def join() -> Place:
    """The process group of torchrun, if it has started this."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Place(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    return Place(device, dist.get_rank(), dist.get_world_size())


def with_norm(model: nn.Module, norm: str, sync: bool) -> nn.Module:
    if norm != "torch":
        fastbn.convert(model, fuse=norm == "fuse")
    if sync:
        kind = nn.SyncBatchNorm if norm == "torch" else fastbn.SyncBatchNorm
        model = kind.convert_sync_batchnorm(model)
    return model


class Batches:
    """Of one rank: its share of the data, normalized, in another order for each epoch."""

    def __init__(self, data: Data, size: int, place: Place, mean: Tensor, std: Tensor, train: bool) -> None:
        self.data, self.size, self.place, self.train = data, size, place, train
        self.mean, self.std = mean.to(place.device), std.to(place.device)

    def steps(self) -> int:
        # In training all ranks need the same number of batches, and more than one image in each.
        share = len(self.data.labels) // self.place.ranks
        return share // self.size if self.train else -(-len(self.data.labels) // (self.size * self.place.ranks))

    def of_epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.data.labels)
        order = torch.arange(count)
        if self.train:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        own = order[self.place.rank :: self.place.ranks].split(self.size)
        for chosen in own[: self.steps()]:
            images = (self.data.images[chosen].to(self.place.device).float() - self.mean) / self.std
            yield moved(images) if self.train else images, self.data.labels[chosen].to(self.place.device)


def train_epoch(model, optimizer, schedule, batches: Batches, epoch: int, most: int, tick) -> tuple[float, float]:
    """Mean loss, and images a second of all ranks."""
    model.train()
    place, loss_sum, seen = batches.place, torch.zeros((), device=batches.place.device), 0
    start = time.perf_counter()
    for step, (images, labels) in enumerate(batches.of_epoch(epoch)):
        if step == most:
            break
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(labels)
        seen += len(labels)
        tick()
    loss, images = place.total(loss_sum.item(), seen)  # waits for the GPU
    return loss / images, images / (time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    right = seen = 0
    for images, labels in batches.of_epoch(0):
        right += (model(images).argmax(1) == labels).sum().item()
        seen += len(labels)
    right, seen = batches.place.total(right, seen)
    return right / seen


def rise_and_fall(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate: linear warm-up over the first tenth, then a cosine."""
    rise = max(1, steps // 10)
    return lambda step: min(1, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2


def positive(text: str) -> int:
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"should be positive, not {n}")
    return n


def depth(text: str) -> int:
    if (n := int(text)) < 8 or (n - 2) % 6:
        raise argparse.ArgumentTypeError(f"should be 6 n + 2: 20, 32, 44, 56, not {n}")
    return n


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("torch", "convert", "fuse"), default="fuse", help="whose batch norms (fuse)")
    parser.add_argument("--sync", action="store_true", help="statistics of the batches of all ranks")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10, the folder cifar-10-batches-py")
    parser.add_argument("--images", type=positive, default=4096, help="synthetic images, without --data (4096)")
    parser.add_argument("--depth", type=depth, default=20, help="layers, 6 n + 2 (20)")
    parser.add_argument("--batch", type=positive, default=128, help="images a step, of one rank (128)")
    parser.add_argument("--epochs", type=positive, default=2)
    parser.add_argument("--steps", type=positive, help="end each epoch after so many")
    parser.add_argument(
        "--lr", type=float, help="the highest; it falls to zero (0.1 for 128 images a step, in proportion)"
    )
    parser.add_argument("--channels-last", action="store_true", help="the layout of images and weights")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, place: Place, console: Console) -> None:
    if options.sync and options.norm == "torch" and place.device.type == "cpu":
        raise DataError("torch.nn.SyncBatchNorm needs a GPU; --norm convert synchronizes on CPUs too")
    if options.data is None:
        training, test = make_up(options.images, 1), make_up(max(CLASSES, options.images // 4), 2)
    else:
        training, test = read_cifar(options.data, TRAINING_FILES), read_cifar(options.data, TEST_FILES)
    values = training.images.float()
    mean, std = values.mean((0, 2, 3)).view(-1, 1, 1), values.std((0, 2, 3)).view(-1, 1, 1).clamp(min=1e-3)
    del values
    batches = Batches(training, options.batch, place, mean, std, train=True)
    steps = min(batches.steps(), options.steps or batches.steps())
    if steps == 0 or options.batch < 2:
        raise DataError(
            f"{len(training.labels)} images make no batch of {options.batch} on each of {place.ranks} ranks"
        )
    test_batches = Batches(test, options.batch, place, mean, std, train=False)

    torch.manual_seed(0)
    model = with_norm(ResNet(options.depth), options.norm, options.sync).to(place.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if place.ranks > 1:
        model = DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None)
    torch.manual_seed(place.rank)  # each augments its images differently
    lr = options.lr or 0.1 * options.batch * place.ranks / 128
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall(options.epochs * steps))

    what = f"{len(training.labels)} {'synthetic images' if options.data is None else 'images of CIFAR-10'}"
    norm = f"{options.norm}, synchronized" if options.sync else options.norm
    console.print(f"ResNet-{options.depth}, batch norm: {norm}; {what}, {place.ranks} x {options.batch} a step")
    shows = place.rank == 0 and console.is_terminal
    with Progress(console=console, transient=True, disable=not shows) as progress:
        for epoch in range(options.epochs):
            task = progress.add_task(f"epoch {epoch + 1}/{options.epochs}", total=steps)
            tick = lambda task=task: progress.advance(task)  # noqa: E731
            loss, speed = train_epoch(model, optimizer, schedule, batches, epoch, steps, tick)
            found = accuracy(model, test_batches)
            progress.remove_task(task)
            console.print(
                f"epoch {epoch + 1}/{options.epochs}: loss {loss:.4f}, accuracy {found:.1%}, {speed:.0f} images/s"
            )
    if place.ranks > 1:
        dist.barrier()  # while this waits, Gloo's threads let go of tensors: see digits_ranks.py
        time.sleep(0.5)


def main() -> int:
    options = parse()
    place = join()
    console = Console(quiet=place.rank != 0, highlight=False, soft_wrap=True)
    try:
        run(options, place, console)
    except DataError as error:
        if place.rank == 0:
            print(f"train_resnet: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
