"""What convert, fold and the backends of torch.compile have done to each batch norm of a model."""

import copy
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import records
from ..arguments import check_module

_ATTRIBUTE = "_fastbn_report"


@dataclass
class Report:
    """What was done to the batch norms of a model; print it for a table.

    Attributes:
        swapped: the names of those that are fastbn's.
        fused: name -> pattern, such as "batch_norm + add + relu"; "(training only)" or "(eval only)" is added where it
            differs between the modes.
        folded: name -> name of the convolution or linear layer that it was folded into.
        left: name -> why it was not fused, or not folded.
    """

    swapped: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ("swapped", "fused", "folded", "left")
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds)
        rows = [(name, "fused", what) for name, what in self.fused.items()]
        rows += [(name, "folded", f"into {what}") for name, what in self.folded.items()]
        rows += [(name, "left", why) for name, why in self.left.items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join([f"batch norms: {counts}", *(f"  {n or '(root)':{width}}  {k:6}  {w}" for n, k, w in rows)])


def report(module: nn.Module) -> Report:
    """Show which batch norms of a model were converted, fused or folded, and why others were not.

    The report has the results of :func:`convert` with ``fuse=True`` and of :func:`fold`, and those of the graphs that
    were captured since, by ``convert(model, fuse=True)`` or ``torch.compile(model, backend="fastbn")``. A graph is
    captured when the model is first called in a mode, so call the model first. A copy of a model has to be called too.

    Args:
        module: the model, or the result of torch.compile.

    Returns:
        A Report; print it for a table.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: there is nothing to report.
    """
    check_module(module, "report")
    module = getattr(module, "_orig_mod", module)
    kept = module.__dict__.get(_ATTRIBUTE)
    found = Report() if kept is None else copy.deepcopy(kept)
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and name not in found.folded}
    captured = {name: results for name, m in norms.items() if (results := records.recorded(m))}
    if kept is None and not captured:
        raise ValueError(
            "fastbn.report: nothing is known of this model: fastbn.convert(model, fuse=True), fastbn.fold(model) and "
            'the first call of torch.compile(model, backend="fastbn") make a report'
        )
    for name in norms:
        results = captured.get(name, {})
        if (fused := _described(results)) is not None:
            found.fused[name] = fused
        elif name not in found.left:
            found.left[name] = "; ".join(dict.fromkeys(why for _, why in results.values())) or _NOT_CAPTURED
    return found


_NOT_CAPTURED = "no captured forward calls it; the report is complete after the model's first call"


def _described(results: dict[bool, tuple[str | None, str]]) -> str | None:
    """The pattern of a batch norm, or the patterns of both modes where they differ; None if there is none."""
    patterns = {pattern for pattern, _ in results.values()}
    if len(patterns) < 2:
        return patterns.pop() if patterns else None
    modes = {True: "training", False: "eval"}
    return "; ".join(f"{pattern} ({modes[mode]} only)" for mode, (pattern, _) in results.items() if pattern is not None)


def keep(module: nn.Module, made: Report) -> None:
    getattr(module, "_orig_mod", module).__dict__[_ATTRIBUTE] = made


def forget(module: nn.Module) -> None:
    getattr(module, "_orig_mod", module).__dict__.pop(_ATTRIBUTE, None)
    records.forget(module)
