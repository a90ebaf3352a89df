"""What convert, fold and the backends of torch.compile did to each batch norm of a model, as something to read."""

import copy
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import records
from ..arguments import check_module

_ATTRIBUTE = "_fastbn_report"


@dataclass
class Report:
    """What became of a model's batch norms, by their names in it.

    swapped: names of those that are fastbn's now.
    fused: name -> "batch_norm + add + relu", with "(training only)" or "(eval only)" where that is so.
    folded: name -> name of the convolution or linear layer that has taken it in.
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
    """What became of the batch norms of this model; print it for a table.

    That is what :func:`convert` with ``fuse=True`` and :func:`fold` did, and what was fused in the graphs that were
    captured since, by ``convert(model, fuse=True)`` or ``torch.compile(model, backend="fastbn")``. A graph is captured
    when the model is first called in a mode, so call it before you ask. A copy of a model has to be called itself.

    Args:
        module: the model, or what torch.compile made of it.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: nothing is known of it.
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
    """The pattern of a batch norm, or those of its modes where they differ; None if it has none."""
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
