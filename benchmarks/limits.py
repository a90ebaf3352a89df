"""What memory allows: functions to time beside the batch norms, in the same rounds and on the same tensors.

copy    into memory that is already there: the most that any kernel can reach, at two tensors moved
clone   a copy into a fresh tensor: pays for page faults where the allocator returns memory to the system
add     of two tensors into a fresh one: three tensors moved, as in the backward pass
"""

from collections.abc import Callable

import torch
from suite import Tensors


def limits(tensors: Tensors) -> dict[str, Callable[[], object]]:
    x, dy = tensors.x.detach(), tensors.dy
    destination = torch.zeros_like(x)
    return {
        "copy": lambda: destination.copy_(x),
        "clone": lambda: x.clone(),
        "add": lambda: torch.add(x, dy),
    }


# The limits that each pass is shown against.
OF_PASS = {
    "forward": ("copy", "clone"),
    "forward+backward": ("copy", "clone", "add"),
    "eval": ("copy", "clone"),
}
