"""One real iteration on the UNet of Stable Diffusion 1.x, on a CPU: peak of torch's allocator against the estimate.

    python benchmarks/step_text_to_image.py  # writes benchmarks/results/cpu/text_to_image_peak.json; minutes, 16 GB

Random weights; bfloat16, rows 0.1 of both networks, checkpointing, 4 retained and 4 forgotten prompts by twos.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import text_to_image
import torch
from allocator import allocated
from backends import fast_only
from machines import here
from text_to_image import MASKED_LEAN

from pecker_fast import MaskedDistiller
from pecker_fast.memory_estimate import estimate_memory

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "text_to_image_peak.json"
NEAR = 0.1


def run(batch_size: int) -> tuple[MaskedDistiller, float]:
    """A distiller that is made and steps once, and the seconds of the step."""
    unet = text_to_image.make_unet(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():  # small, so that nothing overflows where norms have random scales too
        weight.data.normal_(0, 0.02, generator=generator)
    distiller = text_to_image.make(MASKED_LEAN, unet, batch_size)
    started = time.perf_counter()
    distiller.step()
    return distiller, time.perf_counter() - started


@fast_only()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    peak, held, (distiller, seconds) = allocated(lambda: run(options.batch_size))
    estimate = estimate_memory(distiller)
    results = {
        "what": MASKED_LEAN.name,
        "batch_size": options.batch_size,
        "peak": {"allocated": peak, "estimated": estimate.peak},
        "held": {"allocated": held, "estimated": estimate.held},
        "seconds": seconds,
        "machine": here().name,
        "versions": {"torch": torch.__version__},
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    if abs(estimate.peak / peak - 1) > NEAR:
        raise SystemExit(f"peak: estimated {estimate.peak:,}, allocated {peak:,}: more than {NEAR:.0%} apart")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
