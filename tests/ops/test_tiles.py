"""How masks are cut into tiles: every active weight in exactly one, at the place the compact gradient has for it."""

import pytest
import torch

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.once import once, remembered
from pecker_fast.ops import slabs
from pecker_fast.ops.tiles import best_tiles, choose_splits, cut
from pecker_fast.scatter import ScatterTable, Target

SIZES = [(64, 16), (64, 64), (128, 64), (128, 128)]


def covered(tiles, grid, taps, channels_last):
    """Compact position -> (row, column, tap) of the gradient, read off the table."""
    found = {}
    for line in tiles.table.tolist():
        column, columns, width, *groups = line
        assert column % tiles.alignment == 0 and columns <= tiles.block_n
        for row, rows, offset in zip(*[iter(groups)] * 3, strict=True):
            assert row % tiles.alignment == 0 and rows <= tiles.group
            for r in range(rows):
                for c in range(columns):
                    for t in range(taps):
                        inner = t * width + c if channels_last else c * taps + t
                        place = offset + r * width * taps + inner
                        assert place not in found
                        found[place] = (row + r, column + c, t)
    return found


@pytest.mark.parametrize("shape", [(72, 40, 3, 3), (33, 130)])
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (24, 40), (5, 7)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("block_m, block_n", SIZES)
def test_every_active_weight_is_in_one_tile_at_its_place(shape, block, density, channels_last, block_m, block_n):
    grid = BlockGrid.of(shape, block)
    mask = ParameterMask(grid, torch.randperm(grid.num_blocks)[: int(density * grid.num_blocks)].sort().values)
    tiles = cut(mask, False, channels_last, block_m, block_n)
    taps = grid.view[2]
    places = covered(tiles, grid, taps, channels_last)
    index = mask.index(channels_last).tolist()
    assert [(r * grid.view[1] + c) * taps + t for _, (r, c, t) in sorted(places.items())] == index
    assert sorted(places) == list(range(mask.numel))


def test_rows_are_packed_into_one_block():
    grid = BlockGrid.of((50, 20, 3, 3), "row")
    mask = ParameterMask(grid, torch.tensor([1, 4, 30]))
    places = covered(cut(mask, True, True, 64, 16), grid, 9, True)
    assert {row for row, _, _ in places.values()} == {0, 1, 2} and sorted(places) == list(range(mask.numel))


@pytest.mark.parametrize("as_rows, block", [(True, "row"), (False, (24, 40)), (False, (128, 128))])
def test_rows_of_tiles_know_their_block(as_rows, block):
    grid = BlockGrid.of((150, 90), block)
    mask = ParameterMask(grid, torch.arange(0, grid.num_blocks, 2))
    tiles = cut(mask, as_rows, False, 64, 32)
    per_row = torch.zeros(len(tiles.table), 64)  # how many weights of the tile's row are active
    for line, counts in zip(tiles.table.tolist(), per_row, strict=True):
        for slot, (_, rows, _) in enumerate(zip(*[iter(line[3:])] * 3, strict=True)):
            counts[slot * tiles.group : slot * tiles.group + rows] = line[1]
    sums = torch.cat([per_row.flatten(), torch.zeros(1)])[tiles.block_rows].sum(1)
    assert torch.equal(sums.long(), grid.block_numel()[mask.active])


def test_blocks_of_one_column_share_a_tile_where_that_reads_less():
    grid = BlockGrid.of((512, 512), (64, 64))
    column, diagonal = torch.arange(8) * 8, torch.arange(8) * 9
    sizes = [(64, 64), (128, 64)]
    assert best_tiles(ParameterMask(grid, column), False, False, sizes, 1).block_m == 128
    assert best_tiles(ParameterMask(grid, diagonal), False, False, sizes, 1).block_m == 64


def test_tiles_are_no_wider_than_blocks():
    grid = BlockGrid.of((64, 64), (64, 20))
    mask = ParameterMask.of_flags(grid, torch.tensor([True, False, True, False]))
    assert best_tiles(mask, False, False, [(64, 16), (64, 32), (64, 64)], 1).block_n in (16, 32)


def test_splits_fill_the_gpu_and_no_more():
    assert choose_splits(programs=1000, steps=100, slots=264, max_splits=99) == 1
    assert choose_splits(programs=6, steps=2048, slots=264, max_splits=99) == 44  # 6 * 44 = 264: one round
    assert choose_splits(programs=6, steps=2048, slots=264, max_splits=10) == 10
    assert choose_splits(programs=6, steps=3, slots=264, max_splits=99) == 1  # nothing to share
    assert choose_splits(programs=200, steps=400, slots=264, max_splits=99) in (1, 4, 5)  # never two half-empty rounds


def test_once_is_once_for_the_same_blocks_and_forgotten_with_them():
    import gc
    import weakref

    active, calls = torch.arange(3), []
    made = once(active, ("what",), lambda: calls.append(1) or {"value"})
    assert once(active, ("what",), lambda: calls.append(2)) is made and calls == [1]
    assert remembered(active) == [(("what",), {"value"})] and remembered(torch.arange(3)) == []
    gone = weakref.ref(once(active, ("kept",), lambda: torch.ones(2)))
    del active
    gc.collect()
    assert gone() is None


def test_a_graph_that_is_captured_too_early_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    mask = ParameterMask(BlockGrid.of((32, 32), (16, 16)), torch.tensor([1]))
    cuda, one = torch.device("cuda"), Target(mask, torch.zeros(32, 32))
    for early in (
        lambda: mask.active_on(cuda),
        lambda: mask.index_on(cuda),
        lambda: slabs._rows_of_blocks(mask, cuda),
        lambda: cut(mask, False, False, 64, 16).to(cuda),
        lambda: ScatterTable([Target(mask, None)], cuda),
        lambda: ScatterTable([one], torch.device("cpu")).scatter_reference_(OnCuda()),
    ):
        with pytest.raises(RuntimeError, match="run it three times before you capture it"):
            early()
    assert mask.active_on(torch.device("cpu")) is mask.active


class OnCuda:
    """A buffer, as far as the scatter looks at it before it copies its index."""

    device = torch.device("cuda")

    def split(self, sizes):
        return [None for _ in sizes]
