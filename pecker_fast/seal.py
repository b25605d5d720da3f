"""Seal: whether tensors are still where they were, for hundreds of them in microseconds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

Slot = tuple[dict[str, Any], str]
"""A module's dictionary of parameters and a name in it."""

_address = torch.Tensor.data_ptr
_grad = operator.attrgetter("grad")


class Seal:
    """Which parameters modules hold, and where in memory they and their gradients lie.

    Everything is compared by ``map`` over methods of C, because a training step on a GPU must not wait for Python.

    Attributes:
        has_all_grads: Whether every parameter had a gradient.
        others: Parameters whose gradients do not count.

    Args:
        slots: Where modules hold the parameters.
        trained: Those whose gradients count too, the first of ``slots``.
    """

    def __init__(self, slots: Sequence[Slot], trained: int) -> None:
        self._dicts = [held for held, _ in slots]
        self._names = [name for _, name in slots]
        self._tensors: list[Tensor] = self._held()
        self._trained, self.others = self._tensors[:trained], self._tensors[trained:]
        self._addresses = self._where()
        self._grads: list[Tensor | None] = list(map(_grad, self._trained))
        self._grad_addresses = [None if grad is None else grad.data_ptr() for grad in self._grads]
        self.has_all_grads = None not in self._grad_addresses

    def tensors_hold(self) -> bool:
        """Whether the modules hold the same parameters, where they were."""
        return not any(map(operator.is_not, self._held(), self._tensors)) and self._where() == self._addresses

    def grads_hold(self) -> bool:
        """Whether every parameter has the gradient it had, where it was, or still none."""
        if any(map(operator.is_not, map(_grad, self._trained), self._grads)):
            return False
        if self.has_all_grads:
            return list(map(_address, cast(list[Tensor], self._grads))) == self._grad_addresses
        return [None if grad is None else grad.data_ptr() for grad in self._grads] == self._grad_addresses

    def _held(self) -> list[Tensor]:
        return list(map(cast(Any, dict.get), self._dicts, self._names))  # None where a module has lost one

    def _where(self) -> list[int]:
        return list(map(_address, self._tensors))
