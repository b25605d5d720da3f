"""A masked layer, forward and backward, against the plain one at every density: it may never lose by more than 3 %.

Above the crossover (``layers.py``) the dense gradient is what a masked layer computes, and only its gathering is added.
"""

from __future__ import annotations

import copy

import pytest
import torch
from measure import ROWS, Row, race
from torch import nn

from pecker_fast import BlockMask, apply_mask

DENSITIES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
LAYERS = {
    "conv3x3": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (16, 256, 16, 16)),
    "linear": (lambda: nn.Linear(1024, 1024, bias=False), (2048, 1024)),
}


@pytest.mark.parametrize("block", ["row", (64, 64), "element"], ids=["row", "64x64", "element"])
@pytest.mark.parametrize("kind", LAYERS)
def bench_masked_layer(benchmark, device, matmul_rate, kind, block):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randn(shape, device=device)
    layer = make().to(device)
    if x.dim() == 4:
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    x.requires_grad_()
    grad_output = torch.randn_like(layer(x))

    def pass_through(module: nn.Module, parameters: list[nn.Parameter]):
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            x.grad = None
            module(x).backward(grad_output)

        return run

    contestants = {"dense": pass_through(layer, [layer.weight])}
    stores = {}
    for density in DENSITIES:
        masked = copy.deepcopy(layer)
        stores[density] = apply_mask(masked, BlockMask.random(masked, density, block))
        contestants[str(density)] = pass_through(masked, stores[density].parameters())
    contestants["dense"]()
    for density, active in stores.items():
        contestants[str(density)]()
        active.bind_()
        expected = layer.weight.grad * active.mask.to_dense("weight").to(device)
        torch.testing.assert_close(active.to_dense(active.grads, "weight"), expected, rtol=1e-4, atol=1e-3)
    seconds = race(contestants, rounds=11)
    benchmark.pedantic(contestants[str(DENSITIES[0])], rounds=3)

    positions = grad_output.numel() // layer.weight.shape[0]
    for density, active in stores.items():
        ours = seconds[str(density)]
        flops, dense_flops = (
            2 * positions * n for n in (2 * layer.weight.numel() + active.numel, 3 * active.mask.total)
        )
        share = f"{flops / ours / matmul_rate:.0%} of matmul {matmul_rate / 1e9:.0f} GFLOP/s"
        work = f"{flops / 1e9:.2f} : {dense_flops / 1e9:.2f} GFLOP"
        what = f"{kind} layer, {block}"
        row = Row(what, "plain layer", active.mask.density, 1e3 * ours, 1e3 * seconds["dense"], work, share)
        ROWS.append(row)
        benchmark.extra_info[str(density)] = {"ratio": row.ratio, "work": work, "share": share}
