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
        options = _training_on_cpu(module.graph, tensors) | (options or {})
        pooling.replace(module.graph)
        module.recompile()
    return torch._TorchCompileInductorWrapper(mode, options, None)(module, example_inputs)


def _training_on_cpu(graph: fx.Graph, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Inductor's options by the layout of the model's tensors and its convolutions, NOTES.md#under-torchcompile.

    By default Inductor makes the convolutions of a forward graph channels_last, and compiles the backward graph, which
    has no forward convolutions, without that. A contiguous model then converts weights and activations in every step,
    although oneDNN chooses its layouts itself: neither graph converts them here, 13 % less for ResNet-18 in float32. A
    channels_last model has both graphs in its layout, and so has one with depthwise convolutions, which are faster in
    it, and whose gradients torch 2.13 brings into a third layout otherwise: 18 % less for MobileNetV2.
    """
    last = any(
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in tensors
    )
    if last or any(_is_depthwise(node) for node in graph.nodes):
        return {"force_layout_optimization": True}
    return {"layout_optimization": False}


def _is_depthwise(node: fx.Node) -> bool:
    """Whether a node is a two-dimensional convolution whose outputs depend on one input channel each."""
    if node.op != "call_function" or node.target is not torch.conv2d:
        return False
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    value = weight.meta.get("example_value") if isinstance(weight, fx.Node) else None
    return bool(groups != 1) and isinstance(value, Tensor) and bool(value.size(1) == 1)
