"""cuDNN's graph API as a peer, through nvidia-cudnn-frontend: a module with torch's parameters and buffers.

Written from the interface of its Python package; it has not been run on a GPU yet. A graph is built for each shape and
type; what cuDNN has no plan for raises its error, which the benchmark records.
"""

import cudnn
import torch
from torch import nn

_TYPES = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16,
          torch.float32: cudnn.data_type.FLOAT}  # fmt: skip


class _Graph:
    """A built graph with its workspace: called with the tensors in the order in which they were declared."""

    def __init__(self, x: torch.Tensor, handle) -> None:
        wide = cudnn.data_type.FLOAT
        how = {"io_data_type": _TYPES[x.dtype], "intermediate_data_type": wide, "compute_data_type": wide}
        self.graph, self.handle = cudnn.pygraph(handle=handle, **how), handle
        self.symbols: list = []

    def input(self, tensor: torch.Tensor):
        self.symbols.append(self.graph.tensor_like(tensor))
        return self.symbols[-1]

    def output(self, symbol, dtype: torch.dtype) -> None:
        symbol.set_output(True).set_data_type(_TYPES[dtype])
        self.symbols.append(symbol)

    def build(self, device: torch.device) -> None:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = torch.empty(self.graph.get_workspace_size(), device=device, dtype=torch.uint8)

    def __call__(self, *tensors: torch.Tensor) -> None:
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = dict(zip(self.symbols, tensors, strict=True))
        self.graph.execute(pack, self.workspace, handle=self.handle)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, owner):
        y = torch.empty_like(x)
        mean, rstd = (torch.empty_like(owner.mean) for _ in range(2))
        scale, shift = (t.detach().view_as(owner.mean) for t in (weight, bias))
        running = owner.mean, owner.var
        owner.forward_graph(x)(x, scale, shift, *running, owner.eps, owner.momentum, y, mean, rstd, *running)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.owner = owner
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dx, (dweight, dbias) = torch.empty_like(x), (torch.empty_like(mean) for _ in range(2))
        scale = weight.detach().view_as(mean)
        ctx.owner.backward_graph(x, dy)(dy, x, scale, mean, rstd, dx, dweight, dbias)
        return dx, dweight.flatten(), dbias.flatten(), None


class CudnnBatchNorm(nn.Module):
    trains_only = True  # in eval there is nothing that a graph would do and torch does not

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn, self.handle = bn, cudnn.create_handle()
        self.eps, self.momentum = (torch.full((1, 1, 1, 1), value) for value in (bn.eps, bn.momentum))
        # views of the buffers, in the shape that cuDNN wants
        self.mean, self.var = (t.view(1, -1, 1, 1) for t in (bn.running_mean, bn.running_var))
        self.graphs: dict = {}

    def forward_graph(self, x: torch.Tensor) -> _Graph:
        key = "forward", x.shape, x.dtype
        if key not in self.graphs:
            g = _Graph(x, self.handle)
            names = "input", "scale", "bias", "in_running_mean", "in_running_var", "epsilon", "momentum"
            values = x, self.mean, self.mean, self.mean, self.var, self.eps, self.momentum
            inputs = {name: g.input(value) for name, value in zip(names, values, strict=True)}
            y, *statistics = g.graph.batchnorm(name="bn", **inputs)
            g.output(y, x.dtype)
            for symbol in statistics:
                g.output(symbol, torch.float32)
            g.build(x.device)
            self.graphs[key] = g
        return self.graphs[key]

    def backward_graph(self, x: torch.Tensor, dy: torch.Tensor) -> _Graph:
        key = "backward", x.shape, x.dtype
        if key not in self.graphs:
            g = _Graph(x, self.handle)
            names, values = ("grad", "input", "scale", "mean", "inv_variance"), (dy, x, *[self.mean] * 3)
            inputs = {name: g.input(value) for name, value in zip(names, values, strict=True)}
            dx, dweight, dbias = g.graph.batchnorm_backward(name="dbn", **inputs)
            g.output(dx, x.dtype)
            for symbol in (dweight, dbias):
                g.output(symbol, torch.float32)
            g.build(x.device)
            self.graphs[key] = g
        return self.graphs[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Function.apply(x, self.bn.weight, self.bn.bias, self)
