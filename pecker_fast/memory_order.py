"""``.to(memory_format=...)`` in mid-training: what is laid out as the dense weights lie follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from pecker_fast.layout import Entry
from pecker_fast.ops.layout import is_channels_last

Moved: TypeAlias = Sequence[tuple[Entry, Entry, nn.Parameter]]
"""Entries before and after, of the same stretch, and their active parameter."""


def as_they_lie(entries: tuple[Entry, ...], dense: Sequence[Tensor]) -> tuple[Entry, ...]:
    """``entries`` in the memory order that their dense weights have now; the same object where that is theirs."""
    orders = list(map(is_channels_last, dense))
    if orders == [entry.channels_last for entry in entries]:
        return entries
    return tuple(replace(entry, channels_last=order) for entry, order in zip(entries, orders, strict=True))


def reorder_(flat: Tensor, moved: Moved) -> None:
    """Put a flat buffer into its new order, in place."""
    for old, new, _ in moved:
        stretch = old.stretch(flat)
        stretch.copy_(new.of_dense(old.to_dense(stretch)))


def reorder_state_(optimizer: torch.optim.Optimizer, moved: Moved) -> None:
    """Put what an optimizer keeps of every weight into the new order of its active parameters."""
    if getattr(optimizer, "scatters_itself", False):
        cast(Any, optimizer).reorder_state_(lambda flat: reorder_(flat, moved))
        return
    for old, new, parameter in moved:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = new.shaped(new.of_dense(old.to_dense(old.flattened(value))))
