"""The import check passes on the package, and fails on every rule broken on purpose."""

import pytest
from checks import assert_no_sources, assert_one_problem, run, write

pytestmark = pytest.mark.cpu

SCRIPT = "check_imports.py"

PACKAGE = {
    "__init__.py": "from . import functional\nfrom .nn.modules import BatchNorm1d\n",
    "__main__.py": "import fastbn\nfrom fastbn import _C\n",
    "_C.pyi": "",
    "ops.py": "import torch\nfrom . import _C\n",
    "arguments.py": "from . import ops\n",
    "autograd.py": "from . import arguments, ops\n",
    "functional/__init__.py": "from ..autograd import batch_norm\nfrom .ghost import ghost_batch_norm\n",
    "functional/ghost.py": "from .. import ops\n",
    "nn/__init__.py": "",
    "nn/modules.py": "from ..functional.ghost import ghost_batch_norm\nfrom fastbn.autograd import batch_norm\n",
    "nn/ghost.py": "from . import modules\nfrom .modules import BatchNorm1d\n",
    "graph/__init__.py": "",
    "graph/convert.py": "from ..nn.modules import BatchNorm1d\n",
}

BROKEN = {
    "functional imports nn": ("functional/masked.py", "from ..nn.modules import BatchNorm1d"),
    "functional imports a folder": ("functional/masked.py", "from .. import nn"),
    "autograd imports functional": ("autograd.py", "from . import functional"),
    "nn imports graph": ("nn/frozen.py", "from ..graph.convert import unfuse"),
    "nn imports graph by its full name": ("nn/frozen.py", "import fastbn.graph.convert"),
    "within a function": ("nn/frozen.py", "def f():\n    from ..graph import convert"),
    "within one layer": ("arguments.py", "from .explain import Plan"),
    "the package itself": ("nn/frozen.py", "import fastbn"),
    "a name of the package": ("nn/frozen.py", "from fastbn import BatchNorm1d"),
    "a name of the package, relatively": ("nn/frozen.py", "from .. import BatchNorm1d"),
    "a new unit": ("attic.py", "import torch"),
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        write(tmp_path / name, text)
    return tmp_path


def test_package_holds():
    status, output = run(SCRIPT)
    assert status == 0, output


def test_good_package_passes(package):
    status, output = run(SCRIPT, package)
    assert status == 0, output


@pytest.mark.parametrize(("name", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_is_found(package, name, line):
    write(package / "explain.py", "import math\n")
    write(package / name, f"import math\n{line}\n")
    assert_one_problem(SCRIPT, package, name)


def test_empty_folder_is_an_error(tmp_path):
    assert_no_sources(SCRIPT, tmp_path)
