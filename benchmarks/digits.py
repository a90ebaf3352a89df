"""Train a small convolutional network on scikit-learn's digits twice from the same weights: with
torch.nn.BatchNorm2d, and after fastbn.convert. Shows that both learn the same, and what an epoch costs.

The two take turns epoch by epoch, so that both see the same machine.
"""

import argparse
import copy
import os
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import fastbn

BATCH = 64
WIDTHS = (16, 32, 32, 64)
# Rounding differs between the two, and training magnifies it. Early the losses agree closely; later both are
# near zero, and so must be their difference.
FIRST_LOSS = 0.01
LAST_LOSS = 0.02
ACCURACY = 0.01


def make_network() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for index, width in enumerate(WIDTHS):
        stride = 2 if index == 2 else 1
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Run:
    """A network in training: its optimizer, and what is known of each epoch."""

    def __init__(self, network: nn.Module, epochs: int) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        # to zero at the end: a large step size would leave the accuracy of both to chance
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def epoch(self, images: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> None:
        start = time.perf_counter()
        self.network.train()
        total = 0.0
        for chosen in order.split(BATCH):
            loss = F.cross_entropy(self.network(images[chosen]), labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(chosen)
        self.schedule.step()
        self.losses.append(total / len(order))
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        self.network.eval()
        return (self.network(images).argmax(1) == labels).double().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(highlight=False)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    split = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)
    train_images, test_images, train_labels, test_labels = split

    network = make_network()
    networks = {"torch": network, "fastbn": fastbn.convert(copy.deepcopy(network))}
    runs = {name: Run(network, arguments.epochs) for name, network in networks.items()}
    console.print(f"\ntraining on {len(train_images)} digits, twice from the same weights: {', '.join(runs)}")
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(train_images))
        for run in runs.values():
            run.epoch(train_images, train_labels, order)
        shown = ", ".join(f"{name} loss {run.losses[-1]:.5f} in {run.seconds[-1]:.2f} s" for name, run in runs.items())
        console.print(f"epoch {epoch + 1}/{arguments.epochs}: {shown}")

    table = Table("", "first loss", "last loss", "test accuracy", "median seconds / epoch", title="Digits")
    accuracy = {name: run.accuracy(test_images, test_labels) for name, run in runs.items()}
    for name, run in runs.items():
        cells = (f"{run.losses[0]:.5f}", f"{run.losses[-1]:.5f}", f"{accuracy[name]:.2%}")
        table.add_row(name, *cells, f"{statistics.median(run.seconds):.3f}")
    console.print(table)

    ours, theirs = runs["fastbn"].losses, runs["torch"].losses
    agree = (
        abs(ours[0] - theirs[0]) <= FIRST_LOSS * theirs[0]
        and abs(ours[-1] - theirs[-1]) <= LAST_LOSS
        and abs(accuracy["fastbn"] - accuracy["torch"]) <= ACCURACY
    )
    console.print("loss and accuracy agree" if agree else "[red]loss or accuracy differ[/]")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
