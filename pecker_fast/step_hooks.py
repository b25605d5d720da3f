"""Any torch optimizer works: before its step gradients are checked, after it the dense weights follow.

One process-wide pair of hooks serves all stores. It holds them weakly, and costs nothing while there are none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary


class Store(Protocol):
    """What the hooks ask of ``ActiveParameters``."""

    model: nn.Module
    followers: weakref.WeakSet[torch.optim.Optimizer]

    def pairs(self) -> Iterator[tuple[str, nn.Parameter | None, nn.Parameter]]:
        """Name, dense weight and active parameter."""
        ...

    def bind_(self) -> None:
        """Make every active parameter a view of the flat buffers again."""
        ...

    def adopt_(self) -> None:
        """Take over what others wrote into dense weights."""
        ...

    def check_gradients(self) -> list[str]:
        """Refuse a step without gradients."""
        ...

    def scatter_(self) -> None:
        """Copy the active weights into the dense ones."""
        ...


_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_abandoned = WeakTensorKeyDictionary()  # active parameters that no model has any more -> name of their dense weight


def watch(store: Store) -> None:
    """Serve ``store`` whenever an optimizer that holds its parameters steps."""
    _stores.add(store)


def forget(store: Store) -> None:
    """Serve it no longer."""
    _stores.discard(store)


def abandon(name: str, parameter: nn.Parameter) -> None:
    """From now on refuse the step of an optimizer that holds ``parameter``: no model would notice."""
    _abandoned[parameter] = name


def watched() -> list[Store]:
    """The stores that are served now."""
    return list(_stores)


def _held(optimizer: torch.optim.Optimizer) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def _stores_of(optimizer: torch.optim.Optimizer) -> list[Store]:
    if not _stores or getattr(optimizer, "scatters_itself", False):
        return []
    held = _held(optimizer)
    return [store for store in _stores if any(id(active) in held for _, _, active in store.pairs())]


def _refuse_abandoned(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer from before ``active.remove()`` would go on, and no model would change."""
    gone = [_abandoned[parameter] for parameter in _held(optimizer).values() if parameter in _abandoned]
    if gone:
        raise RuntimeError(
            f"{type(optimizer).__name__} holds active parameters of a mask that was removed or replaced: "
            f"{', '.join(gone[:3])}. Its step would change nothing in the model; make a new optimizer on "
            f"active.parameters() (model.parameters() where there is no mask), or give it to change_mask"
        )


def _stores_to_serve(optimizer: torch.optim.Optimizer) -> list[Store]:
    """Stores whose parameters it holds; refuses one from before ``apply_mask``: it would pass over frozen weights."""
    held, stores = _held(optimizer), []
    for store in _stores:
        alone, any_active = [], False
        for name, dense, active in store.pairs():
            if id(active) in held:
                any_active = True
            elif id(dense) in held:
                alone.append(name)
        if alone:
            raise RuntimeError(
                f"{type(optimizer).__name__} holds {len(alone)} dense weights of a masked model without their active "
                f"parameters: {', '.join(alone[:3])}. They are frozen, so its step would change nothing there; make "
                f"the optimizer after apply_mask(model, mask), on active.parameters()"
            )
        if any_active:
            stores.append(store)
    return stores


def _before_any_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if _abandoned:
        _refuse_abandoned(optimizer)
    if not _stores or getattr(optimizer, "scatters_itself", False):
        return None
    stores = _stores_to_serve(optimizer)
    for store in stores:
        store.followers.add(optimizer)
        store.bind_()  # weights, gradients and state in one memory order, which fused steps take for granted
        store.adopt_()
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if stores and callable(closure):
        following = _with_dense_weights_following(closure, stores)
        if "closure" in kwargs:
            return args, kwargs | {"closure": following}
        return (args[0], following, *args[2:]), kwargs
    for store in stores:
        store.check_gradients()
    return None


def _with_dense_weights_following(closure: Callable[[], Any], stores: list[Store]) -> Callable[[], Any]:
    """The closure for an optimizer that moves weights between its evaluations, as LBFGS does."""
    evaluated = False

    def evaluate() -> Any:
        nonlocal evaluated
        for store in stores if evaluated else []:
            store.scatter_()
        evaluated = True
        loss = closure()
        for store in stores:
            store.check_gradients()
        return loss

    return evaluate


def _after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for store in _stores_of(optimizer):
        store.scatter_()


register_optimizer_step_pre_hook(_before_any_step)
register_optimizer_step_post_hook(_after_any_step)
