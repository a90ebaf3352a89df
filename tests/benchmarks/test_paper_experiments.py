"""What each of the paper's experiments (benchmarks/paper) computes, on cases small enough to know the answer."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn
from torch.nn import functional as F

import fastbn

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("paper")]


# networks and training


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_inception_has_the_paper_s_shapes(norm, activation):
    from networks import Inception, Variant

    network = Inception(Variant(norm=norm, activation=activation), 12, 8, [1, 2, 1])
    shapes, x = [], torch.randn(5, 1, 12, 12)
    for layer in network:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 6, 6), (32, 6, 6), (48, 3, 3), (32, 3, 3), (32, 1, 1), (32,), (32,), (10,)]
    norms = [m for m in network.modules() if isinstance(m, fastbn.BatchNormAct2d)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == (len(convolutions) if norm else 0)
    assert all((m.bias is None) == norm for m in convolutions)


def test_variants_change_what_they_say():
    from networks import Inception, Variant

    plain = Inception(Variant(), 12, 4, [1, 2, 1])
    network = Inception(Variant(per_activation=True, dropout=0.1, response_norm=True), 12, 4, [1, 2, 1])
    assert network(torch.randn(4, 1, 12, 12)).shape == (4, 10)
    found = {name.split(".")[0] for name, m in network.named_modules() if isinstance(m, fastbn.BatchNormAct1d)}
    assert found == {"4"}  # the last module, behind the local response normalization
    kinds = [type(m) for m in network.modules()]
    assert nn.LocalResponseNorm in kinds and nn.LocalResponseNorm not in [type(m) for m in plain.modules()]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.1]
    torch.manual_seed(0)
    one = Inception(Variant(), 12, 4, [1])[0][0].weight
    torch.manual_seed(0)
    two = Inception(Variant(gain=2.0), 12, 4, [1])[0][0].weight
    torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("norm", [True, False])
def test_the_perceptron_keeps_the_inputs_of_its_last_sigmoids(norm):
    from networks import Perceptron

    network = Perceptron(64, [100, 100, 100], norm, 0.1)
    scores = network(torch.randn(60, 1, 8, 8))
    assert scores.shape == (60, 10)
    torch.testing.assert_close(network.layers[-1](torch.sigmoid(network.inputs)), scores)
    assert network.inputs.shape == (60, 100)
    if norm:
        torch.testing.assert_close(network.inputs.mean(0), torch.zeros(100), atol=1e-5, rtol=0)


def test_the_rate_falls_and_steps_are_observed():
    from training import fit, marks

    assert marks(50, 50_000, 4) == [50, 500, 5000, 50_000]
    assert marks(1, 6, 20) == [1, 2, 3, 4, 5, 6]
    network, seen = nn.Linear(1, 2, bias=False), []
    nn.init.zeros_(network.weight)
    x, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    moves = {}
    for last in (1.0, 0.01):
        copied = copy.deepcopy(network)
        modes = []
        copied.register_forward_pre_hook(lambda module, _, modes=modes: modes.append(module.training))

        def see(step, copied=copied):
            seen.append(step)
            copied.eval()

        fit(copied, [(1e-3 * x, label)] * 100, 1.0, 100, momentum=0.0, last=last, observe=see, at=[3, 100])
        assert modes == [True] * 100
        moves[last] = copied.weight[0, 0].item()
    assert seen == [3, 100] * 2
    # the gradient hardly changes, so the way is the sum of the rates
    assert moves[0.01] / moves[1.0] == pytest.approx(sum(0.01 ** (k / 100) for k in range(100)) / 100, rel=1e-3)


def test_steps_to_a_level():
    from training import steps_to

    assert [steps_to([10, 20, 30], [0.1, 0.6, 0.5], v) for v in (0.05, 0.35, 0.6, 0.7)] == [5, 15, 20, None]


def test_top_1_and_top_2():
    from training import correct

    scores, labels = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]]), torch.tensor([0, 1, 2])
    assert [correct(scores, labels, n) for n in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


# statistics over seeds


def test_intervals_are_scipy_s():
    from spread import paired, ratio

    ours, theirs = [0.8, 0.83, 0.79, 0.9], [0.7, 0.75, 0.75, 0.74]
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired(ours, theirs)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.sign == 1 and paired(theirs, ours).sign == -1
    assert paired([0.8, 0.7], [0.7, 0.8]).sign == 0 and paired([0.9], [0.1]).sign == 0
    assert ratio([2.0, 8.0], [1.0, 1.0]) == (pytest.approx(4), 0)
    assert ratio([2.0, 2.1, 2.2], [1.0, 1.0, 1.0])[1] == 1


# sigmoids


def test_the_typical_unit_has_the_median_of_the_paths():
    from sigmoids import typical, wander

    steps = np.array([0.0, 1.0, 0.0])
    tracks = np.stack([np.stack([a * steps - 1, a * steps, a * steps + 1], 1) for a in (3, 1, 2)], 2)
    assert typical(tracks) == 2
    assert wander(tracks) == 1.0  # of ranges 3, 1 and 2, over a width of 2


# the Inception networks


class Recorder:
    """Stands in for the workers: what is asked for, and an accuracy that is best at a rate of 0.045."""

    def __init__(self):
        self.asked = []

    def map(self, function, jobs, seeds, seconds):
        self.asked += jobs
        return {name: {"top1": [1 - abs(job["rate"] - 0.045)] * len(seeds)} for name, job in jobs.items()}


def test_the_control_s_rate_is_searched_on_validation_images_with_all_search_seeds():
    import sweep
    from settings import FULL

    workers = Recorder()
    assert sweep.rate_of_control(FULL, workers) == 0.045
    counts = {name: len({seed for n, _, seed in workers.asked if n == name}) for name in sweep.NETWORKS}
    assert counts == {"Inception": 2, "Inception with BN": 1, "Inception, sigmoid": 1, "Inception with BN, sigmoid": 1}
    assert not {seed for _, _, seed in workers.asked} & {*FULL.seeds, *FULL.more_seeds}


def variants(changes=()):
    """Three seeds of the paper's figure 3."""
    from inception import PAPER

    made = {}
    for name, (steps, best) in {**PAPER, **dict(changes)}.items():
        top1 = [best + 0.001 * seed for seed in range(3)]
        made[name] = {"top1": top1, "reached": [steps and steps + 0.1 * seed for seed in range(3)]}
    return made


