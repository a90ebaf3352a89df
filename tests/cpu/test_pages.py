"""The page cache: memory of freed outputs is used again for outputs of about the same size, within the limit."""

import os
import subprocess
import sys

import pytest
import torch

import fastbn

pytestmark = pytest.mark.cpu

CODE = """
import torch, fastbn
x = torch.randn(8, 16, {side}, {side})
y = fastbn.functional.batch_norm(x, None, None, training=True)
address = y.data_ptr()
def mapped():
    with open("/proc/self/maps") as lines:
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(low <= address < high for low, high in spans)
assert mapped()
expected = y.clone()
del y
print(mapped())
again = fastbn.functional.batch_norm(x, None, None, training=True)
assert torch.equal(again, expected)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not list its mappings")
@pytest.mark.parametrize(
    ("side", "megabytes", "kept"),
    [(128, "0", "False"), (128, "7", "False"), (128, "64", "True"), (24, "0", "False"), (24, "64", "True")],
)
def test_freed_outputs_are_kept_up_to_the_limit(side, megabytes, kept):
    environment = {**os.environ, "FASTBN_CPU_CACHE_MB": megabytes}
    code = CODE.replace("{side}", str(side))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kept


# 64 channels of 4096 are 1 MiB, the largest tensor for blocks of that size; what is larger gets 9/8 of it, up to 4608.
@pytest.mark.parametrize(("first", "then", "same"), [(4500, 4600, True), (4096, 4100, False), (4500, 4096, False)])
def test_pages_are_used_again_by_tensors_of_about_their_size(first, then, same):
    x = torch.randn(1, 64, 4600)
    address = fastbn.functional.batch_norm(x[..., :first], None, None, training=True).data_ptr()
    y = fastbn.functional.batch_norm(x[..., :then], None, None, training=True)
    assert (y.data_ptr() == address) == same
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x[..., :then], None, None, training=True))


def test_workspaces_hold_what_others_left_in_kept_pages():
    """2048 channels: workspaces of more than 64 KiB, where such pages begin; whatever is in them, results are right."""
    bn = fastbn.BatchNorm1d(2048)
    for batch in (16, 8, 300, 16):
        x = torch.randn(batch, 2048).requires_grad_()
        dy = torch.randn(batch, 2048)
        ours = torch.autograd.grad(bn(x), [x, bn.weight, bn.bias], dy)
        y = torch.nn.functional.batch_norm(x.double(), None, None, bn.weight.double(), bn.bias.double(), training=True)
        theirs = torch.autograd.grad(y, [x, bn.weight, bn.bias], dy.double())
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def printed(code, *arguments, timeout=60, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What a program sees that looks for torch's message, in a process that may take 60 megabytes more.
SHORT_OF_MEMORY = """
import resource, torch
from fastbn import functional as F, ops

torch.set_num_threads(1)
small = torch.randn(4, 8, 8, 8, requires_grad=True)
F.batch_norm(small, None, None, training=True).sum().backward()
x = torch.randn(1, 8, 4096, 1024, requires_grad=True)  # 128 MB
y = F.batch_norm(x, None, None, training=True)
rows, moments = torch.randn(2, 4 << 20), torch.ones(2, 4 << 20, dtype=torch.float64)
passes = {
    "forward": lambda: F.batch_norm(x, None, None, training=True),
    "backward": lambda: torch.autograd.grad(y, x, x.detach()),
    "ghost": lambda: F.ghost_batch_norm(x.detach().view(4, 8, -1), 2, None, None, training=True),
    # numbers of each of very many channels, where there is room for the output
    "workspace": lambda: ops.forward(rows, None, None, moments, 1e-5),
}
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), -1))
for name, call in passes.items():
    try:
        call()
        print(name, "has no error")
    except Exception as error:
        text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        if type(error) is not RuntimeError or len(error.args) != 1 or text not in error.args[0]:
            print(name, type(error).__name__, error)
"""


def test_out_of_memory_is_what_torch_raises():
    """RuntimeError with the text that batch-size finders look for."""
    assert printed(SHORT_OF_MEMORY) == ""


GIVEN_BACK = """
import resource, sys, torch
from fastbn import functional as F
torch.set_num_threads(1)
x = torch.randn(1, 8, 2048, 1024)  # 64 MB
kept = [F.batch_norm(x, None, None, training=True) for _ in range(3)]
del kept
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
# An output of 56 MB, of whose size no pages are kept; or one of 64 MB, and a copy of the input, which torch allocates.
other = {"output": x[:, :7], "copy": x.transpose(2, 3)}[sys.argv[1]]
assert F.batch_norm(other, None, None, training=True).shape == other.shape
"""


@pytest.mark.parametrize("what", ["output", "copy"])
def test_kept_pages_go_back_where_memory_is_short(what):
    assert printed(GIVEN_BACK, what, FASTBN_CPU_CACHE_MB=1024) == ""


# Resident megabytes: more than before, when images of many sizes have come and gone; and seconds after that.
MANY_SIZES = """
import gc, sys, time, torch, fastbn

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096 / 2**20

bn = fastbn.BatchNorm2d(16).eval()
with torch.no_grad():
    bn(torch.randn(2, 16, 64, 64))
    before = resident()
    for side in range(256, 1025, 64):
        x = torch.ones(1, 16, side, side)
        outputs = [bn(x), bn(x)]
        del x, outputs
print(resident() - before)
time.sleep(float(sys.argv[1]))
print(resident() - before)
"""


@pytest.mark.parametrize("variables", [{}, {"FASTBN_CPU_CACHE_MB": 1 << 20}], ids=["standard", "variable"])
def test_images_of_many_sizes_leave_a_bounded_part_behind(variables):
    """741 MB of outputs in all; a limit that is given is not a reason to keep a block of every size."""
    kept, _ = map(float, printed(MANY_SIZES, "0", **variables).split())
    assert kept < 270, kept


@pytest.mark.slow  # it waits
def test_pages_go_back_after_some_seconds_without_a_call():
    kept, later = map(float, printed(MANY_SIZES, "7.5").split())
    assert kept > 100, "nothing was kept that could go back"
    assert later < 30, later


def test_a_limit_that_is_no_number_is_an_error_of_the_import():
    environment = {**os.environ, "FASTBN_CPU_CACHE_MB": "much"}
    code = [sys.executable, "-c", "import fastbn"]
    done = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FASTBN_CPU_CACHE_MB should be a number of megabytes, not 'much'" in done.stderr
