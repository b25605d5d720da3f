"""The byte and FLOP models against hand counts, and against what the kernels are given."""

from __future__ import annotations

import pytest
import torch

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import costs
from pecker_fast.ops.costs import Cost
from pecker_fast.ops.problem import Problem
from pecker_fast.ops.tiles import cut
from pecker_fast.scatter import ScatterTable, Target


def mask_of(shape, block, active):
    return ParameterMask(BlockGrid.of(shape, block), torch.tensor(active, dtype=torch.int64))


def conv(mask, batch, size, out_size, dtype=torch.bfloat16, stride=1):
    out, in_ = mask.grid.shape[:2]
    grad_output = torch.empty(batch, out, *out_size, dtype=dtype, device="meta")
    input = torch.empty(batch, in_, *size, dtype=dtype, device="meta")
    return Problem(grad_output, input, mask, mask.compact_shape, ([stride] * 2, [1, 1], [1, 1], 1), True)


def linear(mask, positions, dtype=torch.bfloat16):
    out, in_ = mask.grid.shape
    operands = (torch.empty(positions, channels, dtype=dtype, device="meta") for channels in (out, in_))
    return Problem(*operands, mask, mask.compact_shape, ([1, 1], [0, 0], [1, 1], 1), False)


def test_the_roofline_is_the_slower_of_the_two():
    cost = Cost(bytes=400, flops=900)
    assert cost.seconds(bandwidth=100, rate=900) == 4
    assert cost.seconds(bandwidth=100, rate=90) == 10
    assert cost.seconds(bandwidth=100) == 4
    assert cost + Cost(1, 2) == Cost(401, 902)


@pytest.mark.parametrize(
    "settings, bytes_, flops",
    [
        ({}, 28, 16),
        ({"first_moment": False}, 20, 13),
        ({"ema": True}, 36, 19),
        ({"saliency": True}, 36, 18),
        ({"first_moment": False, "ema": True, "saliency": True}, 36, 18),
    ],
)
def test_masked_adamw_moves_every_buffer_as_often_as_it_is_used(settings, bytes_, flops):
    assert costs.masked_adamw(1000, **settings) == Cost(1000 * bytes_, 1000 * flops)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_the_scatter_writes_the_dense_dtype_and_reads_its_table(dtype, size):
    rows = mask_of((6, 5), "row", [1, 2, 4])  # two runs, 15 weights
    whole = ParameterMask.full(BlockGrid.of((7,), "row"))  # a view of the buffer: nothing to copy
    device = torch.device("cpu")
    table = ScatterTable([Target(rows, torch.zeros(6, 5, dtype=dtype)), Target(whole, None)], device)
    read = sum(tensor.nbytes for tensor in table.tensors())
    assert read >= 20 * 2  # at least 20 bytes a run
    assert costs.masked_adamw(22, scatter=table).bytes == 22 * 28 + 15 * size + read
    assert costs.masked_adamw(22, scatter=ScatterTable([Target(whole, None)], device)).bytes == 22 * 28


def test_dense_optimizers():
    assert costs.dense_adamw(10) == Cost(280, 160)
    assert costs.dense_adamw(10, "foreach").bytes == 720
    assert costs.published_step(10).bytes == 880
    # DESIGN: at density d the cap against fused is 28 / (32 d)
    assert costs.dense_adamw(100).bytes / (costs.masked_adamw(10).bytes + 4 * 10) == pytest.approx(8.75)


def test_weight_gradient_of_ragged_tiles():
    # 70 x 100 in tiles of 32 x 48: 3 x 3 blocks, the last ones 6 high and 4 wide. Active: (0, 0), (0, 2), (2, 2).
    mask = mask_of((70, 100, 3, 3), (32, 48), [0, 2, 8])
    assert costs.touched_channels(mask) == (32 + 6, 48 + 4)
    numel = 9 * (32 * 48 + 32 * 4 + 6 * 4)
    assert mask.numel == numel
    positions, in_positions = 2 * 4 * 5, 2 * 8 * 10
    cost = costs.masked_weight_grad(conv(mask, 2, (8, 10), (4, 5), stride=2))
    assert cost.flops == 2 * numel * positions
    assert cost.bytes == 2 * (38 * positions + 52 * in_positions) + 4 * numel


@pytest.mark.parametrize("dtype, size, gradient", [(torch.bfloat16, 2, 4), (torch.float64, 8, 8)])
def test_weight_gradient_of_rows_reads_the_whole_input(dtype, size, gradient):
    mask = mask_of((10, 6), "row", [0, 3, 9])
    cost = costs.masked_weight_grad(linear(mask, 50, dtype))
    assert cost == Cost(size * (3 * 50 + 6 * 50) + gradient * 18, 2 * 18 * 50)


def test_weight_gradient_of_nothing_and_of_everything():
    nothing = costs.masked_weight_grad(linear(mask_of((64, 64), (16, 16), []), 10))
    assert nothing == Cost(0, 0)
    problem = linear(ParameterMask.full(BlockGrid.of((64, 32), (16, 16))), 10)
    dense, masked, gathered = (
        f(problem) for f in (costs.dense_weight_grad, costs.masked_weight_grad, costs.gathered_weight_grad)
    )
    assert dense == Cost(2 * (640 + 320 + 2048), 2 * 2048 * 10)
    assert masked.flops == dense.flops and masked.bytes - dense.bytes == 2 * 2048  # float32, not bfloat16
    assert gathered.bytes == dense.bytes + (2 + 4) * 2048


def test_single_weights_have_no_channels_of_their_own():
    with pytest.raises(ValueError, match="single weights"):
        costs.touched_channels(mask_of((4, 4), "element", [3]))


def test_l2_traffic_is_that_of_the_tiles_launched():
    mask = mask_of((128, 128, 3, 3), (64, 64), [0, 3])
    problem = conv(mask, 1, (4, 4), (4, 4))
    tiles = cut(mask, False, True, 64, 64)
    assert len(tiles.table) == 2
    # 2 tiles x 3 kernel rows x 16 positions x (64 out + 3 taps x 64 in) channels x 2 bytes
    assert costs.weight_grad_l2_bytes(problem, tiles) == 2 * 3 * 16 * (64 + 3 * 64) * 2
    parts = 2 * 5 * 9 * 64 * 64 * 4  # tiles x splits x taps x weights x float32
    assert costs.weight_grad_l2_bytes(problem, tiles, splits=5) == 2 * 3 * 16 * 256 * 2 + 2 * parts
    flat = linear(mask_of((128, 128), (64, 64), [0, 3]), 16)
    assert costs.weight_grad_l2_bytes(flat, cut(flat.mask, False, False, 64, 64)) == 2 * 16 * 128 * 2


def test_saliency_selection_and_loss():
    assert costs.accumulate_saliency(100) == Cost(1200, 200)
    assert costs.accumulate_saliency(100, grad_dtype=torch.bfloat16).bytes == 1000
    assert costs.accumulate_saliency(100, blocks=3, total_dtype=torch.float64).bytes == 400 + 2 * 8 * 3
    assert costs.select_threshold(100).bytes == 1200  # three passes
    assert costs.select_threshold(100, torch.float64).bytes == 4800  # six
    assert costs.select_threshold(100, backend="cpu").bytes == 800
    assert costs.compact_active(100, 10).bytes == 480
    assert costs.sid_loss(2, 50) == Cost(4 * (5 * 100 + 4), 1400)
    assert costs.sid_loss(2, 50, torch.float64, reads=2).bytes == 8 * (8 * 100 + 4)
