"""accumulate_saliency_ against its definition in float64."""

import pytest
import torch
from budget import assert_within_budget

from pecker_fast.blocks import BlockGrid
from pecker_fast.ops import accumulate_saliency_

SHAPES = [(1,), (37,), (5, 7), (130, 65), (6, 10, 3, 3)]
DEFINITION = {"signed_sum": lambda g: g, "abs": torch.abs, "square": torch.square}


@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_weight(accumulate, shape, dtype):
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    total = torch.zeros(shape)
    for grad in grads:
        accumulate_saliency_(total, grad, accumulate)
    truth = sum(DEFINITION[accumulate](grad.double()) for grad in grads)
    plain = sum(DEFINITION[accumulate](grad.float()) for grad in grads)
    assert_within_budget(total, truth, plain)


@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1])
@pytest.mark.parametrize("block", ["row", (4, 3), (64, 64), "element"])
def test_per_block_is_the_sum_over_each_block(accumulate, shape, block):
    grid = BlockGrid.of(shape, block)
    grad = torch.randn(shape, dtype=torch.float64)
    total = accumulate_saliency_(torch.zeros(grid.num_blocks, dtype=torch.float64), grad, accumulate, grid=grid)
    out, in_, taps = grid.view
    flat = DEFINITION[accumulate](grad).view(out, in_, taps)
    for number in range(grid.num_blocks):
        row, column = divmod(number, grid.size[1])
        block_out, block_in = grid.block
        piece = flat[row * block_out : (row + 1) * block_out, column * block_in : (column + 1) * block_in]
        assert abs(float(total[number] - piece.sum())) < 1e-12


def test_wrong_arguments_change_nothing():
    total = torch.ones(3)
    for bad in (
        lambda: accumulate_saliency_(total, torch.ones(4)),
        lambda: accumulate_saliency_(total, torch.ones(3), "cube"),
        lambda: accumulate_saliency_(total.bfloat16(), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="accumulate_saliency_"):
            bad()
    assert torch.equal(total, torch.ones(3))


def test_opcheck():
    arguments = (torch.zeros(4, 6), torch.randn(4, 6), "abs", None, None, None)
    torch.library.opcheck(torch.ops.pecker_fast.accumulate_saliency_, arguments)
