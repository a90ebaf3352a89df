"""The peers that fastbn is compared with: an adapter each, from torch's batch norm to calls to time.

Most peers are PyTorch modules: to add one, write a function that makes its module from torch's (or raises ImportError
where the peer is not installed) and list it in PEERS, with what it cannot do. One that is not needs a runner like
ModuleRunner, as peers_jax.py has.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from suite import Case, Tensors
from torch import nn
from torch._functorch import config as functorch

# Other peers may round more than once (torch.compile does, in gradients of half types): the check only asks that they
# compute the same function.
PEERS_SLACK = 50.0


def parameters_of(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and bias of a batch norm, or of the one that a peer's module wraps."""
    named = {name.rpartition(".")[2]: value for name, value in module.named_parameters()}
    return named["weight"], named["bias"]


class ModuleRunner:
    """A peer that is a PyTorch module, set up for a case. Calls take the sets of tensors in turn: one set is a warm
    input, sets that together exceed the cache are cold ones."""

    strided = True  # outputs are torch's, with the strides that torch's have

    def __init__(self, peer: "Peer", case: Case, sets: list[Tensors]) -> None:
        self.sets = sets
        self.module = peer.make(sets[0].module, case.epilogue).train()
        self.frozen = None
        if not case.epilogue and not getattr(self.module, "trains_only", False):
            self.frozen = peer.make(sets[0].module, "").eval().requires_grad_(False)
        self.parameters = parameters_of(self.module)

    def _train(self, tensors: Tensors) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        inputs = (tensors.x,) if tensors.residual is None else (tensors.x, tensors.residual)
        y = self.module(*inputs)
        leaves = (tensors.x, *self.parameters, *inputs[1:])
        return y, torch.autograd.grad(y, leaves, tensors.dy)

    def outputs(self) -> dict[str, torch.Tensor]:
        """All results of a pass over the first set, for the check."""
        y, gradients = self._train(self.sets[0])
        found = dict(zip(("dx", "dweight", "dbias", "dresidual"), gradients, strict=False))
        buffers = {name.rpartition(".")[2]: value for name, value in self.module.named_buffers()}
        found |= {"y": y, "running_mean": buffers["running_mean"], "running_var": buffers["running_var"]}
        if self.frozen is not None:
            with torch.no_grad():
                found["y in eval"] = self.frozen(self.sets[0].x)
        return {name: value.detach() for name, value in found.items()}

    def calls(self) -> dict[str, Callable[[], object]]:
        """The call of a training loop or a server, for each pass."""

        def turns() -> Callable[[], Tensors]:
            if len(self.sets) == 1:
                return lambda only=self.sets[0]: only
            state = {"next": 0}

            def following() -> Tensors:
                state["next"] = (state["next"] + 1) % len(self.sets)
                return self.sets[state["next"]]

            return following

        forward, backward, evaluate = turns(), turns(), turns()

        def run_forward() -> torch.Tensor:
            tensors = forward()
            return self.module(tensors.x) if tensors.residual is None else self.module(tensors.x, tensors.residual)

        calls = {"forward": run_forward, "forward+backward": lambda: self._train(backward())[1]}
        if self.frozen is not None:
            values = {id(tensors): tensors.x.detach() for tensors in self.sets}
            calls["eval"] = lambda: self.frozen(values[id(evaluate())])
        return calls


@dataclass(frozen=True)
class Peer:
    make: Callable[
        [nn.Module, str], nn.Module
    ]  # torch's batch norm and the epilogue -> called with x, or x and residual
    refuses: Callable[[Case, str], str] = lambda case, device: (
        ""
    )  # why it cannot do a case on a device; empty if it can
    needs: str = ""  # the module that must be there
    runner: Callable = ModuleRunner
    slack: float = PEERS_SLACK

    def __call__(self, module: nn.Module) -> nn.Module:
        return self.make(module, "")


class Ended(nn.Module):
    """A batch norm followed by an add and a ReLU, in place or not."""

    def __init__(self, bn: nn.Module, epilogue: str, in_place: bool) -> None:
        super().__init__()
        self.bn, self.relu, self.in_place = bn, "relu" in epilogue, in_place

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        z = self.bn(x)
        if residual is not None:
            z = z.add_(residual) if self.in_place else z + residual
        if not self.relu:
            return z
        return torch.relu_(z) if self.in_place else torch.relu(z)


