"""Arguments: what torch accepts is accepted, and anything else raises torch's exception with its message."""

import pytest
import torch
from reference import assert_refused, assert_same_error, check, raised

import fastbn
from fastbn.functional import batch_norm

torch_batch_norm = torch.nn.functional.batch_norm
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def arguments(device="cpu", **change):
    call = {
        "input": torch.randn(4, 3, 5, 5, device=device),
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return {**call, **change}


def assert_torchs_error(call, pattern=None):
    assert_same_error(lambda: batch_norm(**call), lambda: torch_batch_norm(**call), pattern)


@training
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_types_that_are_not_real_numbers(device, dtype, training):
    x = torch.ones(4, 3, 5, 5, device=device).to(dtype)
    assert_torchs_error(arguments(device, input=x, training=training))
    assert_torchs_error(
        arguments(device, input=x, running_mean=None, running_var=None, weight=None, bias=None, training=True)
    )


@pytest.mark.simt_quick
@pytest.mark.parametrize("parameters", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@training
def test_every_pair_of_types(device, dtype, parameters, training):
    """Torch and we both take it, with the same result types, or both raise RuntimeError about mixed dtype."""
    call = arguments(device, training=training)
    call["input"] = call["input"].to(dtype)
    for name in ("running_mean", "running_var", "weight", "bias"):
        call[name] = call[name].to(parameters)
    allowed = dtype == parameters or (dtype in FLOATS[2:] and parameters == torch.float32)
    if not allowed:
        return assert_torchs_error(call, "mixed dtype")
    for name in ("input", "weight", "bias"):
        call[name] = call[name].requires_grad_()
    y = batch_norm(**call)
    assert y.dtype == dtype == torch_batch_norm(**call).dtype
    y.float().square().sum().backward()
    assert call["input"].grad.dtype == dtype
    assert call["weight"].grad.dtype == call["bias"].grad.dtype == parameters


NAMES = ("running_mean", "running_var", "weight", "bias")


@training
@pytest.mark.parametrize("odd", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tensor_of_another_type(device, odd, dtype, training):
    for other in (torch.float64, torch.float16, torch.int64):
        call = arguments(device, training=training)
        call["input"] = call["input"].to(dtype)
        call[odd] = call[odd].to(other)
        assert_torchs_error(call, "mixed dtype|expected scalar type")


@training
def test_mixed_types_are_seen_through_the_statistics_alone(device, training):
    """affine=False hides the parameters, not the mistake (pt#61924)."""
    call = arguments(device, weight=None, bias=None, training=training)
    for mean, var in (
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ):
        call["running_mean"], call["running_var"] = (
            torch.zeros(3, device=device).to(mean),
            torch.ones(3, device=device).to(var),
        )
        assert_torchs_error(call, "mixed dtype")


@pytest.mark.parametrize("value", [0, 1, -1, 2, 0.1, 1e-30, float("nan"), float("inf")])
def test_momentum_values(device, value):
    call, expected = arguments(device, momentum=value), arguments(device, momentum=value)
    expected["input"] = call["input"]
    batch_norm(**call)
    torch_batch_norm(**expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(call[name], expected[name], equal_nan=True)


def test_momentum_as_a_tensor(device):
    call, expected = arguments(device, momentum=torch.tensor(0.25)), arguments(device, momentum=0.25)
    expected["input"] = call["input"]
    batch_norm(**call)
    torch_batch_norm(**expected)
    torch.testing.assert_close(call["running_mean"], expected["running_mean"])
    bn = fastbn.BatchNorm2d(3, momentum=torch.tensor(0.25), device=device)
    bn(call["input"])
    torch.testing.assert_close(bn.running_mean, expected["running_mean"])


@training
@pytest.mark.parametrize("momentum", ["a", None, [0.1], 1j], ids=str)
def test_momentum_of_a_wrong_type(device, momentum, training):
    assert_torchs_error(arguments(device, momentum=momentum, training=training), "momentum|must be (float|Number)")


@pytest.mark.parametrize("value", ["a", [0.1]], ids=str)
def test_module_with_momentum_of_a_wrong_type(device, value):
    x = torch.randn(2, 3, 4, 4, device=device)
    ours = fastbn.BatchNorm2d(3, momentum=value, device=device)
    torchs = torch.nn.BatchNorm2d(3, momentum=value, device=device)
    assert_same_error(lambda: ours(x), lambda: torchs(x), "momentum")


@training
@pytest.mark.parametrize("eps", ["a", None, [1e-5]], ids=str)
def test_eps_of_a_wrong_type(device, eps, training):
    assert_torchs_error(arguments(device, eps=eps, training=training), ".")


@training
@pytest.mark.parametrize("eps", [-1.0, -1e-300], ids=str)
def test_negative_eps(device, eps, training):
    call = arguments(device, eps=eps, training=training)
    assert_refused(lambda: batch_norm(**call), lambda: torch_batch_norm(**call), "eps must be")


def test_negative_eps_message_in_the_module(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    for eps in (0.0, -1.0):
        assert_refused(
            lambda eps=eps: fastbn.BatchNorm2d(3, eps=eps, device=device)(x),
            lambda eps=eps: torch.nn.BatchNorm2d(3, eps=eps, device=device)(x),
            "eps must be",
        )


@pytest.mark.parametrize("value", ["a", 1, None, 0], ids=str)
def test_training_must_be_a_bool(device, value):
    assert_torchs_error(arguments(device, training=value), "training.*must be bool")


@training
@pytest.mark.parametrize("present", ["running_mean", "running_var"])
def test_only_one_running_statistic(device, present, training):
    call = arguments(device, running_mean=None, running_var=None, training=training)
    call[present] = torch.ones(3, device=device)
    if training:
        assert_refused(lambda: batch_norm(**call), lambda: torch_batch_norm(**call), "either both be None")
    else:
        assert_torchs_error(call, "running_(mean|var)")


def test_eval_without_statistics(device):
    assert_torchs_error(arguments(device, running_mean=None, running_var=None, training=False))


@training
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 2, 4, 300])
def test_wrong_sizes_are_named(device, name, size, training):
    assert_torchs_error(arguments(device, **{name: torch.ones(size, device=device)}, training=training))


@pytest.mark.sanitize
@training
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 3, 1, 1)], ids=str)
def test_weights_with_extra_dimensions_of_one(device, shape, training):
    x = torch.randn(4, 3, 5, 5, device=device)
    weight, bias = torch.randn(shape, device=device), torch.randn(shape, device=device)
    flat = check(x, weight=weight.flatten(), bias=bias.flatten(), training=training)[0]
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    stats = (torch.zeros(3, device=device), torch.ones(3, device=device))
    y = batch_norm(x, *stats, *leaves, training)
    expected = torch_batch_norm(x, *(s.clone() for s in stats), weight, bias, training)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert leaves[0].grad.shape == leaves[1].grad.shape == shape
    assert flat["output"].shape == y.shape


