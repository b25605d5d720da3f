"""Values that depend on a mask's active blocks: made once, forgotten with the blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(active: Tensor, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What ``make`` gave the first time it was asked for ``key`` of these blocks.

    Args:
        active: Block numbers of a mask, as the one tensor that they always are.
        key: What is asked for, and all it depends on beside the blocks; its first entry says by whom.
        make: Computes it; copies to a GPU belong here, so that only the first call waits for them.
    """
    values = _values.setdefault(active, {})
    if key not in values:
        values[key] = make()
    value: T = values[key]
    return value


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)`` for what ``once`` keeps.

    Raises:
        RuntimeError: A CUDA graph is being captured, into which no copy from the host's memory fits.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a masked step is captured in a CUDA graph before its tables are on the GPU: run it three times before you "
            "capture it, on a side stream as torch.cuda.graph asks for"
        )
    return tensor.to(device)


def remembered(active: Tensor) -> list[tuple[tuple[Hashable, ...], Any]]:
    """All keys and values of these blocks."""
    return list(_values.get(active, {}).items())
