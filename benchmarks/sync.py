"""Synchronized batch norm on two Gloo ranks of one thread, against batch norm of the whole batch in one process of two.

Forward and backward of the large batch norms of ResNet-50. The two take turns of some steps, as a training loop would
make them: the first one, with the caches full of the other's tensors, is not counted. Of the ranks, each with half of
the batch, the slower one counts. What a collective costs alone is shown first.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

import fastbn

RANKS = 2
TURN = 0.08  # seconds
SHAPES = ((64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make_step(sizes, dtype, layout, module):
    """Forward and backward."""
    x, dy = (torch.randn(sizes).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    leaves = [x, module.weight, module.bias]
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def seconds_of(step, repeats):
    step()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def seconds_of_collectives(channels):
    """The collective of a forward pass."""
    moments = torch.zeros(3, channels, dtype=torch.float64)
    of_all = torch.zeros(3 * RANKS, channels, dtype=torch.float64)
    step = lambda: dist.all_gather_into_tensor(of_all, moments)  # noqa: E731
    return statistics.median(seconds_of(step, 20) for _ in range(15))


def serve(rank, store, pipe):
    """A rank: makes a step of each case it is sent, and times it as often as asked."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    step = None
    while (message := pipe.recv()) is not None:
        if isinstance(message, int):
            dist.barrier()
            pipe.send(seconds_of(step, message))
        elif message[0] == "collectives":
            pipe.send(seconds_of_collectives(message[1]))
        else:
            step = make_step(*message, fastbn.SyncBatchNorm(message[0][1]))
            step()
            pipe.send(None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--seconds", type=float, default=3, help="for each case (default 3)")
    parser.add_argument("--json", type=Path, help="a file to append results to, one a line")
    arguments = parser.parse_args()
    torch.set_num_threads(RANKS)
    console = Console(highlight=False)
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(rank, f"file://{folder}/store", theirs), daemon=True).start()
            pipes.append(ours)

        def ask(message):
            for pipe in pipes:
                pipe.send(message)
            return [pipe.recv() for pipe in pipes]

        for channels in (64, 2048):
            seconds = ask(("collectives", channels))[0]
            console.print(f"{channels} channels: a collective takes {seconds * 1e6:.0f} us")

        table = Table("dtype", "layout", "sizes", "MB", "one process, ms", "two ranks, ms", "ratio")
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            for layout in arguments.layouts:
                for shape in SHAPES:
                    sizes = (arguments.batch, *shape)
                    whole = make_step(sizes, dtype, layout, fastbn.BatchNorm2d(shape[0]))
                    ask(((arguments.batch // RANKS, *shape), dtype, layout))
                    estimate = seconds_of(whole, 1)
                    repeats = max(2, int(TURN / estimate))
                    rounds = max(5, int(arguments.seconds / 3 / ((repeats + 1) * estimate)))
                    times = [(seconds_of(whole, repeats), max(ask(repeats))) for _ in range(rounds)]
                    one, two = (statistics.median(t) * 1e3 for t in zip(*times, strict=True))
                    megabytes = dtype.itemsize * torch.Size(sizes).numel() / 1e6
                    name = str(dtype).removeprefix("torch.")
                    cells = f"{megabytes:.0f}", f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}"
                    table.add_row(name, layout, "x".join(map(str, sizes)), *cells)
                    if arguments.json:
                        row = {"dtype": name, "layout": layout, "sizes": sizes, "one_ms": one, "two_ms": two}
                        with arguments.json.open("a") as file:
                            file.write(json.dumps(row) + "\n")
        console.print(table)
        for pipe in pipes:
            pipe.send(None)


if __name__ == "__main__":
    main()
