"""How active blocks are cut into the tiles that a GPU kernel computes: a table on the device, made once for a mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.once import to_device

MAX_GROUP = 64
"""Out channels of one block that lie together in a tile: a block with more is cut."""
MIN_SIDE = 16
"""Tensor cores take no fewer channels; smaller blocks are computed as if they had these."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of one mask. A tile is ``block_m`` out channels, in groups of ``group``, by ``block_n`` in channels.

    Attributes:
        table: A line a tile: its first column, columns, width of its blocks; then for every group its first row, rows
            (0: no group) and where its first weight lies in the compact gradient. int32 (tiles, fields).
        block_m: Out channels of a tile.
        block_n: In channels of a tile.
        group: Out channels of a group, all of one block.
        alignment: What all rows and columns are multiples of, at most 16.
        block_rows: For every active block (row, if they count as one block) the out channels of tiles that are its
            own, as places among all tiles' out channels, padded with their number: int64 (blocks, most).
    """

    table: Tensor
    block_m: int
    block_n: int
    group: int
    alignment: int
    block_rows: Tensor

    def to(self, device: torch.device) -> Tiles:
        """The same, with its tensors on a device."""
        return replace(self, table=to_device(self.table, device), block_rows=to_device(self.block_rows, device))


def best_tiles(
    mask: ParameterMask, as_rows: bool, channels_last: bool, sizes: Iterable[tuple[int, int]], taps_a_program: int
) -> Tiles:
    """The tiling of ``mask``, among tiles of ``sizes`` (out, in), that reads the least.

    Every program reads its out channels once and its in channels once for each of its taps.
    """
    grid = _grid(mask, as_rows)
    fitting = [(m, n) for m, n in sizes if n == MIN_SIDE or n <= power_of_two(grid.block[1])]

    def cost(size: tuple[int, int]) -> tuple[int, int]:
        block_m, block_n = size
        return _count(mask, as_rows, block_m, block_n) * (block_m + taps_a_program * block_n), -block_m * block_n

    return cut(mask, as_rows, channels_last, *min(fitting, key=cost))


def cut(mask: ParameterMask, as_rows: bool, channels_last: bool, block_m: int, block_n: int) -> Tiles:
    """Tiles of one size.

    Args:
        mask: Active blocks.
        as_rows: The active rows (of a mask of rows, or all of them) count as one block: they are packed first.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
        block_m: Out channels of a tile.
        block_n: In channels of a tile.
    """
    grid = _grid(mask, as_rows)
    blocks, (_, _, taps), group = grid.view[0] if as_rows else len(mask.active), grid.view, _group(grid)
    pieces = _pieces(mask, as_rows, group, block_n)
    width = pieces.width
    offset = pieces.block_offset + pieces.row_in_block * width * taps
    offset += pieces.column_in_block * (1 if channels_last else taps)

    # Pieces of one column follow one another; each tile takes as many as it has groups.
    order = (pieces.column * (grid.view[0] + 1) + pieces.row).argsort()
    _, counts = torch.unique_consecutive(pieces.column[order], return_counts=True)
    groups = block_m // group
    tiles_of_column = -(-counts // groups)
    ends = counts.cumsum(0)
    rank = torch.arange(len(order), device="cpu") - (ends - counts).repeat_interleave(counts)
    tile = (tiles_of_column.cumsum(0) - tiles_of_column).repeat_interleave(counts) + rank // groups
    slot = rank % groups

    table = torch.zeros(int(tiles_of_column.sum()), 3 + 3 * groups, dtype=torch.int32, device="cpu")
    for field, values in enumerate((pieces.column, pieces.columns, width)):
        table[tile, field] = values[order].int()
    for field, values in enumerate((pieces.row, pieces.rows, offset)):
        table[tile, 3 + 3 * slot + field] = values[order].int()
    in_group = torch.arange(group, device="cpu")
    inside = in_group < pieces.rows[order][:, None]
    owner = torch.full((len(table), groups, group), blocks, dtype=torch.int64, device="cpu")
    number = pieces.row[:, None] + in_group if as_rows else pieces.block[:, None].expand(-1, group)
    owner[tile, slot] = torch.where(inside, number[order], blocks)
    alignment = math.gcd(grid.block[0] if grid.size[0] > 1 else group, group, grid.block[1] if grid.size[1] > 1 else 0)
    alignment = math.gcd(alignment, block_n, 16)
    return Tiles(table, block_m, block_n, group, alignment, _block_rows(owner.flatten(), blocks))


def _block_rows(owner: Tensor, blocks: int) -> Tensor:
    """For every block the entries of ``owner`` that are its own, padded with ``len(owner)``: int64 (blocks, most)."""
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=blocks + 1)[:blocks]
    index = torch.full((blocks, int(counts.max()) if blocks else 0), len(owner), dtype=torch.int64, device="cpu")
    index[torch.arange(index.shape[1], device="cpu") < counts[:, None]] = order[: int(counts.sum())]
    return index


@functools.lru_cache(maxsize=4096)
def choose_splits(programs: int, steps: int, slots: int, max_splits: int) -> int:
    """How many programs share the positions of a tile, so that a GPU with room for ``slots`` programs is busy.

    A program costs its share of ``steps`` and what its start and end cost; the whole as many rounds as it takes to run
    all programs. The fewest splits of the cheapest are taken.

    Args:
        programs: Programs without splitting.
        steps: Steps along the positions of one program without splitting.
        slots: Programs that the GPU runs at once.
        max_splits: Most splits that the workspace may have.
    """
    start_and_end = 8  # of a step's time: the pipeline fills, the product goes to memory; split, it is read again
    best, cost = 1, math.inf
    for splits in range(1, max(min(max_splits, steps // 4), 1) + 1):
        rounds = -(-programs * splits // slots)
        time = rounds * (-(-steps // splits) + start_and_end) + (0 if splits == 1 else start_and_end + splits // 8)
        if time < cost:
            best, cost = splits, time
    return best


@dataclass(frozen=True)
class _Pieces:
    """Blocks cut to at most a group of rows and a tile's columns. Each field int64 (pieces,)."""

    block: Tensor
    row: Tensor
    rows: Tensor
    column: Tensor
    columns: Tensor
    width: Tensor
    row_in_block: Tensor
    column_in_block: Tensor
    block_offset: Tensor


