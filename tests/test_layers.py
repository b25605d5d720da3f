"""Masked layers: the forward of the layer they stand for, and its gradients at the active blocks."""

import copy

import pytest
import torch
from torch import nn

from pecker_fast import BlockMask, apply_mask
from pecker_fast.layers import MASKED_CLASSES
from pecker_fast.maskable import MASKABLE_TYPES

IMAGE, ROWS = (2, 8, 7, 9), (2, 3, 8)
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), ROWS),
    "linear, one sample": (lambda: nn.Linear(8, 6), (8,)),
    "conv": (lambda: nn.Conv2d(8, 6, 3), IMAGE),
    "conv, one sample": (lambda: nn.Conv2d(8, 6, 3, padding=1), (8, 7, 9)),
    "conv, strided": (lambda: nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), IMAGE),
    "conv, grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False), IMAGE),
    "conv, depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), IMAGE),
    "conv, same": (lambda: nn.Conv2d(8, 6, (4, 3), padding="same"), IMAGE),
    "conv, valid": (lambda: nn.Conv2d(8, 6, 3, padding="valid"), IMAGE),
    "conv, circular": (lambda: nn.Conv2d(8, 6, 3, padding=(2, 1), padding_mode="circular"), IMAGE),
    "conv, reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "group norm": (lambda: nn.GroupNorm(4, 8), IMAGE),
    "layer norm": (lambda: nn.LayerNorm(8), ROWS),
    "rms norm": (lambda: nn.RMSNorm(8), ROWS),
    "batch norm": (lambda: nn.BatchNorm2d(8), IMAGE),
    "batch norm, cumulative": (lambda: nn.BatchNorm2d(8, momentum=None), IMAGE),
    "batch norm, no statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), ROWS),
}


def masked_pair(make, density):
    plain = nn.Sequential(make())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    masked = copy.deepcopy(plain)
    return plain, masked, apply_mask(masked, BlockMask.random(masked, density, "row", seed=2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("wants_input", [True, False])
def test_forward_and_gradients(name, density, wants_input):
    make, shape = LAYERS[name]
    plain, masked, active = masked_pair(make, density)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(wants_input) for _ in range(2)]
    for _ in range(2):  # twice, for running statistics
        outputs = [model(y) for model, y in zip((plain, masked), inputs, strict=True)]
        assert torch.equal(*outputs)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    active.bind_()
    if wants_input:
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name in active.names:
            expected = parameter.grad * active.mask.to_dense(parameter_name)
            torch.testing.assert_close(active.to_dense(active.grads, parameter_name), expected, rtol=1e-4, atol=1e-5)
    for (key, a), b in zip(plain.named_buffers(), masked.buffers(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 1}])
def test_embedding(settings):
    plain, masked, active = masked_pair(lambda: nn.Embedding(5, 4, **settings), 0.6)
    ids = torch.tensor([[0, 1, 1], [4, 2, 3]])
    weight = torch.randn(2, 3, 4)
    for model in (plain, masked):
        (model(ids) * weight).sum().backward()
    active.bind_()
    expected = plain[0].weight.grad * active.mask.to_dense("0.weight")
    torch.testing.assert_close(active.to_dense(active.grads, "0.weight"), expected)


@pytest.mark.parametrize("make, shape", [LAYERS["linear"], LAYERS["conv, same"]])
def test_autocast(make, shape):
    plain, masked, active = masked_pair(make, 0.4)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model(x) for model in (plain, masked)]
        assert outputs[1].dtype == torch.bfloat16 and torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
    active.bind_()
    for name in active.names:
        expected = plain.get_parameter(name).grad * active.mask.to_dense(name)
        torch.testing.assert_close(active.to_dense(active.grads, name), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("make, shape", [LAYERS["linear"], LAYERS["conv"], LAYERS["conv, same"]])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_autocast_leaves_float64_alone(make, shape, narrow, density):
    plain, masked = nn.Sequential(make()).double(), nn.Sequential(make()).double()
    masked.load_state_dict(plain.state_dict())
    active = apply_mask(masked, BlockMask.random(masked, density, "row", seed=2))
    x = torch.randn(shape, dtype=torch.float64)
    with torch.autocast("cpu", dtype=narrow):
        outputs = [model(x) for model in (plain, masked)]
        assert outputs[1].dtype == torch.float64 and torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    active.bind_()
    for name in active.names:
        expected = plain.get_parameter(name).grad * active.mask.to_dense(name)
        torch.testing.assert_close(active.to_dense(active.grads, name), expected)


@pytest.mark.parametrize("make, shape", [LAYERS["linear"], LAYERS["conv"], LAYERS["conv, same"]])
@pytest.mark.parametrize("wide", ["input", "weight"])
def test_autocast_refuses_what_it_refuses_of_the_dense_layer(make, shape, wide):
    plain, masked, _ = masked_pair(make, 0.4)
    x = torch.randn(shape)
    if wide == "input":
        x = x.double()
    else:
        plain.double(), masked.double()
    for model in (plain, masked):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype|type"):
            model(x)


def test_every_maskable_type_has_a_masked_class_of_its_kind():
    assert set(MASKED_CLASSES) == set(MASKABLE_TYPES)
    assert all(issubclass(masked, plain) for plain, masked in MASKED_CLASSES.items())


def test_nothing_is_kept_without_gradients():
    _, masked, _ = masked_pair(LAYERS["conv"][0], 0.4)
    with torch.no_grad():
        assert masked(torch.randn(IMAGE)).grad_fn is None