def test_claims_that_replicate_and_claims_that_do_not():
    from inception import claims

    assert [text.split(":")[0] for text in claims(variants()).values()] == ["yes"] * 8
    changed = claims(variants({"BN-x30": (None, 0.70), "BN-x5-Sigmoid": (None, 0.73), "Inception-Sigmoid": (None, 0.5),
                               "BN-x5": (20.0, 0.73)}.items()))  # fmt: skip
    assert [name for name, text in changed.items() if not text.startswith("yes")] == [
        "BN-x5 takes fewer steps than BN-Baseline", "BN-x30 takes fewer steps than Inception",
        "BN-x30 ends higher than BN-x5", "Inception ends higher than BN-x5-Sigmoid",
        "Inception-Sigmoid stays at chance",
    ]  # fmt: skip
    assert changed["BN-x5 takes fewer steps than BN-Baseline"].startswith("**the opposite**: 0.7 times")
    assert "seeds of BN-x30 never arrive" in changed["BN-x30 takes fewer steps than Inception"]
    noisy = variants()
    noisy["BN-x5"]["top1"] = [0.9, 0.7, 0.6]
    assert claims(noisy)["BN-x5 ends higher than Inception"].startswith("does not show")


def test_the_level_is_the_control_s_best_on_the_way_seed_by_seed():
    from inception import reached

    control = [[0.2, 0.8, 0.6], [0.1, 0.2, 0.4]]
    assert reached([10, 20, 30], [[0.4, 0.8, 0.9], [0.4, 0.4, 0.4]], control) == [20, 10]
    assert reached([10, 20, 30], [[0.7, 0.7, 0.7], [0.0, 0.0, 0.8]], control) == [None, 25]


