"""Weight gradient of a 3x3 convolution for its active blocks against the dense one: where is the crossover?

These are the slabs themselves; above the crossover a layer takes the dense gradient (``bench_masked_layer.py``).
"""

from __future__ import annotations

import pytest
import torch
from measure import ROWS, Row, race

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import masked_weight_grad

BATCH, CHANNELS, SIZE = 16, 256, 16
SHAPE = (CHANNELS, CHANNELS, 3, 3)
DENSITIES = (0.125, 0.25, 0.5, 0.625, 0.75, 0.875)


def dense_gradient(grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weight = grad_output.new_empty(1).expand(SHAPE)
    return torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


@pytest.mark.parametrize("block", ["row", (64, 64)], ids=["row", "64x64"])
def bench_masked_weight_grad(benchmark, device, matmul_rate, block):
    torch.manual_seed(0)
    shape = (BATCH, CHANNELS, SIZE, SIZE)
    x, grad_output = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    grid = BlockGrid.of(SHAPE, block)
    order = torch.randperm(grid.num_blocks)
    masks = {
        density: ParameterMask(grid, order[: round(density * grid.num_blocks)].sort().values) for density in DENSITIES
    }
    truth = dense_gradient(grad_output, x)
    contestants = {"dense": lambda: dense_gradient(grad_output, x)}
    for density, mask in masks.items():
        got = masked_weight_grad(grad_output, x, mask, padding=(1, 1))
        torch.testing.assert_close(got, mask.gather(truth), rtol=1e-4, atol=1e-3)
        contestants[str(density)] = lambda mask=mask: masked_weight_grad(grad_output, x, mask, padding=(1, 1))
    seconds = race(contestants, rounds=9)
    benchmark.pedantic(contestants[str(DENSITIES[0])], rounds=3)

    positions = BATCH * SIZE * SIZE
    flops_dense = 2 * grid.numel * positions
    for density, mask in masks.items():
        flops = 2 * mask.numel * positions
        ours = seconds[str(density)]
        share = f"{flops / ours / matmul_rate:.0%} of matmul {matmul_rate / 1e9:.0f} GFLOP/s"
        work = f"{flops / 1e9:.2f} : {flops_dense / 1e9:.2f} GFLOP"
        row = Row(f"conv3x3 wgrad, {block}", "dense wgrad", density, 1e3 * ours, 1e3 * seconds["dense"], work, share)
        row.headline = density == DENSITIES[0]
        ROWS.append(row)
        benchmark.extra_info[str(density)] = {"ratio": row.ratio, "work": work, "share": share}
