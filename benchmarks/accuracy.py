"""The error of each peer against float64, where the mean is near to zero and where it is far from it, measured in
standard deviations: an input of mean 1e4 and deviation 1 has lost most of its digits before batch norm begins, and a
variance as a difference of two large numbers loses the others."""

import random
from collections.abc import Iterator

import torch
from check import Reference
from comparing import last_line
from peers import PEERS
from records import Record
from suite import Case, make_tensors

# Mean and standard deviation of the input.
MEANS = [0.0, 1.0, 10.0, 1e2, 1e3, 1e4]
REGIMES = [*((mean, 1.0) for mean in MEANS), (1e3, 0.01), (0.0, 1e-3), (0.0, 1e3)]
SHAPE = (32, 16, 28, 28)


def measure_accuracy(dtype: torch.dtype, layout: str, peers: list[str], seed: int) -> Iterator[Record]:
    """A record for each regime and peer: the largest error of each output over its largest value in float64."""
    case = Case("accuracy", SHAPE, dtype, layout)
    for mean, std in REGIMES:
        tensors = make_tensors(case, random.Random(f"{seed} {mean} {std}").randrange(1 << 30))
        with torch.no_grad():
            tensors.x.mul_(std).add_(mean)
        reference = Reference(tensors, elements=tensors.x.numel())
        for name in peers:
            peer = PEERS[name]
            about = {**case.fields(), "mean": mean, "std": std, "peer": name}
            if reason := peer.refuses(case, "cpu"):
                yield {"kind": "unsupported", **about, "error": reason}
                continue
            try:
                errors = reference.errors(peer.runner(peer, case, [tensors]).outputs())
            except Exception as error:
                yield {"kind": "failed", **about, "error": last_line(error)}
            else:
                yield {"kind": "accuracy", **about, "errors": errors}
