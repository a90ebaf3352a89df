"""Every public name of fastbn, as a program that is checked by `mypy --strict` (test_types.py), and not run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastbn
from fastbn import functional as F


def modules(x: Tensor) -> list[nn.Module]:
    fastbn.BatchNorm2d(8, 1e-5, None, True, True, "cuda:0", torch.float32, bias=False)
    fastbn.BatchNormAct2d(8, activation="leaky_relu", activation_param=0.2, device=torch.device("cpu"))
    fastbn.SyncBatchNorm(8, process_group=None)
    assert_type(fastbn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential()), nn.Module)
    batch_norm: nn.BatchNorm2d = fastbn.BatchNorm2d(8)
    assert_type(fastbn.BatchNormAct1d(8).forward(x, residual=x), Tensor)
    assert_type(fastbn.MaskedBatchNorm1d(8).forward(x, torch.tensor([3, 4])), Tensor)
    return [
        batch_norm,
        fastbn.BatchNorm1d(8),
        fastbn.BatchNorm3d(8),
        fastbn.BatchNormAct3d(8),
        fastbn.SyncBatchNormAct(8, activation="silu"),
        fastbn.GhostBatchNorm1d(8, virtual_batch_size=16),
        fastbn.GhostBatchNorm2d(8, virtual_batch_size=16),
        fastbn.FrozenBatchNorm1d(8),
        fastbn.FrozenBatchNorm2d(8, trainable=True),
        fastbn.FrozenBatchNorm3d(8, device="cpu"),
    ]


def functions(x: Tensor, mean: Tensor, var: Tensor) -> None:
    assert_type(
        F.batch_norm(x, mean, var, training=True, momentum=0.1, eps=1e-5, activation="relu", residual=x), Tensor
    )
    assert_type(F.ghost_batch_norm(x, 16, None, None, training=True), Tensor)
    assert_type(F.masked_batch_norm(x, x > 0, mean, var, None, None, True), Tensor)
    assert_type(fastbn.functional.batch_norm(x, None, None, training=True), Tensor)
    assert_type(fastbn.BatchNormFunction.apply(x, None, None, None, 1e-5), tuple[Tensor, Tensor])


def models(model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> None:
    assert_type(fastbn.convert(model, fuse=True, sync=None), nn.Module)
    assert_type(fastbn.freeze(fastbn.fold(fastbn.revert(model)), trainable=True), nn.Module)
    report = fastbn.report(model)
    assert_type(report, fastbn.Report)
    assert_type(report.fused, dict[str, str])
    assert_type(report.swapped, list[str])
    progress: Callable[[Any], Any] = iter
    fastbn.update_bn(loader, model, "cpu", mode="eval", progress=progress)
    with fastbn.update_stats_once():
        model(loader[0][0])
    torch.serialization.add_safe_globals(fastbn.SAFE_GLOBALS)


def plans(x: Tensor) -> str:
    plan = fastbn.explain(x, training=False)
    if isinstance(plan, fastbn.CudaPlan):
        assert_type(plan.strategy, tuple[str, str])
    else:
        assert_type(plan, fastbn.Plan)
        assert_type(plan.forward_bytes, int)
    return f"{fastbn.__version__}: {plan}"