def _fastbn(module: nn.Module, epilogue: str) -> nn.Module:
    import fastbn

    if not epilogue:
        return fastbn.convert(copy.deepcopy(module))
    dimensions = type(module).__name__.removeprefix("BatchNorm")
    how = {"eps": module.eps, "momentum": module.momentum, "dtype": module.weight.dtype, "device": module.weight.device}
    fused = getattr(fastbn, f"BatchNormAct{dimensions}")(module.num_features, **how)
    fused.load_state_dict(module.state_dict())
    return fused


def _torch(module: nn.Module, epilogue: str) -> nn.Module:
    """As the networks of torchvision are written: the add and the ReLU in place, which is torch's fastest way."""
    return Ended(copy.deepcopy(module), epilogue, in_place=True) if epilogue else copy.deepcopy(module)


def _torch_separate(module: nn.Module, epilogue: str) -> nn.Module:
    return Ended(copy.deepcopy(module), epilogue, in_place=False)


def _function(x, residual, weight, bias, mean, var, training, momentum, eps, relu):
    z = nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if relu else z


class Compiled(nn.Module):
    """torch.compile of batch norm and what follows, not in place: that is left to the compiler."""

    def __init__(self, bn: nn.Module, epilogue: str, function: Callable) -> None:
        super().__init__()
        self.bn, self.relu, self.function = copy.deepcopy(bn), "relu" in epilogue, function

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        bn = self.bn
        statistics = bn.running_mean, bn.running_var
        return self.function(
            x, residual, bn.weight, bn.bias, *statistics, self.training, bn.momentum, bn.eps, self.relu
        )


# One compilation for all shapes of a kind: 3 to 7 s for each shape are more than the benchmark has. Where both were
# measured, this one took 0.65 to 1.09 of the time of one that knows the shape; 1.27 in eval of (32,256,28,28) float32.
_for_all_shapes: list[Callable] = []


def _torch_compile(module: nn.Module, epilogue: str) -> nn.Module:
    functorch.donated_buffer = False  # or a backward pass cannot be timed over and over
    if module.weight.is_cuda:  # where it compiles for each shape
        torch.compiler.reset()  # or the many shapes of a run make it give up and run eagerly
        return torch.compile(_torch_separate(module, epilogue) if epilogue else copy.deepcopy(module), dynamic=False)
    if not _for_all_shapes:
        torch._dynamo.config.cache_size_limit = 64  # types, layouts and sizes of one are kinds of their own
        _for_all_shapes.append(torch.compile(_function, dynamic=True))
    return Compiled(module, epilogue, _for_all_shapes[0])


def _torch_cooperative(module: nn.Module, epilogue: str) -> nn.Module:
    """With Inductor's reductions by several thread blocks and a barrier among them."""
    functorch.donated_buffer = False
    torch.compiler.reset()
    plain = _torch_separate(module, epilogue) if epilogue else copy.deepcopy(module)
    return torch.compile(plain, dynamic=False, options={"triton.cooperative_reductions": True})


def _timm(module: nn.Module, epilogue: str) -> nn.Module:
    from timm.layers import BatchNormAct2d

    act = {"apply_act": bool(epilogue), "act_layer": nn.ReLU, "inplace": True}
    made = BatchNormAct2d(module.num_features, eps=module.eps, momentum=module.momentum, **act)
    made.load_state_dict(module.state_dict())
    return made.to(module.weight.device, module.weight.dtype)


def _inplace_abn(module: nn.Module, epilogue: str) -> nn.Module:
    from inplace_abn import ABN

    made = ABN(module.num_features, eps=module.eps, momentum=module.momentum, activation="identity")
    state = module.state_dict()
    state.pop("num_batches_tracked", None)
    made.load_state_dict(state)
    return _InPlace(made.to(module.weight.device))


class _InPlace(nn.Module):
    """inplace_abn's function overwrites its input: it gets a copy, whose time counts, because the input is used again
    here. In a network without other uses of it that copy is not needed."""

    def __init__(self, abn: nn.Module) -> None:
        super().__init__()
        self.abn = abn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from inplace_abn.functions import inplace_abn

        m = self.abn
        state = m.weight, m.bias, m.running_mean, m.running_var, self.training, m.momentum, m.eps
        return inplace_abn(x.clone(), *state, "identity", 0.01)


def _apex_groupbn(module: nn.Module, epilogue: str) -> nn.Module:
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    made = BatchNorm2d_NHWC(module.num_features, fuse_relu="relu" in epilogue)
    made.load_state_dict(module.state_dict(), strict=False)
    return made.to(module.weight.device)


