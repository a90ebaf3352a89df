"""Digests of the bits that batch norm computes, for a fixed list of cases whose inputs need no random generator.
Prints a line `name digest` for each case; with --update it writes same_bits.txt.

A change that is not meant to change a result leaves same_bits.txt as it is (test_same_bits.py compares). After one that
is meant to, write the new digests, and look which cases changed:

    ../.venv/bin/python same_bits.py --update                                      # baseline, avx2, avx512
    PYTHONPATH=../build/simt/lib ../.venv/bin/python same_bits.py --update         # the emulator, after make simt-build

What the digests depend on: the instruction set (a column each, because vectors of another width sum in another order
and may have fused operations); the compiler's version, which may fuse other operations; for cases named `libm`, the
functions of the C library (float64 activations, and all in the emulator). The header of the file names compiler and C
library; with another one nothing, or no case of libm, is compared. They depend on neither threads nor cache sizes.
"""

import hashlib
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import inputs
import numpy as np
import torch

import fastbn
from fastbn import _C
from fastbn.functional import batch_norm, ghost_batch_norm, masked_batch_norm

FILE = Path(__file__).parent / "same_bits.txt"
CAPABILITIES = ("baseline", "avx2", "avx512")
SIMULATED = _C.build_info()["backends"] == ["simt"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
UNKNOWN = "-"  # the digests were last written on a processor without this instruction set
NAMES = {F32: "f32", F64: "f64", BF16: "bf16", F16: "f16"}
OF_LIBM = ("elu", "silu", "gelu", "sigmoid", "tanh")


def values(shape, seed, dtype=F32):
    """Bell-shaped values in (-4, 4): sums of four uniform integers of a hash of the index, exact in float64."""
    count = torch.Size(shape).numel()
    index = np.arange(4 * count, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        index = (index ^ (index >> np.uint64(shift))) * np.uint64(factor)
    uniform = (index >> np.uint64(44)).astype(np.int64).reshape(4, count).sum(0) - 2 * 2**20
    return torch.from_numpy(uniform.astype(np.float64) / 2**19).view(*shape).to(dtype)


def laid_out(layout, shape, seed, dtype=F32, scale=1, shift=0):
    """The same values in the strides of a layout of inputs.py."""
    x = layout(shape, dtype=dtype)
    if layout not in (inputs.expanded, inputs.overlapping):
        x.copy_((values(shape, seed, F64) * scale + shift).to(dtype))
    return x


def digest(tensors):
    state = hashlib.blake2b(digest_size=3)
    for t in tensors:
        if t is None:
            state.update(b"None")
            continue
        t = t.detach()
        state.update(str((t.dtype, t.shape, t.stride())).encode())
        state.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def parameters(channels, dtype, seed=100):
    weight, bias, mean, var = (values((channels,), seed + k, F64) for k in range(4))
    return [t.to(dtype) for t in (weight, bias, mean, var.abs() + 0.25)]


def step(shape, dtype, layout=inputs.contiguous, *, training=True, params=None, threads=2, scale=1, shift=0,
         special=(), residual=False, activation="identity", wanted="xwbr", momentum=0.1, call=batch_norm,
         dy_layout=inputs.contiguous):  # fmt: skip
    """Output, gradients and running statistics of a forward and backward pass."""
    torch.set_num_threads(threads)
    x = laid_out(layout, shape, 1, dtype, scale, shift)
    for position, value in special:
        x[position] = value
    weight, bias, mean, var = parameters(shape[1], params or dtype)
    leaves = {"x": x, "w": weight, "b": bias}
    if residual:
        leaves["r"] = laid_out(layout, shape, 2, dtype)
    asked = [t.requires_grad_() for name, t in leaves.items() if name in wanted]
    epilogue = {} if activation == "identity" and not residual else {"activation": activation}
    if residual:
        epilogue["residual"] = leaves["r"]
    y = call(x, mean, var, weight, bias, training, momentum, 1e-5, **epilogue)
    grads = torch.autograd.grad(y, asked, laid_out(dy_layout, shape, 3, dtype)) if asked else ()
    return [y, *grads, mean, var]


def ghost(size, x, *rest):
    return ghost_batch_norm(x, size, *rest)


def masked(x, *rest):
    lengths = torch.arange(x.size(0)) * 5 % (x.size(2) + 1)
    return masked_batch_norm(x, lengths, *rest)


def module_steps(make, shape, dtype, **kind):
    """Two training steps, and the buffers after them."""
    torch.set_num_threads(2)
    module = make(shape[1], **kind).to(dtype)
    found = []
    for k in range(2):
        x = values(shape, 10 + k, dtype).requires_grad_()
        y = module(x)
        found += [y, *torch.autograd.grad(y, [x, *module.parameters()], values(shape, 20 + k, dtype))]
    return [*found, *module.buffers()]


def spread_over_ranks(shape, dtype, layout, activation):
    """The operators between the collectives of a batch on three ranks, which are parts of one tensor here."""
    torch.set_num_threads(2)
    op = torch.ops.fastbn
    parts = [laid_out(layout, shape, 30 + k, dtype, 1 + k, k) for k in range(3)]
    dys = [laid_out(layout, shape, 40 + k, dtype) for k in range(3)]
    weight, bias, mean, var = parameters(shape[1], dtype)
    all_stats = torch.stack([op.stats(x) for x in parts])
    batch_stats = op.gather_stats(all_stats, 0.1, mean, var, torch.zeros((), dtype=torch.int64))
    rest = (activation, None)
    found = [all_stats, batch_stats, mean, var]
    found += [op.forward(x, weight, bias, batch_stats, 1e-5, *rest)[0] for x in parts]
    sums = [op.backward_reduce(dy, x, weight, batch_stats, 1e-5, *rest, bias) for dy, x in zip(dys, parts, strict=True)]
    total = sums[0] + sums[1] + sums[2]
    for dy, x in zip(dys, parts, strict=True):
        found += op.backward_elemt(dy, x, weight, batch_stats, total, 1e-5, activation != "identity", *rest, bias)
    return [*found, *sums]


def raw(shape, dtype, layout, training, activation):
    """The operators forward, backward and update_running_stats."""
    torch.set_num_threads(2)
    op = torch.ops.fastbn
    x, dy, r = (laid_out(layout, shape, k, dtype) for k in (1, 2, 3))
    weight, bias, mean, var = parameters(shape[1], dtype)
    moments = None if training else torch.stack([mean, var]).double()
    y, used = op.forward(x, weight, bias, moments, 1e-5, activation, None, r)
    grads = op.backward(dy, x, weight, used, 1e-5, training, [True] * 4, activation, None, bias, r)
    count = torch.ones((), dtype=torch.int64)
    op.update_running_stats(used, x.numel() // shape[1], None, mean, var, count)
    return [y, used, *grads, mean, var]


def name_of(kind, shape, dtype, *more):
    return "/".join([kind, "x".join(map(str, shape)), NAMES[dtype], *(str(m) for m in more if m is not None)])


def of_libm(activation, dtype):
    return "libm" if activation in OF_LIBM and (dtype == F64 or SIMULATED) else None


SHAPES = (
    (6, 5, 3, 3), (4, 64, 7, 7), (3, 33, 14, 14), (2, 3, 65, 65), (64, 48), (300, 7), (2, 1, 30001), (3, 130, 3, 6, 2),
    (1, 2, 150, 151), (8, 64, 16, 16), (16, 12, 28, 28), (1024, 65), (2, 600, 5, 5),
)  # fmt: skip
ACTIVATIONS = ("identity", "relu", "leaky_relu", "relu6", "elu", "silu", "hardswish", "gelu", "sigmoid", "tanh")


def cpu_cases():
    for shape in SHAPES:
        for dtype in (F32, BF16, F64, F16):
            for layout in (inputs.contiguous, inputs.channels_last):
                if layout is inputs.contiguous or len(shape) > 2:
                    yield name_of("train", shape, dtype, layout.__name__), partial(step, shape, dtype, layout)
    for layout in inputs.LAYOUTS[2:]:
        if layout not in (inputs.expanded, inputs.overlapping):
            for dtype in (F32, BF16):
                run = partial(step, (5, 12, 9, 11), dtype, layout, dy_layout=layout, activation="relu", residual=True)
                yield name_of("layout", (5, 12, 9, 11), dtype, layout.__name__), run
    for activation in ACTIVATIONS:
        for dtype in (F32, BF16, F16, F64):
            for layout in (inputs.contiguous, inputs.channels_last):
                for residual in (False, True):
                    shape = (4, 24, 14, 14) if dtype in (F32, BF16) else (3, 40, 7, 7)
                    more = (activation, layout.__name__, "residual" * residual or None, of_libm(activation, dtype))
                    run = partial(step, shape, dtype, layout, activation=activation, residual=residual, scale=3)
                    yield name_of("act", shape, dtype, *more), run
    for shape, dtype, layout, activation in (
        ((7, 40, 32, 32), F32, inputs.contiguous, "relu"), ((7, 40, 32, 32), BF16, inputs.channels_last, "relu"),
        ((64, 48), F32, inputs.contiguous, "identity"), ((3, 5, 9, 9), F64, inputs.contiguous, "leaky_relu"),
        ((3, 300, 5, 5), F16, inputs.channels_last, "hardswish"), ((2, 33, 14, 14), BF16, inputs.contiguous, "gelu"),
        ((2, 33, 14, 14), F32, inputs.offset, "silu"), ((1, 1, 5000), F32, inputs.contiguous, "tanh"),
    ):  # fmt: skip
        for residual in (False, True):
            more = (activation, layout.__name__, "residual" * residual or None)
            run = partial(step, shape, dtype, layout, training=False, activation=activation, residual=residual)
            yield name_of("eval", shape, dtype, *more), run
    for threads in (1, 3, 4):
        for shape, layout in (((8, 64, 16, 16), inputs.channels_last), ((16, 12, 28, 28), inputs.contiguous)):
            for dtype in (F32, BF16):
                run = partial(step, shape, dtype, layout, threads=threads, activation="relu", residual=True)
                yield name_of("threads", shape, dtype, layout.__name__, threads), run
    for name, change in {
        "params-f32": {"params": F32, "activation": "relu"}, "mean1e4": {"shift": 1e4},
        "mean-1e3-std.01": {"shift": -1e3, "scale": 0.01},
        "std1e-4": {"scale": 1e-4}, "big": {"scale": 1e18}, "nan": {"special": [((0, 1), float("nan"))]},
        "inf": {"special": [((1, 2, 0), float("inf"))]}, "outlier": {"special": [((0, 0, 0, 0), 3e4)]},
        "only-input": {"wanted": "x"}, "only-weight": {"wanted": "w"}, "only-bias": {"wanted": "b"},
        "only-residual": {"wanted": "r", "residual": True, "activation": "relu"}, "nothing": {"wanted": ""},
    }.items():  # fmt: skip
        for shape, dtype, layout in (
            ((4, 10, 12, 12), F32, inputs.contiguous), ((4, 10, 12, 12), BF16, inputs.channels_last),
        ):  # fmt: skip
            yield name_of("special", shape, dtype, layout.__name__, name), partial(step, shape, dtype, layout, **change)
    for size in (1, 3, 4, 100):
        for shape, dtype in (((9, 20, 6, 6), F32), ((9, 20, 6, 6), BF16), ((16, 3, 20), F64), ((12, 3, 20), F16)):
            yield name_of("ghost", shape, dtype, size), partial(step, shape, dtype, call=partial(ghost, size))
        layout = inputs.channels_last
        run = partial(step, (9, 20, 6, 6), F32, layout, call=partial(ghost, size))
        yield name_of("ghost", (9, 20, 6, 6), F32, layout.__name__, size), run
    for dtype in (F32, BF16, F64):
        yield name_of("masked", (6, 7, 11), dtype), partial(step, (6, 7, 11), dtype, call=masked)
    for training in (True, False):
        for dtype, layout, activation in (
            (F32, inputs.contiguous, "relu"), (BF16, inputs.channels_last, "gelu"), (F64, inputs.cropped, "hardswish"),
            (F16, inputs.contiguous, "identity"),
        ):  # fmt: skip
            more = (layout.__name__, activation, "train" if training else "eval")
            run = partial(raw, (4, 17, 6, 7), dtype, layout, training, activation)
            yield name_of("raw", (4, 17, 6, 7), dtype, *more), run
    for activation in ("identity", "relu", "silu"):
        for dtype, layout in ((F32, inputs.contiguous), (BF16, inputs.channels_last)):
            run = partial(spread_over_ranks, (4, 17, 6, 7), dtype, layout, activation)
            yield name_of("ranks", (4, 17, 6, 7), dtype, layout.__name__, activation), run
    for name, make, kind in (
        ("bn", fastbn.BatchNorm2d, {}), ("cumulative", fastbn.BatchNorm2d, {"momentum": None}),
        ("no-affine", fastbn.BatchNorm2d, {"affine": False}), ("act", fastbn.BatchNormAct2d, {"activation": "relu"}),
        ("ghost", fastbn.GhostBatchNorm2d, {"virtual_batch_size": 2}),
    ):  # fmt: skip
        for dtype in (F32, BF16):
            yield name_of("module", (5, 9, 8, 8), dtype, name), partial(module_steps, make, (5, 9, 8, 8), dtype, **kind)


def simt_cases():
    for shape in ((3, 5, 7, 7), (2, 24, 5, 5), (40, 9), (2, 2, 2000)):
        for dtype in (F32, BF16, F64, F16):
            for layout in (inputs.contiguous, inputs.channels_last):
                if layout is inputs.contiguous or len(shape) > 2:
                    yield name_of("train", shape, dtype, layout.__name__), partial(step, shape, dtype, layout)
    for activation in ACTIVATIONS:
        for dtype, layout in ((F32, inputs.contiguous), (BF16, inputs.channels_last)):
            for residual in (False, True):
                more = (activation, layout.__name__, "residual" * residual or None, of_libm(activation, dtype))
                run = partial(step, (2, 16, 6, 6), dtype, layout, activation=activation, residual=residual, scale=3)
                yield name_of("act", (2, 16, 6, 6), dtype, *more), run
    for layout in (inputs.contiguous, inputs.offset, inputs.channels_last):
        run = partial(step, (2, 16, 6, 6), F32, layout, training=False, activation="relu", residual=True)
        yield name_of("eval", (2, 16, 6, 6), F32, layout.__name__), run
    for name, change in {
        "params-f32": {"params": F32, "activation": "relu"}, "big": {"scale": 1e18}, "mean1e4": {"shift": 1e4},
        "nan": {"special": [((0, 1), float("nan"))]}, "only-weight": {"wanted": "w"}, "only-input": {"wanted": "x"},
    }.items():  # fmt: skip
        for dtype, layout in ((F32, inputs.contiguous), (BF16, inputs.channels_last)):
            run = partial(step, (3, 8, 5, 5), dtype, layout, **change)
            yield name_of("special", (3, 8, 5, 5), dtype, layout.__name__, name), run
    for dtype, layout in ((F32, inputs.contiguous), (BF16, inputs.channels_last)):
        run = partial(spread_over_ranks, (2, 8, 5, 5), dtype, layout, "relu")
        yield name_of("ranks", (2, 8, 5, 5), dtype, layout.__name__), run
        yield (
            name_of("raw", (2, 8, 5, 5), dtype, layout.__name__),
            partial(raw, (2, 8, 5, 5), dtype, layout, True, "relu"),
        )
        run = partial(step, (5, 8, 3, 3), dtype, layout, call=partial(ghost, 2))
        yield name_of("ghost", (5, 8, 3, 3), dtype, layout.__name__), run
    # Few channels with many values: several blocks a channel, and the streaming strategy.
    for shape, dtype in (((2, 2, 30000), F32), ((3, 4, 90, 90), BF16), ((1, 1, 80001), F16)):
        for residual in (False, True):
            run = partial(step, shape, dtype, activation="relu", residual=residual)
            yield name_of("large", shape, dtype, "residual" * residual or None), run


def environment():
    return {"compiler": _C.build_info()["compiler"].replace(" ", "-"), "libc": "-".join(platform.libc_ver())}


def columns():
    """Of the file: what this build can compute here."""
    if SIMULATED:
        return ["simt"]
    return list(CAPABILITIES[: CAPABILITIES.index(_C.build_info()["cpu_capability_of_processor"]) + 1])


def compute(column):
    """{case: digest}, by a fresh process with that capability."""
    variables = {**os.environ, "FASTBN_CPU_CAPABILITY": "baseline" if column == "simt" else column}
    done = subprocess.run([sys.executable, __file__], env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return dict(line.split() for line in done.stdout.splitlines())


def stored():
    """What the file's header says, and {column: {case: digest}}."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    header = dict(word.split("=") for line in lines[:1] for word in line[1:].split())
    digests = {}
    for line in lines[1:]:
        if line.startswith("#"):
            names = line[1:].split()
        else:
            case, *found = line.split()
            for column, value in zip(names, found, strict=True):
                digests.setdefault(column, {})[case] = value
    return header, digests


def update():
    """Write the digests of columns(). If any has changed, those of wider instruction sets become UNKNOWN."""
    _, digests = stored()
    before = dict(digests)
    digests |= {column: compute(column) for column in columns()}
    if not SIMULATED and digests != before:
        cases = digests[CAPABILITIES[0]]
        digests |= {column: dict.fromkeys(cases, UNKNOWN) for column in CAPABILITIES if column not in columns()}
    lines = ["# " + " ".join(f"{key}={value}" for key, value in environment().items())]
    for names in (CAPABILITIES, ("simt",)):
        lines.append("# " + " ".join(names))
        lines += [" ".join([case, *(digests[name][case] for name in names)]) for case in digests.get(names[0], {})]
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        update()
    else:
        for case, run in simt_cases() if SIMULATED else cpu_cases():
            print(case, digest(run()))
