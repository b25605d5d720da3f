"""What every metric asks of its tensors before it counts anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast.errors import NonFiniteError


def matrix(name: str, values: Tensor, columns: str) -> Tensor:
    """``values`` detached, if it is a finite floating-point (N, D) with N and D at least 1.

    Raises:
        ValueError: The shape or the dtype is another.
        NonFiniteError: A value is NaN or infinite.
    """
    if not isinstance(values, Tensor) or values.ndim != 2 or 0 in values.shape or not values.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point (N, {columns}) tensor, neither of them 0, got {_form(values)}"
        )
    return _finite(name, values)


def vector(name: str, values: Tensor) -> Tensor:
    """``values`` detached, if it is a finite floating-point (N,) with N at least 1.

    Raises:
        ValueError: The shape or the dtype is another.
        NonFiniteError: A value is NaN or infinite.
    """
    if not isinstance(values, Tensor) or values.ndim != 1 or len(values) == 0 or not values.is_floating_point():
        raise ValueError(f"{name} must be a floating-point (N,) tensor with N at least 1, got {_form(values)}")
    return _finite(name, values)


def log_probabilities(predictions: Tensor, probabilities: bool) -> Tensor:
    """(N, classes) float64 logarithms of probabilities, from logits or from probabilities.

    Raises:
        ValueError: The shape is another, or probabilities are negative or do not add up to one.
        NonFiniteError: A value is NaN or infinite.
    """
    values = matrix("predictions", predictions, "classes").double()
    if not probabilities:
        return values.log_softmax(dim=1)
    sums = values.sum(dim=1)
    if bool((values < 0).any()) or bool(((sums - 1).abs() > 1e-3).any()):
        raise ValueError(
            f"probabilities must be at least 0 and add up to 1 in each row, got values from {float(values.min()):g} "
            f"and sums from {float(sums.min()):g} to {float(sums.max()):g}; pass logits with probabilities=False"
        )
    return (values / sums[:, None]).log()


def classes(name: str, labels: Sequence[int], num_classes: int) -> list[int]:
    """``labels`` as a list without duplicates.

    Raises:
        ValueError: There is none, or one is not in [0, num_classes).
    """
    found = list(dict.fromkeys(labels))
    if not found or any(not isinstance(label, int) or not 0 <= label < num_classes for label in found):
        raise ValueError(f"{name} must name at least one class, each in [0, {num_classes - 1}], got {labels!r}")
    return found


def _finite(name: str, values: Tensor) -> Tensor:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"{name}: {bad} of {values.numel()} values are NaN or infinite; check the images and the network"
        )
    return values.detach()


def _form(values: object) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    return f"{tuple(values.shape)} {values.dtype}"
