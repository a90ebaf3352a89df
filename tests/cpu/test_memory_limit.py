"""The limit of memory that the page cache reads from /proc and cgroups, from such files in a temporary folder."""

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not CSRC.is_dir(), reason="not a checkout")]

MAIN = """
#include <cstdio>
#include "runtime/memory_limit.h"
int main(int, char** names) {
  while (*++names != nullptr) std::printf("%lld\\n", (long long)(fastbn::runtime::memory_limit(*names)));
}
"""
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NO_LIMIT = {f"{V1}/memory.limit_in_bytes": "9223372036854771712", f"{V2}/memory.max": "max"}
TREES = {
    "no files": ({}, MACHINE),
    "v1, no limit": ({"proc/self/cgroup": "4:memory:/a\n", **NO_LIMIT}, MACHINE),
    "v2, no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", **NO_LIMIT}, MACHINE),
    "v1": ({"proc/self/cgroup": "4:cpu,memory:/a/b\n0::/\n", f"{V1}/a/b/memory.limit_in_bytes": "1000\n"}, 1000),
    "v1, of a parent": ({"proc/self/cgroup": "4:memory:/a/b\n", f"{V1}/a/memory.limit_in_bytes": "1001\n"}, 1001),
    "v1, of another controller": ({"proc/self/cgroup": "4:cpu:/a\n", f"{V1}/a/memory.limit_in_bytes": "9\n"}, MACHINE),
    # a container that sees its path on the host, and its own group mounted as the root
    "v1, mounted": ({"proc/self/cgroup": "4:memory:/docker/x\n", f"{V1}/memory.limit_in_bytes": "1002\n"}, 1002),
    "v2": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "1003\n"}, 1003),
    "v2, of the root": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "1004\n"}, 1004),
    "v2, the least": (
        {
            "proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "1007\n", f"{V2}/a/memory.high": "1005\n",
            f"{V2}/memory.max": "1006\n",
        },
        1005,
    ),
    "something else": ({"proc/self/cgroup": "nonsense\n:\n0:\n\n", f"{V2}/memory.max": "much"}, MACHINE),
}  # fmt: skip


def test_the_least_limit_counts(tmp_path):
    (tmp_path / "main.cpp").write_text(MAIN)
    program = tmp_path / "limits"
    command = ["g++", "-std=c++17", "-I", CSRC, tmp_path / "main.cpp", CSRC / "runtime/memory_limit.cpp", "-o", program]
    subprocess.run(command, check=True)
    for name, (files, _) in TREES.items():
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
    done = subprocess.run([program, *TREES], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(TREES, map(int, done.stdout.split()), strict=True)) == {k: limit for k, (_, limit) in TREES.items()}
