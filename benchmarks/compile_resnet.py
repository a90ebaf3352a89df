"""Networks compiled by Inductor, by torch alone and by backend="fastbn", beside both in eager mode.

One training step (forward, loss, backward) and one eval pass, medians of rounds in which all variants take turns, for
float32 and bfloat16 autocast, contiguous and channels_last. Prints a Markdown table a pass, and how many batch norms
were fused. The first run compiles for minutes; later ones find what it left in Inductor's cache.

--first-call measures instead how long the first training step of ResNet-50 takes by each eager capture.

Usage: compile_resnet.py [--seconds S] [--threads T] [--batch N] [--size PIXELS] [--networks ...] [--passes ...]
"""

import argparse
import copy
import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from networks import MobileNetV2, ResNet50
from timing import Protocol, measure
from torch import nn

import fastbn

NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": lambda: resnet18(), "MobileNetV2": MobileNetV2}


class Block(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """He et al. 2016, table 1."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels_in = 64
    for i, channels in enumerate((64, 128, 256, 512)):
        layers += [Block(channels_in, channels, 1 if i == 0 else 2), Block(channels, channels, 1)]
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def variants(model: nn.Module, training: bool) -> dict[str, nn.Module]:
    found = {
        "torch": model,
        "torch compiled": torch.compile(copy.deepcopy(model)),
        'backend="fastbn"': torch.compile(copy.deepcopy(model), backend="fastbn"),
        'backend="fastbn_eager"': torch.compile(copy.deepcopy(model), backend="fastbn_eager"),
        "convert(fuse=True)": fastbn.convert(copy.deepcopy(model), fuse=True),
    }
    if not training:
        found["fold, compiled"] = torch.compile(fastbn.fold(copy.deepcopy(model).eval()))
    return found


def call(model: nn.Module, x: torch.Tensor, training: bool, autocast: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if not training:
                with torch.no_grad():
                    model(x)
                return
            y = model(x)
        model.zero_grad()
        y.float().square().mean().backward()

    return run


def first_call() -> None:
    """In turns, each in a process of its own."""
    seconds: dict[str, list[float]] = {"eager": [], "fastbn_eager": []}
    for _ in range(5):
        for backend, times in seconds.items():
            code = (
                "import sys, time, torch, torch._dynamo, fastbn\n"
                f"sys.path.insert(0, {str(sys.path[0])!r})\n"
                "from networks import ResNet50\n"
                "model, x = ResNet50(), torch.randn(2, 3, 64, 64)\n"
                "model(x).sum().backward()\n"
                f"compiled = torch.compile(model, backend={backend!r})\n"
                "start = time.perf_counter()\n"
                "compiled(x)\n"
                "print(time.perf_counter() - start)\n"
            )
            run = {"capture_output": True, "text": True, "check": True, "cwd": sys.path[0]}
            done = subprocess.run([sys.executable, "-c", code], **run)
            times.append(float(done.stdout))
    for backend, times in seconds.items():
        times.sort()
        print(f"first call, {backend}: {times[2]:.2f} s ({times[0]:.2f} to {times[-1]:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--passes", nargs="+", choices=("train", "eval"), default=["train", "eval"])
    parser.add_argument("--first-call", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.first_call:
        first_call()
        return
    for name in arguments.passes:
        training, header = name == "train", False
        for network in arguments.networks:
            for autocast in (False, True):
                for layout in (torch.contiguous_format, torch.channels_last):
                    torch._dynamo.reset()
                    torch.manual_seed(0)
                    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size).to(memory_format=layout)
                    models = variants(NETWORKS[network]().to(memory_format=layout).train(training), training)
                    calls = {who: call(model, x, training, autocast) for who, model in models.items()}
                    start = time.perf_counter()
                    times = measure(calls, Protocol(arguments.seconds, least_rounds=5), random.Random(0))
                    if not header:
                        print(f"\n| {name} | {' | '.join(times)} |\n|{'---|' * (len(times) + 1)}")
                        header = True
                    case = f"{network}, {'bfloat16 autocast' if autocast else 'float32'}, {str(layout)[6:]}"
                    row = " | ".join(f"{t['median'] * 1e3:.1f} ms" for t in times.values())
                    print(f"| {case} | {row} |", flush=True)
                    fused = fastbn.report(models['backend="fastbn"']).fused
                    print(f"{len(fused)} fused, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for network, make in {"ResNet-50": ResNet50, "MobileNetV2": MobileNetV2}.items():
        model = make()
        torch.compile(model, backend="fastbn_eager")(torch.randn(2, 3, 64, 64))
        found = fastbn.report(model)
        print(f"{network}: {len(found.fused)} fused; left: {dict.fromkeys(found.left.values())}")


if __name__ == "__main__":
    main()
