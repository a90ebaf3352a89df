"""Tensors whose memory was freed (FSDP and offloading do this between uses) or is too small for their sizes.

Every function has to raise a RuntimeError that names the argument; torch's own pointwise operations crash. Each group
runs in a child process."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastbn
from fastbn import _C
from fastbn import functional as F

C = 3
SIZES = (4, C, 5, 2)


def free(t, bytes=0):
    t.untyped_storage().resize_(bytes)


def halve(t):
    free(t, t.untyped_storage().nbytes() // 2)


def images(layout="contiguous", dtype=torch.float32):
    x = torch.randn(4, C, 5, 4, dtype=dtype)
    if layout == "sliced":
        return x[..., ::2]
    x = x[..., :2].contiguous()
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def state(training=True):
    return {
        "weight": torch.randn(C), "bias": torch.randn(C), "running_mean": torch.zeros(C), "running_var": torch.ones(C),
        "training": training,
    }  # fmt: skip


def moments():
    return torch.tensor([[0.1, -0.2, 0.3], [1.0, 0.5, 2.0]], dtype=torch.float64)


def batch_stats():
    return torch.cat([moments(), torch.full((1, C), 40.0, dtype=torch.float64)])


def running():
    state = {"running_mean": torch.zeros(C), "running_var": torch.ones(C), "num_batches_tracked": torch.tensor(1)}
    return {"momentum": 0.1, **state}


def raw_functions():
    """Names, functions and arguments of the extension and of the operators; each with all that they can take."""
    epilogue = {"activation": "gelu", "residual": images()}
    pair = {"grad_output": images(), "input": images()}
    of_backward = {**pair, "weight": torch.randn(C), "eps": 1e-5, "bias": torch.randn(C), **epilogue}
    forward = {"input": images(), "weight": torch.randn(C), "bias": torch.randn(C), "eps": 1e-5}
    ghost = {"virtual_batch_size": 2, "eps": 1e-5}
    operators = {
        "forward": {**forward, "moments": None, **epilogue},
        "forward of moments": {**forward, "moments": moments(), **epilogue},
        "forward of a batch_stats": {**forward, "moments": batch_stats(), **epilogue},
        "backward": {**of_backward, "moments": moments(), "training": True, "output_mask": (True,) * 4},
        "update_running_stats": {"moments": moments(), "count": 8, **running()},
        "update_running_stats cumulatively": {"moments": moments(), "count": 8, **running(), "momentum": None},
        "stats": {"input": images()},
        "gather_stats": {"all_stats": torch.stack([batch_stats()] * 2), **running()},
        "backward_reduce": {**of_backward, "batch_stats": batch_stats()},
        "backward_elemt": {**of_backward, "batch_stats": batch_stats(), "total": moments(), "wants_residual": True},
        "ghost_forward": {"input": images(), "weight": torch.randn(C), "bias": torch.randn(C), **ghost},
        "ghost_backward": {
            **pair, "weight": torch.randn(C), "moments": torch.stack([moments()] * 2), **ghost,
            "output_mask": (True,) * 3,
        },
        "ghost_update": {
            "moments": torch.stack([moments()] * 2), "samples": 4, "positions": 4, "virtual_batch_size": 2, **running(),
        },
    }  # fmt: skip
    whole = {"input": images(), **state(), "momentum": 0.1, "num_batches_tracked": torch.tensor(1), "eps": 1e-5}
    yield "_C.batch_norm", _C.batch_norm, {**whole, **epilogue}
    del whole["training"]
    yield "_C.ghost_batch_norm", _C.ghost_batch_norm, {**whole, "virtual_batch_size": 2}
    for name, arguments in operators.items():
        yield f"torch.ops.fastbn.{name}", getattr(torch.ops.fastbn, name.split()[0]), arguments


def public_functions():
    epilogue = {"activation": "gelu", "residual": images()}
    for layout in ("contiguous", "channels_last", "sliced"):
        for training in (True, False):
            call = {"input": images(layout), **state(training)}
            yield f"batch_norm, {layout}, training={training}", F.batch_norm, call
            yield f"with an activation, {layout}, training={training}", F.batch_norm, {**call, **epilogue}
    yield "batch_norm of half", F.batch_norm, {"input": images(dtype=torch.half), **state()}
    yield "ghost_batch_norm", F.ghost_batch_norm, {"input": images(), "virtual_batch_size": 2, **state()}
    mask = torch.ones(4, 5, 2, dtype=torch.bool)
    yield "masked_batch_norm", F.masked_batch_norm, {"input": images(), "mask": mask, **state()}
    arguments = {"input": images(), "weight": torch.randn(C), "bias": torch.randn(C), "moments": moments(), "eps": 1e-5}
    arguments |= epilogue
    names = ("input", "weight", "bias", "moments", "eps", "activation", "activation_param", "residual")

    def function(**given):
        return fastbn.BatchNormFunction.apply(*(given.get(name) for name in names))

    def jvp(**given):  # torch itself looks at the input
        return torch.func.jvp(lambda t: function(input=t, **given), (images(),), (torch.ones(SIZES),))

    def mapped(input, **given):
        return torch.vmap(lambda t: F.batch_norm(t, **given))(input)

    def gradient(input, **given):
        return torch.func.grad(lambda t: F.batch_norm(t, **given).sum())(input)

    yield "BatchNormFunction", function, arguments
    yield "BatchNormFunction in forward mode", jvp, {k: v for k, v in arguments.items() if k != "input"}
    yield "batch_norm in torch.func.vmap", mapped, {"input": torch.randn(2, *SIZES), **state(False)}
    yield "batch_norm in torch.func.grad", gradient, {"input": images(), **state(False)}


def modules():
    """Names, modules and inputs; their parameters and buffers are arguments, too."""
    x, residual = {"input": images()}, {"residual": images()}
    for training in (True, False):
        yield "BatchNorm2d", fastbn.BatchNorm2d(C).train(training), x
        yield "BatchNormAct2d", fastbn.BatchNormAct2d(C, activation="silu").train(training), {**x, **residual}
        yield "SyncBatchNorm", fastbn.SyncBatchNorm(C).train(training), x
        yield "GhostBatchNorm2d", fastbn.GhostBatchNorm2d(C, virtual_batch_size=2).train(training), x
    yield "BatchNorm2d, cumulative", fastbn.BatchNorm2d(C, momentum=None), x
    yield "FrozenBatchNorm2d", fastbn.FrozenBatchNorm2d(C), x
    sequence = {"input": torch.randn(4, C, 5), "mask": torch.tensor([5, 3, 2, 4])}
    yield "MaskedBatchNorm1d", fastbn.MaskedBatchNorm1d(C), sequence


def is_refused(what, name, call):
    """A line of what went wrong, if anything did."""
    print("trying", what, name, file=sys.stderr, flush=True)
    try:
        call()
    except RuntimeError as error:
        if f"the memory of {name} was freed" not in str(error):
            print(f"{what}: {name}: raises {str(error)[:150]!r}")
    else:
        print(f"{what}: {name}: accepted")


def try_functions(functions):
    for what, function, arguments in functions:
        tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        function(**{name: t.clone() if name in tensors else t for name, t in arguments.items()})
        for name in tensors:
            for spoil in (free, halve):
                given = {k: t.clone() if k in tensors else t for k, t in arguments.items()}
                if tensors[name]._is_view():  # of a larger storage, in strides of its own
                    given[name] = tensors[name]._base.clone().as_strided(tensors[name].size(), tensors[name].stride())
                before = {k: t.clone() for k, t in given.items() if k in tensors and k != name}
                spoil(given[name])
                is_refused(what, name, lambda given=given, function=function: function(**given))
                for k, t in before.items():
                    if not torch.equal(t, given[k]):
                        print(f"{what}: {name} was refused, but {k} has changed")


def forward():
    try_functions(public_functions())


def raw():
    try_functions(raw_functions())


def in_modules():
    for what, module, inputs in modules():
        for name in [*inputs, *module._parameters, *module._buffers]:
            if not module.training and name == "num_batches_tracked":
                continue
            again = type(module)(C, **{"virtual_batch_size": 2} if "Ghost" in what else {})
            again.train(module.training)
            again.momentum = getattr(module, "momentum", None)
            given = {k: t.clone() for k, t in inputs.items()}
            free(given[name] if name in given else getattr(again, name).data)
            is_refused(what, name, lambda again=again, given=given: again(**given))


def backward():
    """What a pass needs again when gradients are asked for may have been freed since."""
    ones = torch.ones(SIZES)
    for activation in ("identity", "relu", "gelu"):
        for create_graph in (False, True):
            for name in ("grad_output", "input", "weight", "bias", "residual"):
                if activation != "gelu" and name in ("bias", "residual"):
                    continue  # a pass with relu keeps a mask instead of the residual
                leaves = {"input": images(), "weight": torch.randn(C), "bias": torch.randn(C), "residual": images()}
                leaves = {k: t.requires_grad_() for k, t in leaves.items()}
                y = F.batch_norm(
                    leaves["input"], None, None, leaves["weight"], leaves["bias"], True, activation=activation,
                    residual=leaves["residual"],
                )  # fmt: skip
                dy = ones.clone()
                free(dy if name == "grad_output" else leaves[name].data)
                if create_graph and name == "residual":
                    continue
                wanted = leaves["input"], leaves["weight"]
                is_refused(
                    f"backward of {activation}, create_graph={create_graph}", name,
                    lambda y=y, dy=dy, x=wanted, c=create_graph: torch.autograd.grad(y, x, dy, create_graph=c),
                )  # fmt: skip
    for make in (lambda: fastbn.GhostBatchNorm2d(C, virtual_batch_size=2), lambda: fastbn.SyncBatchNorm(C)):
        for name in ("grad_output", "input", "weight"):
            module, x, dy = make(), images().requires_grad_(), ones.clone()
            y = module(x)
            free({"grad_output": dy, "input": x.data, "weight": module.weight.data}[name])
            is_refused(type(module).__name__, name, lambda y=y, dy=dy: y.backward(dy))
    for name in ("grad_output", "input", "weight"):
        x, w, dy = images().requires_grad_(), torch.randn(C, requires_grad=True), ones.clone().requires_grad_()
        (dx,) = torch.autograd.grad(F.batch_norm(x, None, None, w, None, True), x, dy, create_graph=True)
        free({"grad_output": dy, "input": x, "weight": w}[name].data)
        is_refused("second derivative", name, lambda dx=dx, x=x: torch.autograd.grad(dx.square().sum(), x))


def whole_models():
    model = nn.Sequential(nn.Conv2d(C, 4, 3), fastbn.BatchNorm2d(4), nn.ReLU()).eval()
    for i, module in enumerate(model[:2]):
        for own in [*module._parameters, *module._buffers]:
            t = getattr(module, own).data
            before, kept = t.clone(), list(model)
            free(t)
            is_refused("fold", f"{i}.{own}", lambda: fastbn.fold(model))
            if i == 1 and own.startswith(("running", "num")):
                is_refused("update_bn", f"{i}.{own}", lambda: fastbn.update_bn([images()], model))
            free(t, before.nbytes)
            t.copy_(before)
            if list(model) != kept:
                print("fold changed the model")
    x = images()
    free(x)
    is_refused("update_bn", "input", lambda: fastbn.update_bn([x], fastbn.BatchNorm2d(C)))
    fused = fastbn.convert(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()), fuse=True)
    is_refused("convert(fuse=True)", "input", lambda: fused(x))
    fastbn.freeze(fused)
    is_refused("freeze", "input", lambda: fused(x))


GROUPS = [forward, raw, in_modules, backward, whole_models]


@pytest.mark.parametrize("group", GROUPS, ids=lambda f: f.__name__)
def test_memory_that_was_freed_is_a_runtime_error(group):
    code = f"import test_freed_memory; test_freed_memory.{group.__name__}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-1500:]}"
    assert not done.stdout, done.stdout
