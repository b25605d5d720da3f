"""Seconds of a step of every arm, all in turn on a quiet machine, and of its masks: for runs at equal seconds.

python benchmarks/quality/seconds.py --out build/quality/seconds.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from arms import STUDIES
from tqdm import tqdm

from pecker_fast import MaskedDistiller
from pecker_fast.demo import versions
from pecker_fast.digits_task import SCHEDULE, load_teacher

sys.path.append(str(Path(__file__).parents[1]))

from backends import fast_only  # noqa: E402

ROUNDS, STEPS = 5, 3


@fast_only()
def main() -> None:
    """Time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    teacher = load_teacher(progress=True)
    arms = [arm for study in STUDIES.values() for arm in study]
    distillers, masks = {}, {}
    for arm in tqdm(arms, desc="masks", unit="arm"):
        distillers[arm.name] = MaskedDistiller(teacher, SCHEDULE, arm.config((0,), 0))
        started = time.perf_counter()
        distillers[arm.name].build_mask()
        masks[arm.name] = time.perf_counter() - started
        distillers[arm.name].step()
    times: dict[str, list[float]] = {name: [] for name in distillers}
    for _ in tqdm(range(ROUNDS), desc="rounds", unit="round"):
        for name, distiller in distillers.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                distiller.step()
            times[name].append((time.perf_counter() - started) / STEPS)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    facts = {"versions": versions(), "threads": torch.get_num_threads(), "seconds_of_a_step": medians}
    facts["seconds_of_the_masks"] = masks
    options.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