@training
@pytest.mark.parametrize("shape", [(), (3,), (1,)], ids=str)
def test_too_few_dimensions(device, shape, training):
    x = torch.randn(shape, device=device)
    assert_torchs_error(arguments(device, input=x, training=training), ".")


@training
@pytest.mark.parametrize("parameters", [None, 0, 1, 3], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 3, 2), (2, 3, 0), (0, 0), (1, 0)], ids=str)
def test_no_elements(device, shape, parameters, training):
    """torch looks at no size then, and reads the first element of the parameters."""
    weight = bias = None if parameters is None else torch.ones(parameters, device=device)
    call = {"input": torch.empty(shape, device=device), "running_mean": None, "running_var": None}
    call = {**call, "weight": weight, "bias": bias, "training": training}
    if raised(lambda: torch_batch_norm(**call)) is not None:
        return assert_torchs_error(call)
    y, expected = batch_norm(**call), torch_batch_norm(**call)
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize("name", ["input", *NAMES])
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 1.0, "weight", object()], ids=["list", "float", "str", "object"])
def test_not_a_tensor(device, name, value):
    call = arguments(device, **{name: value})
    if name == "input":
        # torch 2.13 asks input.size() first in training, which is an AttributeError for these
        call["training"] = False
    assert_torchs_error(call, "must be Tensor|has no attribute")


