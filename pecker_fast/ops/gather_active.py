"""The active weights of a dense tensor, as one call that a compiler does not look into.

Where tiles are cut off at an edge their positions depend on the mask's contents, which no graph can trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.dispatch import library


def gather_active(dense: Tensor, mask: ParameterMask, channels_last: bool = False) -> Tensor:
    """``mask.gather(dense, channels_last)``, always a new tensor.

    Args:
        dense: Of the weight's shape, any dtype.
        mask: Its active blocks.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
    """
    grid = mask.grid
    geometry = list(mask.compact_shape), list(grid.shape), list(grid.view), list(grid.block)
    gathered: Tensor = torch.ops.pecker_fast.gather_active(dense, mask.active, *geometry, channels_last)
    return gathered


library.define(
    "gather_active(Tensor dense, Tensor active, SymInt[] compact_shape, SymInt[] shape, SymInt[] view, SymInt[] block, "
    "bool channels_last) -> Tensor"
)


@torch.library.impl(library, "gather_active", "CompositeExplicitAutograd")
def _run(
    dense: Tensor,
    active: Tensor,
    compact_shape: list[int],
    shape: list[int],
    view: list[int],
    block: list[int],
    channels_last: bool,
) -> Tensor:
    mask = ParameterMask(BlockGrid(tuple(shape), (view[0], view[1], view[2]), (block[0], block[1])), active)
    gathered = mask.gather(dense, channels_last)
    layout = _layout(compact_shape, channels_last)
    return gathered.clone(memory_format=layout) if mask.is_full else gathered.contiguous(memory_format=layout)


@torch.library.register_fake("pecker_fast::gather_active")
def _fake(dense: Tensor, active: Tensor, compact_shape: list[int], *rest: Any) -> Tensor:
    layout = _layout(compact_shape, channels_last=rest[-1])
    return torch.empty(compact_shape, dtype=dense.dtype, device=dense.device, memory_format=layout)


def _layout(compact_shape: list[int], channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last and len(compact_shape) == 4 else torch.contiguous_format
