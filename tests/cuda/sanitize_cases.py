"""A few small batch norms that together run every CUDA kernel, for compute-sanitizer.

Prints the plan of each case, and exits with status 1 if a result is wrong.

Usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitize_cases.py
(without torch's cache of memory each tensor is an allocation of its own, with ends that are watched). Tensors are made
on the CPU and copied: initcheck then need not watch torch's kernels to know what was written.
"""

import sys

import torch
from torch.nn.functional import batch_norm as torch_batch_norm

import fastbn
from fastbn.functional import batch_norm

# shape, dtype, layout, elements that the tensor begins after a multiple of 16 bytes
CASES = [
    ((64, 10), torch.float32, "contiguous", 0),
    ((8, 16, 14, 14), torch.bfloat16, "contiguous", 0),  # rows of 392 bytes: channels taken together
    ((8, 16, 7, 7), torch.float16, "contiguous", 0),  # rows of 98 bytes
    ((5, 6, 9), torch.float32, "contiguous", 0),
    ((32, 2, 28, 28), torch.bfloat16, "contiguous", 0),  # few channels: groups of blocks that meet
    ((3, 1, 129, 65), torch.float32, "contiguous", 0),
    ((8, 24, 8, 8), torch.bfloat16, "channels_last", 0),
    ((4, 33, 5, 5), torch.float32, "channels_last", 0),  # 33 channels: no whole vectors
    ((64, 8, 32, 32), torch.float16, "channels_last", 0),
    ((4, 8, 16, 16), torch.bfloat16, "contiguous", 1),  # a misaligned begin
    ((4, 8, 6, 6), torch.float64, "contiguous", 0),
    ((1, 1, 2800, 2800), torch.float32, "contiguous", 0),  # does not fit on the chip: streaming
]


def make(shape, dtype, layout, offset):
    values = torch.randn(shape, dtype=torch.float32).to(dtype)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    if offset:
        flat = torch.empty(values.numel() + offset, dtype=dtype)
        flat[offset:] = values.flatten()
        return values, flat.cuda()[offset:].view(shape)
    return values, values.cuda()


def close(name, got, want, dtype):
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 3e-2)
    error = (got.double().cpu() - want).abs().max().item() / max(1.0, want.abs().max().item())
    if not error <= tolerance:
        print(f"    {name} is wrong by {error:.2e}")
    return error <= tolerance


def run(shape, dtype, layout, offset, training):
    host, x = make(shape, dtype, layout, offset)
    host_dy, dy = make(shape, dtype, layout, 0)
    channels = shape[1]
    numbers = [torch.rand(channels) + 0.5 for _ in range(4)]
    weight, bias, mean, var = (t.cuda() for t in numbers)
    reference = [t.double() for t in numbers]
    for t in (x, weight, bias):
        t.requires_grad_()
    for t in reference[:2]:
        t.requires_grad_()
    x64 = host.double().requires_grad_()
    y = batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    y64 = torch_batch_norm(x64, reference[2], reference[3], *reference[:2], training, 0.1, 1e-5)
    dx64, dweight64, dbias64 = torch.autograd.grad(y64, (x64, *reference[:2]), host_dy.double())
    wanted = {
        "y": (y.detach(), y64.detach()), "dx": (dx, dx64), "dweight": (dweight, dweight64), "dbias": (dbias, dbias64),
        "running_mean": (mean, reference[2]), "running_var": (var, reference[3]),
    }  # fmt: skip
    right = [close(name, *pair, dtype) for name, pair in wanted.items()]  # all of them, to print all that are wrong
    return all(right)


def main():
    torch.manual_seed(0)
    wrong = 0
    for case in CASES:
        for training in (True, False):
            print(*case, "training" if training else "eval", flush=True)
            wrong += not run(*case, training)
        try:
            print(fastbn.explain(make(*case)[1]), flush=True)
        except Exception as error:  # only for the log
            print(f"    not explained: {error}")
    torch.cuda.synchronize()
    print(f"{wrong} of {2 * len(CASES)} are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