def _pieces(mask: ParameterMask, as_rows: bool, group: int, block_n: int) -> _Pieces:
    grid = _grid(mask, as_rows)
    active = torch.zeros(min(grid.num_blocks, 1), dtype=torch.int64, device="cpu") if as_rows else mask.active
    (out, in_, _), (block_out, block_in), grid_columns = grid.view, grid.block, grid.size[1]
    numel = grid.block_numel()[active]
    begin = numel.cumsum(0) - numel
    first_row, first_column = active // max(grid_columns, 1) * block_out, active % max(grid_columns, 1) * block_in
    height, width = (out - first_row).clamp(max=block_out), (in_ - first_column).clamp(max=block_in)
    down, across = torch.arange(0, block_out, group, device="cpu"), torch.arange(0, block_in, block_n, device="cpu")
    block = torch.arange(len(active), device="cpu").view(-1, 1, 1)
    row_in_block, column_in_block = down.view(1, -1, 1), across.view(1, 1, -1)
    keep = ((row_in_block < height[block]) & (column_in_block < width[block])).flatten()
    block, row_in_block, column_in_block = (
        part.expand(len(active), len(down), len(across)).flatten()[keep]
        for part in (block, row_in_block, column_in_block)
    )
    return _Pieces(
        block,
        first_row[block] + row_in_block,
        (height[block] - row_in_block).clamp(max=group),
        first_column[block] + column_in_block,
        (width[block] - column_in_block).clamp(max=block_n),
        width[block],
        row_in_block,
        column_in_block,
        begin[block],
    )


def _count(mask: ParameterMask, as_rows: bool, block_m: int, block_n: int) -> int:
    """Tiles that ``cut`` would make."""
    group = _group(_grid(mask, as_rows))
    pieces = _pieces(mask, as_rows, group, block_n)
    counts = torch.unique(pieces.column, return_counts=True)[1]
    return int((-(-counts // (block_m // group))).sum())


def _grid(mask: ParameterMask, as_rows: bool) -> BlockGrid:
    """The grid of the gradient that the kernel sees."""
    grid = mask.grid
    if not as_rows:
        return grid
    out = len(mask.active) if grid.is_rows else grid.view[0]
    return BlockGrid((out, *grid.shape[1:]), (out, *grid.view[1:]), (max(out, 1), grid.view[1]))


def _group(grid: BlockGrid) -> int:
    return min(max(power_of_two(grid.block[0]), MIN_SIDE), MAX_GROUP)


def power_of_two(n: int) -> int:
    """The smallest that is no less than ``n``."""
    return 1 << max(n - 1, 0).bit_length()
