"""gather_active: what ParameterMask.gather gives, as a tensor of its own, in every layout."""

import pytest
import torch

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.gather_active import gather_active


@pytest.mark.parametrize("shape", [(7,), (20, 12), (20, 12, 3, 3), (16, 8, 1, 1)])
@pytest.mark.parametrize("block", ["row", "element", (4, 4), (8, 5)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_gather_and_passes_opcheck(shape, block, density, channels_last):
    grid = BlockGrid.of(shape, block)
    mask = ParameterMask(grid, torch.randperm(grid.num_blocks)[: round(density * grid.num_blocks)].sort().values)
    dense = torch.randn(shape)
    if len(shape) == 4 and channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    got = gather_active(dense, mask, channels_last)
    assert sorted(got.flatten().tolist()) == sorted(dense[mask.to_dense()].tolist())
    assert torch.equal(got, mask.gather(dense, channels_last).view(got.shape))
    assert got.data_ptr() != dense.data_ptr() or not got.numel()
    arguments = (dense, mask.active, list(mask.compact_shape), list(shape), list(grid.view), list(grid.block))
    torch.library.opcheck(torch.ops.pecker_fast.gather_active, (*arguments, channels_last))
