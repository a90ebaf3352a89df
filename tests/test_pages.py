"""In: the limit for freed outputs that are kept. Out: large outputs live in memory that is used again, or that is
given back at once where the limit is zero."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu

CODE = """
import torch, fastbn
x = torch.randn(8, 16, 128, 128)
y = fastbn.functional.batch_norm(x, None, None, training=True)
address = y.data_ptr()
assert y.nbytes >= 4 << 20
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
@pytest.mark.parametrize(("megabytes", "kept"), [("0", "False"), ("7", "False"), ("64", "True")])
def test_freed_outputs_are_kept_up_to_the_limit(megabytes, kept):
    environment = {**os.environ, "FASTBN_CPU_CACHE_MB": megabytes}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kept
