"""What the paper changed besides, to let batch norm work (section 4.2.1), each alone, on a small network that sees few
images often: most of these changes are about regularization.
"""

from pathlib import Path

import torch
from data import batches, load_small
from networks import Variant, make_inception
from settings import SECONDS, Plan
from spread import paired, percent, table
from torch.nn import functional as F
from training import accuracy, fit
from workers import Workers

# As the paper has it: batch norm, no dropout, little L2, shuffling, no local response normalization. Then what it left.
PLAIN = "as in the paper"
ARMS: dict[str, dict] = {
    PLAIN: {},
    "dropout 40 %": {"dropout": 0.4},
    "five times the L2": {"decay": 5e-4},
    "local response normalization": {"response_norm": True},
    "no shuffling: the same batches in every epoch": {"shuffle": False},
    "distortion: shifted by up to 2 pixels, mirrored": {"distort": True},
    "rate falls six times as slowly": {"last": 10 ** (-1 / 6)},
}


def distorted(stream, seed: int):
    """Each batch shifted by up to two pixels, each of its images mirrored or not."""
    generator = torch.Generator().manual_seed(seed)
    for images, labels in stream:
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        down, across = torch.randint(5, (2,), generator=generator).tolist()
        padded = F.pad(torch.where(flip, images.flip(3), images), [2] * 4, value=images.min().item())
        yield padded[:, :, down : down + images.shape[2], across : across + images.shape[3]], labels


def train(images: Path, plan: Plan, seed: int, dropout: float = 0.0, response_norm: bool = False,
          decay: float = 1e-4, shuffle: bool = True, distort: bool = False, last: float = 0.1) -> float:  # fmt: skip
    data = load_small(images, "Fashion-MNIST")
    variant = Variant(dropout=dropout, response_norm=response_norm)
    network = make_inception(variant, plan, data.train[0], seed)
    stream = batches(tuple(t[: plan.images] for t in data.train), plan.batch, seed, shuffle)
    fit(network, distorted(stream, seed) if distort else stream, plan.rate, plan.steps, last=last, decay=decay)
    return accuracy(network, tuple(t[: plan.test] for t in data.test))


def run(settings: Plan, workers: Workers) -> dict:
    jobs = {name: {"plan": settings.ablation, **arm} for name, arm in ARMS.items()}
    return workers.map(train, jobs, settings.more_seeds, SECONDS["ablation"])


def words(found: dict, paper: dict) -> dict[str, str]:
    rows, shows = [[PLAIN, percent(found[PLAIN]), ""]], {1: [], -1: [], 0: []}
    for name in list(found)[1:]:
        gain = paired(found[name], found[PLAIN])
        rows.append([name, percent(found[name]), gain.points()])
        shows[gain.sign].append(name.split(":")[0])
    said = [f"{word}: {', '.join(shows[sign])}" for sign, word in ((1, "better than as in the paper"), (-1, "worse"),
            (0, "no difference shows")) if shows[sign]]  # fmt: skip
    return {"table": table(["", "test accuracy", "difference"], rows), "said": "; ".join(said) + "."}
