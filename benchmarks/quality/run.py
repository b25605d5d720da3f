"""Distil every arm of a study on digits and write what came out, one JSON line a run; lines that are there stay.

    python benchmarks/quality/run.py tuning --out build/quality/tuning.jsonl
    python benchmarks/quality/run.py switches --tuning build/quality/tuning.jsonl --out build/quality/switches.jsonl
    (and so "masked" and "density")

Two processes share a study with ``--part 0/2`` and ``--part 1/2``, each with a file of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import BOTH, FACTORS, PUBLISHED, REFERENCE, REPORTED, REPORTED_SEEDS, STUDIES, TUNED_ON, TUNING_SEED, Arm
from tqdm import tqdm
from tuning import best_factors

from pecker_fast import MaskedDistiller
from pecker_fast.digits_task import SCHEDULE, Evaluator, load_data, load_judge, load_teacher

sys.path.append(str(Path(__file__).parents[1]))

from backends import fast_only  # noqa: E402

STEPS = 100
EVALUATED = (*range(5, 61, 5), *range(70, 101, 10))


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: Arm
    forget: tuple[int, ...]
    seed: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"arm": self.arm.name, "factor": self.arm.factor, "forget": list(self.forget), "seed": self.seed}


def jobs(study: str, tuning: Path | None) -> list[Job]:
    """All runs of a study, seed by seed, so that a study that is cut short is even."""
    if study == "tuning":
        tried = [
            arm
            for name in ("switches", "masked", "density")
            for arm in STUDIES[name]
            if arm.name in (arm.tuned_as, PUBLISHED)
        ]
        arms = [arm.tuned(factor) for arm in tried for factor in FACTORS]
        return [Job(arm, TUNED_ON, TUNING_SEED, STEPS) for arm in arms]
    if tuning is None:
        raise SystemExit(f"{study}: give --tuning, the file that 'tuning' wrote")
    factors = best_factors(read(tuning), REFERENCE)
    arms = [arm.tuned(factors[arm.tuned_as]) for arm in STUDIES[study]]
    runs = [(forget, seed) for seed in REPORTED_SEEDS for forget in REPORTED]
    runs += [] if study == "density" else [(BOTH, REPORTED_SEEDS[0])]
    return [Job(arm, forget, seed, STEPS) for forget, seed in runs for arm in arms]


def run(job: Job, teacher: torch.nn.Module, evaluator: Evaluator) -> dict[str, Any]:
    """One line: settings, and what the judge said on the way."""
    config = job.arm.config(job.forget, job.seed)
    distiller = MaskedDistiller(teacher, SCHEDULE, config)
    started = time.perf_counter()
    mask = distiller.build_mask()
    mask_seconds = time.perf_counter() - started
    seconds, curve, started = 0.0, [], time.perf_counter()
    for step, _ in enumerate(distiller.run(job.steps, progress=False), 1):
        seconds += time.perf_counter() - started
        if step in EVALUATED or step % 20 == 0 or step == job.steps:
            curve.append({"step": step, **evaluator(distiller)})
        started = time.perf_counter()
    final = replace(evaluator, samples=3 * evaluator.samples)(distiller)
    return {
        **job.key,
        "density": mask.density,
        "mass": mask.mass,
        "fake_score_density": distiller.fake_score_mask.density,
        "generator_lr": config.generator_lr * distiller.lr_scale,
        "fake_score_lr": config.fake_score_lr * distiller.fake_score_lr_scale,
        "flops": distiller.flops(job.steps),
        "mask_seconds": mask_seconds,
        "seconds": seconds,
        "curve": curve,
        "final": final,
        "config": config.to_dict(),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(all_jobs: Iterable[Job], done: list[dict[str, Any]]) -> Iterator[Job]:
    """Jobs without a line."""
    keys = [{name: line[name] for name in ("arm", "factor", "forget", "seed")} for line in done]
    return (job for job in all_jobs if job.key not in keys)


@fast_only()
def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("tuning", *STUDIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tuning", type=Path)
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data, judge, teacher = load_data(), load_judge(progress=True), load_teacher(progress=True)
    mine = jobs(options.study, options.tuning)[part::parts]
    for job in tqdm(list(missing(mine, read(options.out))), desc=options.study, unit="run"):
        line = run(job, teacher, Evaluator(judge, data, job.forget, 100))
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
