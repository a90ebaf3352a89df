"""Batch normalization for PyTorch at the speed of copying memory.

>>> import fastbn
>>> model = fastbn.convert(model)  # every torch.nn.BatchNorm*d becomes a fastbn.BatchNorm*d
"""

from . import functional
from .autograd import BatchNormFunction
from .checkpointing import update_stats_once
from .explain import CudaPlan, Plan, explain
from .graph.convert import convert, freeze, revert
from .graph.fold import fold
from .graph.report import Report, report
from .nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from .nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d
from .nn.masked import MaskedBatchNorm1d
from .nn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .nn.sync import SyncBatchNorm, SyncBatchNormAct
from .serialization import SAFE_GLOBALS
from .stats import update_bn

__version__ = "0.1.0"
__all__ = [
    "SAFE_GLOBALS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormFunction",
    "CudaPlan",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "MaskedBatchNorm1d",
    "Plan",
    "Report",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert",
    "explain",
    "fold",
    "freeze",
    "functional",
    "report",
    "revert",
    "update_bn",
    "update_stats_once",
]
