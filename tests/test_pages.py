"""In: the limit for freed outputs that are kept. Out: outputs live in memory that is used again, also by those of about
their size, or that is given back at once where the limit is zero."""

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
