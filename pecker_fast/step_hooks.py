"""Any torch optimizer works: before its step gradients are checked, after it the dense weights follow.

One process-wide pair of hooks serves all stores. It holds them weakly, and costs nothing while there are none.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Store(Protocol):
    """What the hooks ask of ``ActiveParameters``."""

    def parameters(self) -> list[nn.Parameter]:
        """The active parameters."""
        ...

    def check_gradients(self) -> None:
        """Refuse a step without gradients."""
        ...

    def scatter_(self) -> None:
        """Copy the active weights into the dense ones."""
        ...


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def watch(store: Store) -> None:
    """Serve ``store`` whenever an optimizer that holds its parameters steps."""
    _stores.add(store)


def forget(store: Store) -> None:
    """Serve it no longer."""
    _stores.discard(store)


def watched() -> list[Store]:
    """The stores that are served now."""
    return list(_stores)


def _stores_of(optimizer: torch.optim.Optimizer) -> list[Store]:
    if not _stores or getattr(optimizer, "scatters_itself", False):
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [store for store in _stores if any(id(parameter) in held for parameter in store.parameters())]


def _before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for store in _stores_of(optimizer):
        store.check_gradients()


def _after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for store in _stores_of(optimizer):
        store.scatter_()


register_optimizer_step_pre_hook(_before_any_step)
register_optimizer_step_post_hook(_after_any_step)
