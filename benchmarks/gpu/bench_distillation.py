"""An iteration of the distiller, batch 128, networks in bfloat16 and compiled: masked against dense.

Compiling takes most of the time, so every pair races as soon as it is there. FLOPs are those of the iteration that is
not compiled: the compiler's computes input gradients of frozen skips besides.
"""

from __future__ import annotations

from dataclasses import replace

import distillers
import pytest
import torch
from distillers import EXACT, EXACT_DENSE, FAST, PUBLISHED, Masks, Setting
from machines import sized
from measure import Figure, race, record

COMPILED = {"dtype": sized(torch.bfloat16, torch.float32), "compiled": True}
RACES = [
    (replace(EXACT, **COMPILED), replace(EXACT_DENSE, **COMPILED), "target 1.20x"),
    (replace(FAST, **COMPILED), replace(PUBLISHED, **COMPILED), "target 1.8x"),
    (replace(FAST, **COMPILED), PUBLISHED, "engineering, target 4x"),
    (replace(EXACT, **COMPILED), PUBLISHED, "engineering"),
]


@pytest.fixture(scope="module")
def masks(machine) -> Masks:
    return Masks(distillers.make_network(machine.device))


def bench_distill_step(benchmark, machine, limits, masks):
    for masked, dense in ((EXACT, PUBLISHED), (FAST, distillers.FAST_DENSE)):
        distillers.check(masked, dense, masks)
    steps, flops, held = {}, {}, {}

    def step_of(setting: Setting):
        distiller = distillers.make(setting, masks)
        flops[setting] = distillers.iteration_flops(distiller, flops)
        return distiller.step

    for ours, theirs, target in RACES:
        for setting in (ours, theirs):
            if setting not in steps:
                steps[setting], held[setting] = machine.footprint(lambda setting=setting: step_of(setting))
        seconds = race({setting: steps[setting] for setting in (ours, theirs)}, rounds=15, clock="wall")
        density = masks[ours].density
        record(distillers.speed_row(ours, theirs, density, seconds, flops, limits.matmul, target))
        joules = [machine.joules(steps[setting], seconds[setting]) for setting in (ours, theirs)]
        record(Figure(f"distill: {ours.whole}", theirs.whole, density, *joules, "J a step"))
        record(Figure(f"distill: {ours.whole}", theirs.whole, density, held[ours], held[theirs], "bytes at most"))
    benchmark.pedantic(steps[RACES[0][0]], rounds=1)