def _apex_sync(module: nn.Module, epilogue: str) -> nn.Module:
    from apex.parallel import SyncBatchNorm

    made = SyncBatchNorm(module.num_features, eps=module.eps, momentum=module.momentum, fuse_relu="relu" in epilogue)
    made.load_state_dict(module.state_dict())
    return made.to(module.weight.device)


def _cudnn(module: nn.Module, epilogue: str) -> nn.Module:
    from peers_cudnn import CudnnBatchNorm

    return CudnnBatchNorm(copy.deepcopy(module))


def _jax(module: nn.Module, epilogue: str) -> nn.Module:
    raise TypeError("JAX has no PyTorch module: its runner sets the case up")


def _jax_runner(peer: Peer, case: Case, sets: list[Tensors]):
    from peers_jax import JaxRunner

    return JaxRunner(case, sets)


def _needs_epilogue(case: Case, device: str) -> str:
    return "" if case.epilogue else "is torch where nothing follows batch norm"


def _cooperative_refuses(case: Case, device: str) -> str:
    return "" if device == "cuda" else "cooperative reductions are of Inductor's GPU code (Triton)"


def _timm_refuses(case: Case, device: str) -> str:
    if len(case.shape) != 4:
        return "BatchNormAct2d takes four dimensions"
    return "BatchNormAct2d takes no residual" if "add" in case.epilogue else ""


def _cuda_only(*conditions: Callable[[Case], str]) -> Callable[[Case, str], str]:
    def refuses(case: Case, device: str) -> str:
        return "needs CUDA" if device != "cuda" else next(filter(None, (c(case) for c in conditions)), "")

    return refuses


def _half_channels_last(case: Case) -> str:
    fits = case.dtype in (torch.float16, torch.bfloat16) and case.layout == "channels_last" and len(case.shape) == 4
    return "" if fits else "takes four-dimensional channels_last tensors of half types"


def _no_epilogue(case: Case) -> str:
    return "this adapter covers batch norm alone" if case.epilogue else ""


def _no_add(case: Case) -> str:
    return "takes no residual" if "add" in case.epilogue else ""


def _jax_refuses(case: Case, device: str) -> str:
    import os

    if device == "cpu" and torch.get_num_threads() != os.cpu_count():
        return f"XLA uses every core, and this run {torch.get_num_threads()} of {os.cpu_count()}"
    return ""


PEERS: dict[str, Peer] = {
    "fastbn": Peer(_fastbn, needs="fastbn", slack=1.0),
    "torch": Peer(_torch),
    "torch separate": Peer(_torch_separate, _needs_epilogue),
    "torch.compile": Peer(_torch_compile),
    "torch.compile cooperative": Peer(_torch_cooperative, _cooperative_refuses),
    "jax": Peer(_jax, _jax_refuses, needs="jax", runner=_jax_runner),
    "timm": Peer(_timm, _timm_refuses, needs="timm.layers"),
    "inplace_abn": Peer(_inplace_abn, _cuda_only(_no_epilogue), needs="inplace_abn"),
    "apex groupbn": Peer(_apex_groupbn, _cuda_only(_half_channels_last, _no_add), needs="apex.contrib.groupbn"),
    "apex SyncBatchNorm": Peer(_apex_sync, _cuda_only(_no_add), needs="apex.parallel"),
    "cudnn graph": Peer(_cudnn, _cuda_only(_no_epilogue, _half_channels_last), needs="cudnn"),
}  # fmt: skip
# With all of them named, a run tells of each what it was not compared with, and why.
OTHERS = [name for name in PEERS if name not in ("fastbn", "torch")]


def available(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those of ``names`` that can be imported here, and why the others cannot."""
    here, missing = [], {}
    for name in names:
        try:
            if PEERS[name].needs:
                importlib.import_module(PEERS[name].needs)
            here.append(name)
        except Exception as error:  # a broken installation may raise anything, and is no reason to stop
            missing[name] = f"{type(error).__name__}: {error}"
    return here, missing


def backend_of_torch(tensors: Tensors) -> str:
    """Which of its kernels torch chooses: Native, Cudnn, ..."""
    m = tensors.module
    try:
        chosen = torch._C._select_batch_norm_backend(
            tensors.x, m.weight, m.bias, m.running_mean, m.running_var, True, m.eps
        )
    except (AttributeError, TypeError) as error:
        return f"unknown ({error})"
    return chosen.name
