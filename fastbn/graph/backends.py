"""torch.compile(model, backend="fastbn") and backend="fastbn_eager".

Both rewrite the graph that Dynamo captured (`matching`). "fastbn" passes it to Inductor, "fastbn_eager" runs it as it
is. torch finds them by the entry point group torch_dynamo_backends, without importing fastbn first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..records import record
from . import matching, pooling


def rewrite(module: fx.GraphModule, inputs: Sequence[Any] = ()) -> None:
    """Fuse the batch norms of a captured graph, and of the graphs that it calls, in place.

    inputs: what the graph's placeholders stand for, to tell `fastbn.report` whose batch norms these are.
    """
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            rewrite(child)
    found = matching.find(module.graph)
    if not found:
        return
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = {
        node: value for node, value in zip(placeholders, inputs, strict=False) if isinstance(value, Tensor)
    }  # fmt: skip
    # Matches last: a batch norm that is called twice, and fused once, is fused.
    for node, result in sorted(found, key=lambda pair: isinstance(pair[1], matching.Match)):
        call = matching.call_of(node)
        assert call is not None
        pattern, why = (str(result), "") if isinstance(result, matching.Match) else (None, result)
        record(values.get(call["weight"]), values.get(call["running_mean"]), call["training"], pattern, why)
    matching.replace(module.graph, found)
    module.recompile()


def fastbn_eager(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run the rewritten graph by torch's and fastbn's own operators."""
    rewrite(module, example_inputs)
    return module.forward


def fastbn(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile the rewritten graph by Inductor; mode and options are those of torch.compile for Inductor."""
    rewrite(module, example_inputs)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and all(tensor.device.type == "cpu" for tensor in tensors):
        options = _training_on_cpu(tensors) | (options or {})
        pooling.replace(module.graph)
        module.recompile()
    return torch._TorchCompileInductorWrapper(mode, options, None)(module, example_inputs)


def _training_on_cpu(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Inductor's options by the layout of the model's tensors, NOTES.md#under-torchcompile.

    By default Inductor makes convolutions channels_last, and converts a contiguous model's weights and activations in
    every step; oneDNN chooses its layouts itself, and without the conversions a step of ResNet-18 takes 13 % less. In a
    channels_last model there is nothing to convert, but Inductor leaves its default where a convolution has groups, and
    torch 2.13 then brings the inputs of a depthwise convolution's backward pass into another layout: 10 % of a step of
    MobileNetV2.
    """
    last = any(
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in tensors
    )
    return {"force_layout_optimization": True} if last else {"layout_optimization": False}
