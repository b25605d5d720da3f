"""What the gradient of one weight costs, in every layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.maskable import MASKABLE_TYPES

_PRODUCTS = (nn.Linear, nn.Conv2d)
"""Layers in which each weight is multiplied once for every position of the output; a norm's is its channel's alone."""


def weight_gradient_flops(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, float]:
    """FLOPs that the gradient of one weight costs, for every weight and bias of a layer that can be masked.

    Counted are sums over positions, the samples included, 2 a multiply-add as in ``torch.utils.flop_counter``::

        weights of a convolution        2 * batch * height_out * width_out
        weights of a linear layer       2 * rows
        weights of a norm               2 * values in / weights
        biases                          half of what the weight beside them costs: a sum without products
        rows of an embedding            look-ups / rows: what is added to each on average

    The counter leaves out the last three. The first two, times the number of weights, are the weight gradient that it
    counts, except of grouped convolutions, where it forgets that each weight sees one group only.

    ``run`` is called once, without gradients and with the model in eval mode; the model comes back as it was. Weights
    may be fake tensors (``FakeTensorMode``): what is asked of them is the shapes of outputs.

    Args:
        model: Any module, masked or not.
        run: Puts a batch through the model: ``lambda model: model(x, t, labels)``. Layers that it calls several times
            cost as often.

    Returns:
        Name -> FLOPs. Weights that ``run`` does not reach have no gradient, and no entry: a cost cannot be 0.

    Raises:
        ValueError: ``run`` reached no layer that can be masked.
    """
    costs: dict[str, float] = {}
    with _eval_mode(model), _listening(model, costs), torch.no_grad():
        run(model)
    if not costs:
        raise ValueError(
            f"weight_gradient_flops: run put nothing through the {type(model).__name__}'s layers that can be masked; "
            f"expected it to call the model that it is given, as lambda model: model(x)"
        )
    return costs


@contextmanager
def _listening(model: nn.Module, costs: dict[str, float]) -> Iterator[None]:
    """While it lasts, every call of a layer adds to the costs of its weights."""
    hooks = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, MASKABLE_TYPES) and (flops := _flops_a_position(module)):
                own = {f"{name}.{weight}" if name else weight: count for weight, count in flops.items()}
                hooks.append(module.register_forward_hook(partial(_add, costs, own)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(costs: dict[str, float], flops: Mapping[str, int], module: nn.Module, args: Any, output: Tensor) -> None:
    positions = output.numel() / _outputs_a_position(module)
    for name, count in flops.items() if positions else ():
        costs[name] = costs.get(name, 0.0) + count * positions


def _flops_a_position(module: nn.Module) -> dict[str, int]:
    """Own names of the weights that a layer has -> operations at each position."""
    flops = {"weight": 1 if isinstance(module, nn.Embedding) else 2, "bias": 1}
    return {own: count for own, count in flops.items() if module._parameters.get(own) is not None}


def _outputs_a_position(module: Any) -> int:
    """Values of a layer's output among which each weight has one of its own."""
    return int(module.weight.shape[0] if isinstance(module, _PRODUCTS) else module.weight.numel())


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
