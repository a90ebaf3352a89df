"""The classes and functions that torch.load(weights_only=True) has to allow for whole models with fastbn's modules."""

from typing import Any

from .graph import fusing
from .graph.fold import FoldedBatchNorm
from .graph.report import Report
from .nn import frozen, ghost, masked, modules, sync

#: Classes and functions of fastbn in pickles of whole models that were converted, fused, folded or frozen. Pass them to
#: ``torch.serialization.add_safe_globals`` together with the model's own classes and those of torch.nn that it uses. A
#: ``state_dict`` needs none of them.
SAFE_GLOBALS: list[Any] = [
    modules.BatchNorm1d,
    modules.BatchNorm2d,
    modules.BatchNorm3d,
    modules.BatchNormAct1d,
    modules.BatchNormAct2d,
    modules.BatchNormAct3d,
    frozen.FrozenBatchNorm1d,
    frozen.FrozenBatchNorm2d,
    frozen.FrozenBatchNorm3d,
    ghost.GhostBatchNorm1d,
    ghost.GhostBatchNorm2d,
    masked.MaskedBatchNorm1d,
    sync.SyncBatchNorm,
    sync.SyncBatchNormAct,
    FoldedBatchNorm,
    Report,
    fusing._remake,
]