def test_no_input(device):
    assert_torchs_error(arguments(device, input=None, training=False), "must be Tensor|has no attribute")


@training
@pytest.mark.parametrize("name", ["input", *NAMES])
def test_tensors_of_different_devices(device, name, training):
    call = arguments(device, training=training)
    call[name] = call[name].to("meta")
    assert_torchs_error(call, f"(?s)(?=.*device meta)(?=.*{name})")


@training
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda x: x.to_mkldnn()], ids=["sparse", "mkldnn"])
def test_other_storage_layouts_never_crash(device, make, training):
    """torch computes some of these and refuses others; a number has to be right, a refusal an exception."""
    x = torch.randn(4, 3, 5, 5, device=device)
    call = arguments(device, input=x, training=training)
    expected = torch_batch_norm(**arguments(device, input=x, training=training))
    try:
        y = batch_norm(**{**call, "input": make(x)})
    except (RuntimeError, NotImplementedError, TypeError) as exception:
        assert str(exception)
    else:
        torch.testing.assert_close(y.to_dense(), expected)


@training
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_require_grad(device, name, training):
    call = arguments(device, training=training)
    call[name].requires_grad_()
    assert_torchs_error(call, "differentiable|requires_grad|requires grad")


X = torch.zeros(4, 3, 5, 5)


@pytest.mark.parametrize(
    "extra, error, message",
    [
        ({"activation": "softplus"}, ValueError, "activation should be one of identity, relu,.*not 'softplus'"),
        ({"activation": None}, TypeError, "argument 'activation' must be str, not NoneType"),
        ({"activation_param": 0.1}, ValueError, "activation_param should be None for identity.*not 0.1"),
        ({"activation": "relu", "activation_param": 0.1}, ValueError, "activation_param should be None for relu"),
        ({"activation": "elu", "activation_param": "1"}, TypeError, "'activation_param' must be float, not str"),
        ({"residual": 1.0}, TypeError, "argument 'residual' must be Tensor, not float"),
        ({"residual": X[:1]}, RuntimeError, "residual should have the sizes of input"),
        ({"residual": X.double()}, RuntimeError, "residual should have the dtype of input"),
        ({"residual": X.to("meta")}, RuntimeError, "residual is on device meta, but input is on device"),
    ],
    ids=str,
)
def test_bad_epilogues_are_named(device, extra, error, message):
    if isinstance(extra.get("residual"), torch.Tensor) and extra["residual"].device.type == "cpu":
        extra = {"residual": extra["residual"].to(device)}
    with pytest.raises(error, match=message):
        batch_norm(**arguments(device), **extra)


def test_the_default_fusion_arguments_are_accepted(device):
    call = arguments(device)
    y = batch_norm(**call, activation="identity", activation_param=None, residual=None)
    torch.testing.assert_close(y, torch_batch_norm(**call))


@pytest.mark.parametrize("module", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize("rank", range(1, 7))
def test_module_ranks(device, module, rank):
    ours, torchs = getattr(fastbn, module)(3, device=device), getattr(torch.nn, module)(3, device=device)
    x = torch.randn((4, 3, 2, 2, 2, 2)[:rank], device=device)
    try:
        expected = torchs(x)
    except ValueError:
        assert_same_error(lambda: ours(x), lambda: torchs(x))
        assert ours.num_batches_tracked == torchs.num_batches_tracked
    else:
        torch.testing.assert_close(ours(x), expected)


@training
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_module_with_another_number_of_channels(device, kwargs, training):
    ours = fastbn.BatchNorm2d(5, device=device, **kwargs).train(training)
    torchs = torch.nn.BatchNorm2d(5, device=device, **kwargs).train(training)
    x = torch.randn(4, 3, 5, 5, device=device)
    assert_same_error(lambda: ours(x), lambda: torchs(x))


@pytest.mark.parametrize("args", [(), (-1,), ("a",), (2.5,), (None,)], ids=str)
def test_constructor_errors(args):
    assert_same_error(lambda: fastbn.BatchNorm2d(*args), lambda: torch.nn.BatchNorm2d(*args), ".")
