"""The geometry of a mask: how one weight is cut into blocks, and which of them are active.

A weight of shape (out, in, *taps) is a grid of blocks of (out, in) weights over all taps. Only torch is needed here,
so that ops may take these types as arguments without knowing anything of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pecker_fast.once import once, to_device

Block: TypeAlias = tuple[int, int] | Literal["row", "element", "auto"]

AUTO_TILE = (64, 64)
"""What ``block="auto"`` cuts wide weights into: the smallest tile that tensor cores like."""
AUTO_ROWS_BELOW = 128
"""``block="auto"`` takes rows where a weight has fewer in or out channels than this."""


@dataclass(frozen=True)
class BlockGrid:
    """How a weight of ``shape`` is cut into blocks.

    Attributes:
        shape: Shape of the dense weight.
        view: The weight seen as (out, in, taps); a vector is (1, n, 1), an element-wise grid (n, 1, 1).
        block: Weights of one block along (out, in); blocks at the edge may be smaller.
    """

    shape: tuple[int, ...]
    view: tuple[int, int, int]
    block: tuple[int, int]

    @staticmethod
    def of(shape: tuple[int, ...], block: Block, by_row: bool = False) -> BlockGrid:
        """Cut a weight as ``block`` asks.

        Args:
            shape: Shape of the weight. With fewer than two dimensions it becomes one block (a bias, a norm).
            block: (out, in), "row" (1, in), "element" (or (1, 1)): single weights, or "auto": tiles of 64 x 64
                where both sides have at least 128 channels and rows elsewhere.
            by_row: Rows whatever ``block`` says, except "element" (an embedding).

        Raises:
            ValueError: ``block`` is none of these.
        """
        check_block(block)
        numel = math.prod(shape)
        if block in ("element", (1, 1)):
            return BlockGrid(shape, (numel, 1, 1), (1, 1))
        if len(shape) < 2:
            return BlockGrid(shape, (1, numel, 1), (1, max(numel, 1)))
        out, in_ = shape[:2]
        if block == "auto":
            block = "row" if min(out, in_) < AUTO_ROWS_BELOW else AUTO_TILE
        if by_row or isinstance(block, str):
            block = (1, in_)
        size = (min(block[0], out), min(block[1], in_))
        return BlockGrid(shape, (out, in_, math.prod(shape[2:])), (max(size[0], 1), max(size[1], 1)))

    def check(self) -> None:
        """Refuse fields that do not fit together, as those of a damaged file.

        Raises:
            ValueError: They do not.
        """
        matrix = (*self.shape[:2], math.prod(self.shape[2:])) if len(self.shape) > 1 else (1, self.numel, 1)
        sizes = (*self.shape, *self.view, *self.block)
        natural = all(type(size) is int and size >= 0 for size in sizes)
        if not natural or self.view not in (matrix, (self.numel, 1, 1)) or len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(
                f"not a grid: expected view {matrix} or {(self.numel, 1, 1)} for shape {self.shape}, and two block "
                f"sides of at least 1, got view {self.view} and block {self.block}"
            )

    @property
    def numel(self) -> int:
        """Weights in all."""
        return math.prod(self.shape)

    @property
    def size(self) -> tuple[int, int]:
        """Blocks along (out, in)."""
        (out, in_, _), (block_out, block_in) = self.view, self.block
        return -(-out // block_out), -(-in_ // block_in)

    @property
    def num_blocks(self) -> int:
        """Blocks in all; block number ``r * size[1] + c`` stands at row ``r``, column ``c``."""
        return self.size[0] * self.size[1]

    @property
    def is_rows(self) -> bool:
        """Whether every block is one whole output row."""
        return len(self.shape) >= 2 and self.block == (1, self.view[1]) and self.view[0] == self.shape[0]

    @property
    def is_even(self) -> bool:
        """Whether blocks are tiles of several weights, none of them cut off at an edge."""
        (out, in_, _), (block_out, block_in) = self.view, self.block
        tiles = self.view[0] == self.shape[0] and len(self.shape) >= 2 and block_out * block_in > 1
        return tiles and out % block_out == 0 and in_ % block_in == 0

    def block_numel(self) -> Tensor:
        """Weights of every block, edges counted as they are: int64 (num_blocks,)."""
        out, in_, taps = self.view
        heights = _extents(out, self.block[0])
        widths = _extents(in_, self.block[1])
        return (heights[:, None] * widths[None, :] * taps).flatten()

    def block_sums(self, values: Tensor) -> Tensor:
        """Sum of ``values`` (of the weight's shape, any float) over every block: (num_blocks,), same dtype."""
        out, in_, taps = self.view
        (block_out, block_in), (rows, columns) = self.block, self.size
        if block_out == 1 and block_in in (1, in_):  # rows, vectors and elements need no padding
            return values.reshape(rows * columns, self.numel // max(rows * columns, 1)).sum(1)
        pad = (0, 0, 0, columns * block_in - in_, 0, rows * block_out - out)
        padded = torch.nn.functional.pad(values.reshape(out, in_, taps), pad)
        return padded.reshape(rows, block_out, columns, block_in * taps).sum((1, 3)).flatten()


@dataclass(frozen=True)
class ParameterMask:
    """The active blocks of one weight.

    Attributes:
        grid: How the weight is cut.
        active: Numbers of the active blocks, sorted: int64 (n,), on the CPU.
    """

    grid: BlockGrid
    active: Tensor

    def __post_init__(self) -> None:
        # What depends on the blocks is kept under this very tensor (once.py), and torch.compile hands another to the
        # backward in place of a view.
        if self.active._is_view():
            object.__setattr__(self, "active", self.active.clone())

    def __deepcopy__(self, memo: dict[int, object]) -> ParameterMask:
        return self  # plain frozen data: copies of a model share it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterMask):
            return NotImplemented
        return self.grid == other.grid and torch.equal(self.active, other.active)

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def full(grid: BlockGrid) -> ParameterMask:
        """Every block active."""
        return ParameterMask(grid, torch.arange(grid.num_blocks, device="cpu"))

    @staticmethod
    def of_flags(grid: BlockGrid, flags: Tensor) -> ParameterMask:
        """The blocks whose flag is set; ``flags`` bool (num_blocks,)."""
        return ParameterMask(grid, flags.nonzero().flatten())

    def check(self) -> None:
        """Refuse a grid that is none, and block numbers that are not sorted, unique and within it.

        Raises:
            ValueError: Something else was put together by hand, or changed in place.
        """
        self.grid.check()
        active, end = self.active, self.grid.num_blocks
        if active.dtype != torch.int64 or active.dim() != 1 or active.device.type != "cpu":
            got = f"{active.dtype} {tuple(active.shape)} on {active.device}"
        elif len(active) and (int(active.min()) < 0 or int(active.max()) >= end):
            got = f"numbers from {int(active.min())} to {int(active.max())}"
        elif not bool((active[1:] > active[:-1]).all()):
            got = "numbers out of order or twice"
        else:
            return
        raise ValueError(
            f"active: expected sorted block numbers, each once, in [0, {end}), int64 (n,) on the CPU, got {got}; make "
            f"them with ParameterMask.of_flags(grid, flags)"
        )

    def flags(self) -> Tensor:
        """One boolean a block: (num_blocks,)."""
        flags = torch.zeros(self.grid.num_blocks, dtype=torch.bool, device="cpu")
        flags[self.active] = True
        return flags

    @cached_property
    def numel(self) -> int:
        """Active weights."""
        if self.is_full:
            return self.grid.numel
        return int(self.grid.block_numel()[self.active].sum())

    @property
    def density(self) -> float:
        """Active share of this weight."""
        return self.numel / self.grid.numel if self.grid.numel else 0.0

    @property
    def is_full(self) -> bool:
        """Whether every block is active."""
        return len(self.active) == self.grid.num_blocks

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of the active weights alone: the weight's own, (active rows, in, *taps), or (n,) for other blocks."""
        if self.is_full:
            return self.grid.shape
        if self.grid.is_rows:
            return (len(self.active), *self.grid.shape[1:])
        return (self.numel,)

    def index(self, channels_last: bool = False) -> Tensor:
        """Position in the flattened (C order) dense weight of every active weight, in the order they are stored.

        Block after block; within a block out, in, taps, or out, taps, in where ``channels_last`` says that the dense
        weight itself lies so in memory, which keeps runs of neighbours long.

        Returns:
            int64 (numel,).
        """
        out, in_, taps = self.grid.view
        (block_out, block_in), columns = self.grid.block, self.grid.size[1]
        if block_out == block_in == taps == 1:
            return self.active
        o = torch.arange(block_out, device="cpu").view(-1, 1, 1)
        i = torch.arange(block_in, device="cpu").view(1, -1, 1)
        t = torch.arange(taps, device="cpu").view(1, 1, -1)
        if channels_last:
            i, t = i.view(1, 1, -1), t.view(1, -1, 1)
        rows = (self.active // columns * block_out).view(-1, 1, 1, 1) + o
        cols = (self.active % columns * block_in).view(-1, 1, 1, 1) + i
        index = (rows * in_ + cols) * taps + t
        inside = ((rows < out) & (cols < in_)).expand_as(index)
        return index.flatten() if bool(inside.all()) else index[inside]

    def to_dense(self) -> Tensor:
        """The mask as booleans of the weight's shape."""
        dense = torch.zeros(self.grid.numel, dtype=torch.bool, device="cpu")
        dense[self.index()] = True
        return dense.view(self.grid.shape)

    def gather(self, dense: Tensor, channels_last: bool = False) -> Tensor:
        """The active weights of a tensor of the weight's shape, as ``compact_shape``; a copy unless all are active."""
        if self.is_full:
            return dense
        if self.grid.is_rows:
            return dense.index_select(0, self.active_on(dense.device))
        if self.grid.is_even:
            return self._gather_tiles(dense, channels_last)
        return dense.reshape(-1)[self.index_on(dense.device, channels_last)]

    def active_on(self, device: torch.device) -> Tensor:
        """``active`` on a device."""
        return self._once_on(device, "active", lambda: self.active)

    def index_on(self, device: torch.device, channels_last: bool = False) -> Tensor:
        """``index`` on a device."""
        return self._once_on(device, ("index", self.grid, channels_last), lambda: self.index(channels_last))

    def _once_on(self, device: torch.device, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Kept where it would have to be copied again: each copy to a GPU makes the host wait for it."""
        return make() if device.type == "cpu" else once(self.active, (what, device), lambda: to_device(make(), device))

    def _gather_tiles(self, dense: Tensor, channels_last: bool) -> Tensor:
        """Whole tiles at once, where no tile is cut off at an edge."""
        taps, (block_out, block_in), (rows, columns) = self.grid.view[2], self.grid.block, self.grid.size
        active = self.active_on(dense.device)
        row, column = active // columns, active % columns
        if channels_last and dense.dim() == 4:
            tiles = dense.permute(0, 2, 3, 1).reshape(rows, block_out, taps, columns, block_in)
            return tiles[row, :, :, column].reshape(-1)
        return dense.reshape(rows, block_out, columns, block_in * taps)[row, :, column].reshape(-1)


def check_block(block: object) -> None:
    """Refuse anything that is not a block specification."""
    named = isinstance(block, str) and block in ("row", "element", "auto")
    pair = (
        isinstance(block, tuple)
        and len(block) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in block)
    )
    if not (named or pair):
        raise ValueError(
            f'block: expected (out, in) as two positive integers, "row", "element" or "auto", got {block!r}'
        )


def _extents(length: int, block: int) -> Tensor:
    """Length of each piece of ``length`` cut every ``block``: the last may be shorter."""
    starts = torch.arange(0, length, block, device="cpu")
    return torch.clamp(length - starts, max=block)
