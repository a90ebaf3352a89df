"""fastbn.BatchNormAct1d/2d/3d: torch's modules with the residual and the activation behind them."""

import copy
import pickle

import pytest
import torch
from epilogue import PARAMS, each_activation
from torch import nn

import fastbn
from fastbn import activations
from fastbn.activations import ACTIVATIONS

MODULES = {
    1: (fastbn.BatchNormAct1d, nn.BatchNorm1d),
    2: (fastbn.BatchNormAct2d, nn.BatchNorm2d),
    3: (fastbn.BatchNormAct3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("rank", MODULES)
@each_activation
def test_modules(device, rank, activation):
    ours_class, torchs_class = MODULES[rank]
    param = PARAMS.get(activation)
    ours = ours_class(6, activation=activation, activation_param=param).to(device)
    torchs = torchs_class(6).to(device)
    with torch.no_grad():
        torchs.weight.uniform_(-1, 1), torchs.bias.uniform_(-1, 1)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict())
    for mode in (True, True, False):
        ours.train(mode), torchs.train(mode)
        x, r = torch.randn(2, 4, 6, *[3] * rank, device=device).unbind()
        for residual in (None, r):
            z = torchs(x) if residual is None else torchs(x) + r
            right = ACTIVATIONS[activation].forward(z, activations.check(activation, param))
            torch.testing.assert_close(ours(x, residual), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=f"expected .*{rank + 2}D input \\(got 7D input\\)"):
        ours(torch.randn(1, 6, 1, 1, 1, 1, 1))


def test_a_module_says_what_it_does_and_survives_a_copy():
    module = fastbn.BatchNormAct2d(3, eps=0.1, activation="leaky_relu", activation_param=0.2)
    assert repr(module).endswith("activation='leaky_relu', activation_param=0.2)")
    assert not isinstance(module, nn.modules.batchnorm._BatchNorm), "tools would replace it and lose the activation"
    x = torch.randn(2, 3, 4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert fastbn.BatchNormAct1d(3).activation == "relu"
    for kwargs in ({"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}):
        other = fastbn.BatchNormAct2d(3, **kwargs)
        right = nn.functional.relu(nn.functional.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(other(x), right)


@pytest.mark.parametrize(
    "kwargs, error",
    [({"activation": "softplus"}, ValueError), ({"activation": 1}, TypeError), ({"activation_param": 1.0}, ValueError)],
    ids=str,
)
def test_a_module_refuses_what_is_not_there(kwargs, error):
    with pytest.raises(error, match="activation"):
        fastbn.BatchNormAct2d(3, **kwargs)
