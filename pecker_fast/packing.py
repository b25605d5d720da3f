"""A mask of one weight as bits, and its grid from what JSON gives back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask


def pack(parameter: ParameterMask) -> Tensor:
    """One bit a block, lowest bit first: uint8 (ceil(num_blocks / 8),)."""
    bits = np.zeros(parameter.grid.num_blocks, dtype=np.uint8)
    bits[parameter.active.numpy()] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(packed: Tensor, grid: BlockGrid) -> ParameterMask:
    """From ``pack``.

    Raises:
        ValueError: Not the bits of this grid.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-grid.num_blocks // 8),):
        raise ValueError(f"{grid.num_blocks} blocks as bits, got {packed.dtype} {tuple(packed.shape)}")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[grid.num_blocks :].any():
        raise ValueError("bits beyond the last block")
    return ParameterMask(grid, torch.from_numpy(bits[: grid.num_blocks].nonzero()[0]))


def grid_of(shape: Any, view: Any, block: Any) -> BlockGrid:
    """A grid from its three fields, checked.

    Raises:
        ValueError, TypeError: They do not fit together.
    """
    grid = BlockGrid(tuple(shape), tuple(view), tuple(block))
    grid.check()
    return grid
