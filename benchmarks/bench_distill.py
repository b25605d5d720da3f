"""An iteration of the distiller on the DDPM UNet of CIFAR-10: counted FLOPs, wall-clock and memory against dense runs.

Every row names its whole setting: preset, mask, batch. Active is a tenth of all weights of the model: rows in the
decoder of generator and fake score, whose norms are frozen (what they would cost is a figure of its own), or rows
anywhere. Dense runs train every weight with the same optimizer, which at density 1 is as fast as torch's fused AdamW
(bench_masked_adamw.py). On a GPU the race is that of gpu/bench_distillation.py.
"""

from __future__ import annotations

from dataclasses import replace

import distillers
import pytest
import torch
from distillers import (
    EXACT,
    EXACT_BOTH,
    EXACT_DENSE,
    EXACT_GENERATOR,
    EXACT_NORMS,
    EXACT_SALIENCY,
    FAST,
    FAST_DENSE,
    PUBLISHED,
    REUSED,
    Masks,
    Setting,
)
from measure import Figure, race, record

FLOPS_AT_MOST = {EXACT: 0.77, REUSED: 0.69, FAST: 0.43}
"""Shares of the published iteration; arithmetic, not time."""
BATCH = 128
"""Retained samples of an iteration that is counted."""
STATE_AT_MOST = 0.5
RACES = [
    (EXACT, PUBLISHED, "target 1.2x"),
    (FAST, PUBLISHED, "target 2.0x"),
    (EXACT, EXACT_DENSE, "target 1.15x"),
    (EXACT_SALIENCY, PUBLISHED, ""),
    (EXACT_GENERATOR, PUBLISHED, ""),
    (EXACT_GENERATOR, EXACT_DENSE, ""),
]
ROUNDS = 3


@pytest.fixture(scope="module")
def masks(device: torch.device) -> Masks:
    return Masks(distillers.make_network(device))


def bench_distill_flops(benchmark, masks):
    published = distillers.make(PUBLISHED, masks, batch_size=BATCH).flops()
    forward = published["true_score"]["forward"] / 2  # F: one network on the retained samples
    assert abs(published["total"] / forward / 22 - 1) <= 0.01
    against = f"{PUBLISHED.name}, {published['total'] / forward:.1f}F"
    shares = {}
    for setting in (EXACT, EXACT_NORMS, REUSED, FAST, EXACT_SALIENCY, EXACT_BOTH, EXACT_GENERATOR):
        total = distillers.make(setting, masks, batch_size=BATCH).flops()["total"]
        shares[setting] = total / published["total"]
        aim = f", at most {FLOPS_AT_MOST[setting]}" if setting in FLOPS_AT_MOST else ""
        unit = f"TFLOP ({shares[setting]:.3f}{aim})"
        density = masks[setting].density
        what = f"distill FLOPs: {setting.name}, {total / forward:.1f}F"
        record(Figure(what, against, density, total / 1e12, published["total"] / 1e12, unit))
    benchmark.pedantic(lambda: None, rounds=1)  # nothing is timed
    benchmark.extra_info.update({setting.name: share for setting, share in shares.items()})
    for setting, most in FLOPS_AT_MOST.items():
        assert shares[setting] <= most, f"{setting.name}: {shares[setting]:.4f}"


def state_bytes(setting: Setting, masks: Masks) -> int:
    distiller = distillers.make(setting, masks, batch_size=1)
    distiller.step()  # only then is there optimizer state
    return distillers.bytes_of(distiller)


def bench_distill_state(benchmark, masks):
    """Weights of three networks, gradients, second moments, running average: all tensors a distiller holds."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (state_bytes(replace(setting, dtype=dtype), masks) for setting in (EXACT, EXACT_DENSE))
        shares[dtype] = ours / theirs
        aim = f", at most {STATE_AT_MOST}" if dtype == torch.float32 else ""
        what = f"distill training state: {EXACT.name}, networks {str(dtype).removeprefix('torch.')}"
        unit = f"MB ({shares[dtype]:.3f}{aim})"
        record(Figure(what, EXACT_DENSE.name, masks[EXACT].density, ours / 1e6, theirs / 1e6, unit))
    benchmark.pedantic(lambda: None, rounds=1)  # nothing is timed
    assert shares[torch.float32] <= STATE_AT_MOST


def bench_distill_step(benchmark, masks, matmul_rate, device):
    if device.type == "cuda":
        pytest.skip("gpu/bench_distillation.py has the race on a GPU")
    for masked, dense in ((EXACT, PUBLISHED), (FAST, FAST_DENSE), (EXACT_SALIENCY, PUBLISHED), (EXACT_BOTH, PUBLISHED)):
        distillers.check(masked, dense, masks)
    made = {setting: distillers.make(setting, masks) for *pair, _ in RACES for setting in pair}
    flops = {setting: distiller.flops()["total"] for setting, distiller in made.items()}
    seconds = race({setting: distiller.step for setting, distiller in made.items()}, rounds=ROUNDS, clock="wall")
    benchmark.pedantic(made[FAST].step, rounds=1)
    for ours, theirs, target in RACES:
        density = masks[ours].density
        row = distillers.speed_row(ours, theirs, density, seconds, flops, matmul_rate, target)
        record(row)
        benchmark.extra_info[f"{row.what} against {row.against}"] = row.ratio
