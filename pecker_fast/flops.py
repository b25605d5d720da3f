"""Counting floating-point operations, two a multiply-add, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pecker_fast.ops.masked_weight_grad import register_flops

aten = torch.ops.aten


class FlopCount:
    """The number of floating-point operations of a ``count_flops`` block, once it has ended."""

    total: int = 0


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the matmuls, convolutions and attention inside the block, our own ops included.

    It is ``torch.utils.flop_counter``, with attention counted on the CPU too, where torch counts it as 0.
    """
    register_flops()
    count = FlopCount()
    mode = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    try:
        with mode:
            yield count
    finally:
        count.total = mode.get_total_flops()


def formulas() -> dict[Any, Callable[..., int]]:
    """Operator -> its FLOPs by arguments and ``out_val``, as ``count_flops`` counts them."""
    register_flops()
    registry: dict[Any, Callable[..., int]] = FlopCounterMode(
        display=False, custom_mapping=_CPU_ATTENTION
    ).flop_registry
    return registry


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
