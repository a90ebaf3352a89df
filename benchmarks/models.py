"""A whole training step of a network, before and after fastbn.convert: images a second, and the most memory held.

Memory is measured in fresh processes, which run this file as a script: models.py MODEL VARIANT BATCH SIDE DEVICE
"""

import copy
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from costs import resident
from networks import NETWORKS
from records import Record
from timing import Protocol, measure
from torch import nn
from torch.nn import functional as F

VARIANTS = {"torch": {}, "convert": {"fuse": False}, "convert(fuse=True)": {"fuse": True}}
# One step in float64 is to agree with torch's to this, as a part of each: of the loss and of the gradients' norm.
AGREE = 1e-9


def make(network: nn.Module, variant: str) -> nn.Module:
    import fastbn

    made = copy.deepcopy(network)
    return made if variant == "torch" else fastbn.convert(made, **VARIANTS[variant])


def step_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward pass, loss, backward pass, and stochastic gradient descent with momentum."""
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3, momentum=0.9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch_of(images: int, side: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(images)
    return torch.randn(images, 3, side, side, dtype=dtype, device=device), torch.arange(images, device=device)


def agrees(network: nn.Module, variant: str, device: str) -> str:
    """The difference of one step in float64 from torch's, in words; empty if they agree."""
    images, labels = batch_of(4, 64, torch.float64, device)
    found = []
    for name in ("torch", variant):
        made = make(network.double(), name)
        loss = step_of(made, images, labels)().item()
        norm = torch.stack([p.grad.norm() for p in made.parameters()]).norm().item()
        found.append((loss, norm))
    network.float()
    worst = max(abs(ours - theirs) / abs(theirs) for theirs, ours in zip(*found, strict=True))
    return "" if worst <= AGREE else f"loss and norm of the gradients are {found[1]}, torch's {found[0]}"


def measure_model(
    model: str, images: int, side: int, protocol: Protocol, rng: random.Random, device: str = "cpu"
) -> Iterator[Record]:
    torch.manual_seed(0)
    network = NETWORKS[model]().to(device)
    about = {"suite": "model", "model": model, "shape": [images, 3, side, side], "dtype": "float32"}
    right = []
    for variant in VARIANTS:
        if error := agrees(network, variant, device) if variant != "torch" else "":
            yield {"kind": "wrong", **about, "peer": variant, "error": error}
        else:
            right.append(variant)
    batch = batch_of(images, side, torch.float32, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    steps = {variant: step_of(make(network, variant), *batch) for variant in right}
    steps["torch again"] = step_of(make(network, "torch"), *batch)
    times = measure({name: lambda step=step: (step(), wait()) for name, step in steps.items()}, protocol, rng)
    memory = {variant: peak_memory(model, variant, images, side, device) for variant in right}
    yield {"kind": "model", **about, "seconds": times, "peak_bytes": memory}


def peak_memory(model: str, variant: str, images: int, side: int, device: str) -> int:
    """Bytes: on the CPU of the whole process over what it held before the first step, on a GPU of tensors."""
    command = [sys.executable, __file__, model, variant, str(images), str(side), device, str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _peak(model: str, variant: str, images: int, side: int, device: str, steps: int = 2) -> int:
    network = make(NETWORKS[model]().to(device), variant)
    step = step_of(network, *batch_of(images, side, torch.float32, device))
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    before = resident("VmRSS")
    for _ in range(steps):  # the second starts with the optimizer's state
        step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    name, variant, images, side, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sys.path.insert(0, str(Path(__file__).parent))
    print(_peak(name, variant, int(images), int(side), device))
