"""In: settings, data. Out: six networks like BN-x30 with varied settings, alone and as an ensemble, which predicts the
mean of their probabilities. The paper varied these too: larger initial weights, dropout of 5 or 10 %, and statistics
for each activation instead of each channel in the last layers.
"""

import statistics

import torch
from data import Data
from networks import Variant
from settings import Settings, Training
from training import correct, logits
from trials import control, placed_test, spread, trial
from workers import Workers

MULTIPLE = 30
MEMBERS = {
    "as BN-x30": Variant(),
    "weights x 2": Variant(gain=2.0),
    "dropout 5 %": Variant(dropout=0.05),
    "dropout 10 %": Variant(dropout=0.1),
    "per activation": Variant(per_activation=True),
    "weights x 2, dropout 5 %, per activation": Variant(gain=2.0, dropout=0.05, per_activation=True),
}


def probabilities(data: Data, training: Training, variant: Variant, rate: float, seed: int) -> list[list[float]]:
    network, _ = trial(data, training, variant, rate, seed)
    return logits(network, placed_test(data, training)).softmax(1).tolist()


def run(settings: Settings, data: Data, workers: Workers) -> dict:
    rate = MULTIPLE * control(settings, workers)["rate"]
    # members differ in their seeds as well
    jobs = [{"training": settings.training, "variant": variant, "rate": rate, "seed": 100 * seed + number}
            for seed in settings.seeds for number, variant in enumerate(MEMBERS.values())]  # fmt: skip
    found = torch.tensor(workers.map(probabilities, jobs)).unflatten(0, (len(settings.seeds), len(MEMBERS)))
    alone = [[correct(scores, data.test_labels) for scores in members] for members in found]
    return {
        "rate": rate,
        "members": {name: spread([row[i] for row in alone]) for i, name in enumerate(MEMBERS)},
        "mean_member": spread([statistics.fmean(row) for row in alone]),
        "best_member": spread([max(row) for row in alone]),
        "ensemble": spread([correct(members.mean(0), data.test_labels) for members in found]),
    }
