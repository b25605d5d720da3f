"""An iteration on Stable Diffusion 1.x's UNet in bfloat16, batch 1, 4 and 16: rows 0.1 of both networks against dense.

Both are eager and channels-last, with attention as torch chooses it, and follow the same recipe with every exact switch
on; the dense run trains all weights with the same optimizer, which at density 1 is as fast as torch's fused AdamW. At
batch 16 both take micro-batches of 8: the dense one would not fit otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import distillers
import pytest
import text_to_image
from machines import sized
from measure import Figure, Row, race, record
from text_to_image import DENSE, DENSE_LEAN, DENSITY, MASKED, MASKED_LEAN, Setting

from pecker_fast.memory_estimate import estimate_memory

pytest.importorskip("diffusers", reason="part sd needs diffusers (no weights, no network), which cannot be imported")

MICRO = {"micro_batch_size": 8}
RACES = [
    (1, MASKED, DENSE, "target 1.5x"),
    (4, MASKED, DENSE, "target 1.25x"),
    (4, MASKED_LEAN, DENSE_LEAN, ""),
    (16, replace(MASKED, switches=MICRO), replace(DENSE, switches=MICRO), ""),
][sized(slice(None), slice(1))]
TOLERANCE = sized(0.05, 1e-3)
"""Of all gradients of a network together, relative: 16-bit products of two orders of additions."""


def bench_text_to_image_step(benchmark, machine, limits):
    check(machine)
    flops: dict[str, int] = {}
    for setting in (MASKED, DENSE):
        flops[setting.where] = distillers.iteration_flops(made(setting, machine, 1), flops)
    for batch, ours, theirs, target in RACES:
        steps, held, expected = {}, {}, {}
        for setting in (ours, theirs):
            build = functools.partial(stepping, setting, machine, batch, expected)
            steps[setting], held[setting] = machine.footprint(build)
        seconds = race(steps, rounds=7, clock="wall")
        done = [batch * flops[setting.where] for setting in (ours, theirs)]
        record(row(batch, ours, theirs, seconds, done, limits.matmul, target))
        what = f"sd: {ours.name}, batch {batch} + {batch}"
        record(Figure(what, theirs.name, DENSITY, held[ours], held[theirs], "bytes at most"))
        estimate = expected[ours] if isinstance(held[ours], int) else held[ours]
        record(Figure(f"{what}, estimated", "measured", DENSITY, estimate, held[ours], "bytes at most"))
    benchmark.pedantic(steps[ours], rounds=1)


def made(setting: Setting, machine, batch: int):
    """A distiller with a network of its own."""
    dtype = sized(text_to_image.BFLOAT16, text_to_image.FLOAT32)
    return text_to_image.make(setting, text_to_image.make_unet(machine.device, dtype), batch)


def stepping(setting: Setting, machine, batch: int, expected: dict):
    """Its step; what memory it should take is noted if it is masked."""
    distiller = made(setting, machine, batch)
    if setting.where != "dense":
        expected[setting] = estimate_memory(distiller).step
    return distiller.step


def check(machine) -> None:
    """The gradients of an iteration are those of the dense one at the active blocks, in both networks."""
    still = {"fake_score_lr": 1e-30, "generator_lr": 1e-30}  # so that both generators meet the same fake score
    found = []
    for setting in (MASKED, DENSE):
        distiller = made(replace(setting, switches=still), machine, 1)
        distiller.step()
        found.append((distiller.active, distiller.fake_score_optimizer.active))
    for ours, theirs in zip(*found, strict=True):
        error = distillers.relative_error(ours, theirs)
        assert error <= TOLERANCE, f"gradients of {type(ours.model).__name__}: relative error {error:.2g}"


def row(batch: int, ours: Setting, theirs: Setting, seconds, flops, matmul_rate: float, target: str) -> Row:
    mine, other = flops
    share = f"{mine / seconds[ours] / matmul_rate:.0%} of matmul"
    return Row(
        f"sd: {ours.name}, batch {batch} + {batch}",
        theirs.name,
        DENSITY,
        1e3 * seconds[ours],
        1e3 * seconds[theirs],
        f"{mine / 1e12:.3g} : {other / 1e12:.3g} TFLOP ({mine / other:.3f})",
        ", ".join(filter(None, (share, target))),
        headline=bool(target),
        ours_spread=seconds[ours].spread,
        theirs_spread=seconds[theirs].spread,
    )
