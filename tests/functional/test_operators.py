"""Where the parts of each operator are: the table at the head of csrc/torch/operators.cpp against the sources."""

import re
from pathlib import Path

import pytest
import torch
import torch.fx.experimental.symbolic_shapes
from torch._subclasses import FakeTensorMode

from fastbn import _C, ops

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "csrc/torch/operators.cpp").read_text()
NAMES = sorted(
    name.removeprefix("fastbn::").split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastbn::")
)
COMPOSITE = "batch_norm"


def table():
    """By operator: the kinds of the parts that are in Python, their files and names, and what else its row says."""
    rows, names = {}, []
    for line in SOURCE.split("#include")[0].splitlines():
        row = re.fullmatch(r"//   ([a-z_, ]+?)  +(\w+): (fastbn/\S+\.py) (\w+)(.*)", line)
        if row is None:
            names = [n for n in line.removeprefix("//").strip().split(", ") if n in NAMES]
            continue
        for name in [n for n in row[1].strip().split(", ") if n] or names:
            rows[name] = row.groups()[1:]
    return rows


def test_every_operator_has_a_row():
    assert sorted(table()) == NAMES and len(NAMES) >= 11


@pytest.mark.parametrize("name", NAMES)
def test_schema_implementation_and_fake_are_found_by_the_name(name):
    assert len(re.findall(rf'm\.def\(\s*"{name}\(', SOURCE)) == 1, "the schema"
    if name == COMPOSITE:
        return
    (function,) = re.findall(rf'm\.impl\("{name}", &(\w+)\)', SOURCE)
    assert function in (name, f"{name}_op")
    assert f'fakes.def("{name}", &{name}_fake)' in SOURCE and hasattr(_C.fakes, name)
    assert torch._library.simple_registry.singleton.find(f"fastbn::{name}").fake_impl.kernel is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_part_in_python_is_where_the_table_says(name):
    kind, path, function, rest = table()[name]
    text = (ROOT / path).read_text()
    assert re.search(rf"^(def|class) {function}\b", text, re.MULTILINE), f"{function} is not in {path}"
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbn::{name}", "Autograd")
    if kind == "autograd" and not rest:
        assert registered and f'register_autograd("fastbn::{name}"' in re.sub(r"\(\s+", "(", text)
    else:
        assert not registered, "an operator with a derivative of its own, which the table does not name"
    if kind == "vmap":
        assert re.search(
            rf'register_update_of_each\("{name}"', "".join(p.read_text() for p in ROOT.glob("fastbn/**/*.py"))
        )


def test_the_fakes_raise_as_the_operators_do():
    """So that a compiled call fails where it is captured, also if sizes are symbols."""
    x, p, moments = torch.randn(4, 3, 5), torch.ones(3), torch.ones(2, 3).double()
    calls = {
        "weight should contain .* elements not": lambda t: ops.forward(t(x), t(torch.ones(4)), None, None, 1e-5),
        "mixed dtype": lambda t: ops.forward(t(x), t(p.double()), None, None, 1e-5),
        "moments should have sizes": lambda t: ops.forward(t(x), None, None, t(moments[:, :2]), 1e-5),
        "residual should have the sizes": lambda t: ops.forward(t(x), None, None, None, 1e-5, "relu", None, t(x[1:])),
        "grad_output should have the sizes": lambda t: ops.backward(
            t(x[1:]), t(x), None, t(moments), 1e-5, True, [True] * 4
        ),
        "running_var should contain .* elements not": lambda t: ops.update_running_stats(
            t(moments), 20, 0.1, t(p), t(torch.ones(2)), None
        ),
        "not implemented for": lambda t: ops.stats(t(x.long())),
        "virtual_batch_size should be positive": lambda t: ops.ghost_forward(t(x), None, None, 0, 1e-5),
    }
    mode = FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    for message, call in calls.items():
        for convert in (lambda t: t, mode.from_tensor):
            with pytest.raises((RuntimeError, ValueError), match=message):
                call(convert)


def test_the_extension_has_no_function_that_only_tests_call():
    text = "".join(path.read_text() for path in ROOT.glob("fastbn/**/*.py"))
    names = [name for name in dir(_C) if not name.startswith("_") and name != "simt"]  # simt: of the build for tests
    assert len(names) > 10 and not [name for name in names if not re.search(rf"\b_C\.{name}\b", text)]
