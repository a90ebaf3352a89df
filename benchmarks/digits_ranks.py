"""Train a small network on scikit-learn's digits in several processes, with synchronized batch norm and DDP.

Started by torchrun; on GPUs, one a process, where there are any, and on CPUs otherwise.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbn


def train(steps, gpus):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    model = fastbn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = DistributedDataParallel(model.to(device), device_ids=[device] if gpus else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[rank::ranks].to(device) / 16
    labels = torch.tensor(digits.target)[rank::ranks].to(device)
    for step in range(steps):
        chosen = torch.randint(len(images), (16,), device=device)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            dist.all_reduce(mean := loss.detach() / ranks)
            if rank == 0:
                print(f"step {step}: loss {mean.item():.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    train(steps, gpus)
    # A thread of Gloo's may hold something of Python's for a moment longer than its collective takes. It aborts the
    # process if Python ends meanwhile, and deadlocks if a DDP model is what destroys the group: both seen with torch
    # alone. So the model is gone already, and while this waits, the thread lets go. The barrier alone was too short
    # once.
    dist.barrier()
    time.sleep(0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
