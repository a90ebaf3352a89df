"""Child interpreters, for tests of what a fresh process does."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run(*arguments, cwd=TESTS, **environment):
    """Run this interpreter, away from the source folder, which would shadow the installed package."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip


def last_line(done):
    """Return the line that a user reads, of a command that failed."""
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]