def test_an_ensemble_takes_the_mean_and_its_best_member_is_the_validation_set_s():
    from ensemble import MEMBERS, SINGLE, all_rows, summary

    # three images of class 0; each member is wrong about another one, and the others outvote it
    members = {}
    for number, name in enumerate(MEMBERS):
        scores = torch.tensor([[0.9, 0.1, 0.0]] * 3)
        scores[number % 3] = torch.tensor([0.3, 0.4, 0.3])
        members[name] = {"top1": [2 / 3 - number / 100], "top2": [1.0], "curve": [[0.9, number / 10]],
                         "probabilities": [scores.tolist()]}  # fmt: skip
    found = summary(members, torch.zeros(3, dtype=torch.long))
    assert found["ensemble"]["top1"] == [1.0]
    assert found["best member"]["top1"] == [2 / 3 - 0.05]  # the last one, which is worst on test images
    assert found["mean member"]["top1"] == [pytest.approx(2 / 3 - 0.025)]
    assert SINGLE not in all_rows(found, {"results": {}})
    one, two = ({"curve": [[0.9, end]], "top1": [top], "top2": [1.0]} for end, top in ((0.5, 0.9), (0.6, 0.8)))
    rows = all_rows(found, {"results": {"inception": {"protocols": {"P": {"a": one}, "T": {"b": two}}}}})
    assert rows[SINGLE]["top1"] == [0.8]


# statistics at inference


