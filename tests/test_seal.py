"""Seals notice whatever is no longer where it was."""

import pytest
import torch
from torch import nn

from pecker_fast.seal import Seal


def modules():
    return [nn.Linear(3, 2, bias=False) for _ in range(4)]


def sealed(layers, with_grads=True):
    for layer in layers:
        layer.weight.grad = torch.ones(2, 3) if with_grads else None
    return Seal([(layer._parameters, "weight") for layer in layers], trained=2)


TENSOR_CHANGES = {
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data.clone()),
    "dtype": lambda layer: layer.half(),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data)),
    "load with assign": lambda layer: layer.load_state_dict({"weight": torch.ones(2, 3)}, assign=True),
}
GRAD_CHANGES = {
    "none": lambda weight: setattr(weight, "grad", None),
    "another": lambda weight: setattr(weight, "grad", weight.grad.clone()),
    "its data": lambda weight: setattr(weight.grad, "data", weight.grad.data.clone()),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
@pytest.mark.parametrize("number", range(4))
def test_a_tensor_that_moved_is_noticed(change, number):
    layers = modules()
    seal = sealed(layers)
    assert seal.tensors_hold() and seal.grads_hold() and seal.has_all_grads
    TENSOR_CHANGES[change](layers[number])
    assert not seal.tensors_hold()


@pytest.mark.parametrize("change", GRAD_CHANGES)
def test_a_gradient_that_moved_is_noticed(change):
    layers = modules()
    seal = sealed(layers)
    GRAD_CHANGES[change](layers[1].weight)
    assert not seal.grads_hold() and seal.tensors_hold()
    layers = modules()
    seal = sealed(layers)
    GRAD_CHANGES[change](layers[2].weight)  # of the others gradients do not count
    assert seal.grads_hold() and seal.others == [layers[2].weight, layers[3].weight]


def test_a_first_gradient_is_noticed():
    layers = modules()
    seal = sealed(layers, with_grads=False)
    assert seal.grads_hold() and not seal.has_all_grads
    layers[0].weight.grad = torch.ones(2, 3)
    assert not seal.grads_hold()


def test_changes_in_place_are_none():
    layers = modules()
    seal = sealed(layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
            layer.weight.grad.zero_()
    assert seal.tensors_hold() and seal.grads_hold()
