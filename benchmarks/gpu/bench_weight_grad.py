"""Weight gradients of active blocks: our kernel, and everything else that would do, against the dense gradient."""

from __future__ import annotations

import functools
import math

import pytest
from machines import REHEARSAL, Burst, sized
from measure import Row, race, record
from weight_grads import TOLERANCE, Gathered, Layer, assert_near, conv, launched, linear

from pecker_fast.ops import costs, triton_kernels
from pecker_fast.ops.weight_grad_ways import WAYS, choose_way

TILE = sized((64, 64), (16, 16))
EVERY, MAIN = (1.0, 0.5, 0.25, 0.1, 0.05), (0.25, 0.1, 0.05)


LABELS = {"triton": "triton", "slabs": "slabs", "dense": "dense + gather"}
"""Ways as the table names them."""

RACES = sized(
    [  # in the order of their importance: time may run out
        (conv(512, 4, 64), TILE, EVERY),
        (conv(256, 128, 32), TILE, EVERY),
        (conv(1280, 4, 32), TILE, EVERY),
        (linear(1280, 16384), TILE, EVERY),
        (linear(1280, 16384), (128, 128), EVERY),
        (linear(1280, 4096), TILE, MAIN),
        (linear(1280, 4096), (128, 128), MAIN),
        (conv(1280, 4, 16), TILE, MAIN),
        (conv(256, 128, 16), TILE, MAIN),
        (conv(512, 4, 64), "row", (0.5, 0.25, 0.1)),
        (conv(256, 128, 32), "row", (0.25, 0.1)),
        (conv(640, 4, 64, stride=2), TILE, (0.25, 0.1)),
        (conv(640, 4, 32, kernel=1), TILE, (0.25, 0.1)),
        (linear(1280, 16384), "row", (0.25, 0.1)),
        (linear(640, 16384), TILE, (0.25, 0.1)),
        (linear(2048, 16384), TILE, (0.25, 0.1)),
        (linear(2048, 16384), (128, 128), (0.25, 0.1)),
        (linear(320, 16384), TILE, (0.25, 0.1)),
        (linear(2048, 4096), TILE, (0.25, 0.1)),
        (linear(640, 4096), TILE, (0.25, 0.1)),
        (linear(320, 4096), TILE, (0.25, 0.1)),
    ],
    [
        (conv(20, 2, 4, out=24), TILE, (0.5,)),
        (conv(20, 1, 4, stride=2), "row", (0.3,)),
        (linear(40, 24), TILE, (0.5,)),
    ],
)


def is_headline(layer: Layer, block: object, density: float) -> bool:
    """The races that were promised: tiles of wide layers over many positions, where few of them are active."""
    positions = math.prod(layer.size)
    wide = layer.shape[1] == 1280 if layer.is_linear else layer.shape[2:] == (3, 3) and layer.stride == 1
    return wide and positions >= (16384 if layer.is_linear else 4096) and block != "row" and density < 0.3


@pytest.mark.parametrize("layer, block, densities", RACES, ids=str)
def bench_weight_grad(benchmark, machine, limits, layer, block, densities):
    if reason := triton_kernels.why_not():
        pytest.skip(reason)
    sets, masks = layer.sets(), layer.masks(block, densities)
    truth = layer.truth(sets[0])
    dense = [layer.dense(*operands) for operands in sets]
    assert_near(dense[0](), truth, TOLERANCE["theirs"])
    contestants = {"dense": machine.burst(dense)}
    for density, mask in masks.items():
        problems = [layer.problem(operands, mask) for operands in sets]
        expected = mask.gather(truth, problems[0].channels_last)
        for way, function in WAYS.items():
            got = function(problems[0])
            assert got.shape == mask.compact_shape
            assert_near(got, expected.view(got.shape), TOLERANCE["ours" if way == "triton" else "theirs"])
            calls = [functools.partial(function, problem) for problem in problems]
            contestants[f"{LABELS[way]} {density}"] = machine.burst(calls)
        if not (mask.is_full or mask.grid.is_rows):
            gathered = [Gathered(layer, operands, mask) for operands in sets]
            gathered[0].check(truth)
            contestants[f"gather + {layer.library} {density}"] = machine.burst(gathered)
    seconds = race(contestants, rounds=11)
    benchmark.pedantic(contestants["dense"], rounds=1)

    for density, mask in masks.items():
        add_rows(layer, block, density, layer.problem(sets[0], mask), contestants, seconds, limits)


def add_rows(layer, block, density, problem, contestants: dict[str, Burst], seconds, limits) -> None:
    """Ours against the dense gradient, and against the best of the other ways; which way the library takes."""
    cost, dense = costs.masked_weight_grad(problem), costs.dense_weight_grad(problem)
    tiles, splits = launched(problem)
    ours = seconds[f"triton {density}"]
    l2 = costs.weight_grad_l2_bytes(problem, tiles, splits)
    launch = f"tiles {tiles.block_m}x{tiles.block_n}, {splits} splits"
    share = f"{limits.share(cost, ours, l2)}; {launch}; {choose_way(problem).used} is taken"
    name = block if isinstance(block, str) else "x".join(map(str, block))
    work = f"{cost.flops / 1e9:.2f} : {dense.flops / 1e9:.2f} GFLOP"
    others = {c.rsplit(" ", 1)[0]: c for c in contestants if c.endswith(f" {density}") and not c.startswith("triton")}
    best = min(others, key=lambda other: seconds[others[other]])
    for against, key in [(f"{layer.library} dense", "dense"), *((other, others[other]) for other in others)]:
        eager = "" if REHEARSAL or contestants[key].captured else ", waits for the host"
        spreads = {"ours_spread": ours.spread, "theirs_spread": seconds[key].spread}
        headline = is_headline(layer, block, density) and (key == "dense" or against == best)
        times = 1e3 * ours, 1e3 * seconds[key]
        record(Row(f"{layer}, {name}", against + eager, density, *times, work, share, headline, **spreads))
