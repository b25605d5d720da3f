"""Compiled models bring their weights together too: before the compiled code, which cannot look at them.

A compiler traces through the hooks of a model. So what a compiled forward has to do first is done by whoever calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pecker_fast.maskable import STORE


class SyncedCall:
    """What ``model.compile()`` has left on a masked model, called after ``store.sync_()``.

    Args:
        model: The masked model.
        call: Its compiled call.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model."""
        _sync(self.model)
        return self.call(*args, **kwargs)


def sync_before_compiled_calls(model: nn.Module) -> None:
    """From now on a model that was compiled in place brings its weights together before each call."""
    call = model._compiled_call_impl
    if call is not None and not isinstance(call, SyncedCall):
        model._compiled_call_impl = cast(Any, SyncedCall(model, call))


def _sync(model: nn.Module) -> None:
    store = vars(model).get(STORE)
    if store is not None and store.model is model:
        store.sync_()


def _after_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """``torch.compile(model)`` is a module that holds the model under this name, and calls its own hooks uncompiled."""
    if name == "_orig_mod" and submodule is not None and STORE in vars(submodule):
        module.register_forward_pre_hook(lambda *_: _sync(submodule))


register_module_module_registration_hook(_after_registration)