def test_algorithm_2_averages_variances_and_corrects_them():
    from population import algorithm_2

    network = nn.Sequential(nn.Flatten(), fastbn.BatchNorm1d(4, affine=False))
    network(100 + torch.randn(5, 4))  # moving averages of something else
    moving = network.eval()[1].running_mean.clone()
    stream = [3 + k * torch.randn(5, 4, dtype=torch.float64).float() for k in (1, 2, 3)]
    exact, biased = algorithm_2(network, stream, True)[1], algorithm_2(network, stream, False)[1]
    rows = torch.stack(stream).double()
    torch.testing.assert_close(exact.running_mean.double(), rows.mean((0, 1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.running_var.double(), rows.var(1).mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(biased.running_var.double(), rows.var(1, correction=0).mean(0), rtol=1e-5, atol=0)
    assert torch.equal(network[1].running_mean, moving) and network[1].momentum == 0.1


def test_batch_statistics_leave_the_network_alone():
    from population import by_batch

    network = nn.Sequential(nn.Flatten(), fastbn.BatchNorm1d(4, affine=False)).eval()
    x = 3 + torch.randn(10, 4)
    y = by_batch(network, x, 4)  # batches of 4 and 6
    torch.testing.assert_close(torch.stack([y[:4].mean(0), y[4:].mean(0)]), torch.zeros(2, 4), atol=1e-6, rtol=0)
    assert y[8:].mean(0).abs().max() > 1e-3
    assert not network.training and network[1].running_mean.abs().max() == 0


def test_where_differences_show():
    from population import where
    from spread import Difference

    assert where({4: Difference(1, 0.5), 8: Difference(0, 1), 16: Difference(-2, 1)}) == "higher at 4 and lower at 16"
    assert where({4: Difference(1, 2.0)}) == "no difference shows"


# internal covariate shift


def test_distance_of_a_shift_and_of_a_scale():
    from shift import distance, moments

    mean, std = torch.tensor([0.0, 5.0]), torch.tensor([2.0, 2.0])
    assert distance((mean, std), (mean, std)) == 0
    assert distance((mean, std), (mean + 1, std)) == pytest.approx(0.5)
    assert distance((mean, std), (mean, 2 * std)) == pytest.approx(1)
    x = torch.randn(20, 3)
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    ((m, s),) = moments(network, x)
    inputs = network[1](network[0](x)).double()
    torch.testing.assert_close((m, s), (inputs.mean(0), inputs.std(0, correction=0)))
    assert not network[2]._forward_pre_hooks


def test_gradients_change_by_what_the_layers_before_did():
    from shift import gradient_change, values_of

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    layers, batch = [network[0], network[2], network[4]], (torch.randn(8, 5).double(), torch.randint(3, (8,)))
    before, old = values_of(network), copy.deepcopy(network)
    assert gradient_change(network, layers, batch, before) == [(0, pytest.approx(1))] * 2
    with torch.no_grad():
        for p in network.parameters():
            p += 0.3 * torch.randn_like(p)
    moved = copy.deepcopy(network)
    found = gradient_change(network, layers, batch, before)
    for p, q in zip(network.parameters(), moved.parameters(), strict=True):
        assert torch.equal(p, q)
    for number, at in ((0, 2), (1, 4)):
        mixed = nn.Sequential(*moved[:at], *old[at:])
        g, h = (torch.autograd.grad(F.cross_entropy(n(batch[0]), batch[1]), n[at].weight)[0].flatten()
                for n in (old, mixed))  # fmt: skip
        assert found[number] == pytest.approx((((h - g).norm() / g.norm()).item(), F.cosine_similarity(g, h, 0).item()))


# ablation and demonstrations


def test_distortion_shifts_by_two_pixels_and_mirrors():
    from ablation import distorted

    image = torch.zeros(200, 1, 9, 9)
    image[:, :, 3, 4] = 1
    image[:, :, 4, 2] = 2
    stream = distorted(((image, None) for _ in range(50)), 0)
    seen, mirrored = set(), 0
    for pictures, _ in stream:
        assert pictures.shape == image.shape
        places = pictures.flatten(1).argmax(1)  # of the 2, which is in column 2 or, mirrored, 6
        rows, columns = places // 9, places % 9
        assert len(rows.unique()) == 1 and len(columns.unique()) == 2 and columns.max() - columns.min() == 4
        seen.add((rows[0].item() - 4, columns.min().item() - 2))
        mirrored += (columns == columns.max()).sum().item()
    assert seen <= {(i, j) for i in range(-2, 3) for j in range(-2, 3)} and len(seen) > 15
    assert 0.45 < mirrored / 10_000 < 0.55


def test_each_arm_of_the_ablation_trains_another_network(tmp_path):
    import ablation
    from settings import Plan

    plan = Plan(width=2, strides=[2, 1], images=48, steps=12, batch=16, rate=0.1, test=100)
    weights, fit = [], ablation.fit

    def kept(network, *args, **how):
        fit(network, *args, **how)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))

    ablation.fit = kept
    try:
        for arm in ablation.ARMS.values():
            ablation.train(tmp_path, plan, 0, **arm)
    finally:
        ablation.fit = fit
    assert len({tuple(w.tolist()) for w in weights}) == len(ablation.ARMS)


def test_a_mean_outside_the_gradient_lets_the_bias_grow(tmp_path):
    from demonstrations import drift
    from settings import Plan

    plan = Plan(shown=[20, 200], batch=60, width=20, rate=0.1)
    inside, outside = (drift(tmp_path, plan, inside, 0)["bias"] for inside in (True, False))
    assert max(inside) < 1e-5
    assert outside[1] > 2 * outside[0] > 1e-3


def test_batch_norm_is_blind_to_the_scale_of_weights(tmp_path, monkeypatch):
    import demonstrations
    from settings import Plan

    plan = Plan(batch=60, width=20)
    assert max(demonstrations.scaled(tmp_path, plan, 10.0, 0)) < 1e-3
    monkeypatch.setattr(demonstrations, "fastbn", SimpleNamespace(BatchNorm1d=nn.LayerNorm))
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: torch.tanh(x))
    assert min(demonstrations.scaled(tmp_path, plan, 10.0, 0)) > 0.1  # a layer that is not blind is found out
