"""Batch normalization for PyTorch at the speed of copying memory.

>>> import fastbn
>>> model = fastbn.convert(model)  # every torch.nn.BatchNorm*d becomes a fastbn.BatchNorm*d
"""

from . import functional
from .autograd import BatchNormFunction
from .convert import convert, revert
from .explain import CudaPlan, Plan, explain
from .fold import fold
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .report import Report, report
from .sync import SyncBatchNorm, SyncBatchNormAct

__version__ = "0.1.0"
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormFunction",
    "CudaPlan",
    "Plan",
    "Report",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert",
    "explain",
    "fold",
    "functional",
    "report",
    "revert",
]
