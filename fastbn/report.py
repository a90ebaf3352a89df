"""In: what convert and fold did to each batch norm. Out: the same as something to read, kept with the model."""

from dataclasses import dataclass, field

from torch import nn

_ATTRIBUTE = "_fastbn_report"


@dataclass
class Report:
    """What became of a model's batch norms, by their names in it.

    swapped: names of those that are fastbn's now.
    fused: name -> "batch_norm + add + relu in layer1.0", the module whose forward runs it.
    folded: name -> name of the convolution or linear layer that has taken it in.
    left: name -> why it was not fused, or not folded.
    """

    swapped: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self):
        kinds = ("swapped", "fused", "folded", "left")
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds)
        rows = [(name, "fused", what) for name, what in self.fused.items()]
        rows += [(name, "folded", f"into {what}") for name, what in self.folded.items()]
        rows += [(name, "left", why) for name, why in self.left.items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join([f"batch norms: {counts}", *(f"  {n or '(root)':{width}}  {k:6}  {w}" for n, k, w in rows)])


def report(module: nn.Module) -> Report:
    """What the last :func:`convert` with ``fuse=True`` and :func:`fold` did to this model; print it for a table.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: neither was called on it.
    """
    check_module(module, "report")
    found = module.__dict__.get(_ATTRIBUTE)
    if found is None:
        raise ValueError("fastbn.report: none yet; fastbn.convert(model, fuse=True) and fastbn.fold(model) make it")
    return found


def check_module(module: object, caller: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastbn.{caller}: expected a torch.nn.Module, got {type(module).__name__}")


def keep(module, made):
    module.__dict__[_ATTRIBUTE] = made


def forget(module):
    module.__dict__.pop(_ATTRIBUTE, None)
