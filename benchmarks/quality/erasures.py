"""What a further erasure costs from a distilled generator, against one dense run from the teacher to the same target.

    python benchmarks/quality/erasures.py --out build/quality/erasures.json

Target: lower bounds of unlearning and retain accuracy of 0.95, twice in a row, and a Fréchet distance of at most 1.3
times the distilled generator's. Masks and checks are in the seconds. Requests and dense runs take turns.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pecker_fast import BlockMask, Delta, DistillConfig, MaskConfig, MaskedDistiller, StopCheck, StopRule
from pecker_fast.demo import DemoConfig, versions
from pecker_fast.digits_task import (
    SCHEDULE,
    Evaluator,
    evaluate_images,
    load_data,
    load_distilled,
    load_judge,
    load_teacher,
)
from pecker_fast.sampling import one_step_sample
from pecker_fast.score_model import predictor

sys.path.append(str(Path(__file__).parents[1]))

from backends import fast_only  # noqa: E402

CLASSES, SEEDS = (7, 5), (0, 1)
RULE = StopRule(ua=0.95, retain=0.95)
FARTHER = 1.3
"""Fréchet distance of the target over the distilled generator's."""
MOST = {"request": 150, "dense": 400}
EVERY = {"request": 5, "dense": 20}
STACKED = (7, 5, 2)
"""Three erasures, one after the other, whose deltas are then applied in every combination."""


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    teacher: nn.Module
    generator: nn.Module
    fake_score: nn.Module
    judge: Any
    data: Any

    def evaluator(self, forget: tuple[int, ...]) -> Evaluator:
        """The judge of a run."""
        return Evaluator(self.judge, self.data, forget, 100)

    def distance(self, generator: nn.Module, forget: tuple[int, ...]) -> dict[str, Any]:
        """What the judge says of a generator that is no distiller's."""
        labels = torch.arange(10).repeat_interleave(100)
        noise = torch.randn((len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(1234))
        predict = lambda x, t, c: predictor(generator)(generator, x, t, c)  # noqa: E731
        with torch.no_grad():
            images = one_step_sample(predict, SCHEDULE, noise, labels, t_init=500)
        return evaluate_images(images, labels, self.judge, self.data, forget)


def settings(forget: tuple[int, ...], seed: int, mask: MaskConfig, **changes: Any) -> DistillConfig:
    """The demonstration's, with other masks and switches."""
    common = DemoConfig(forget=forget, seed=seed).distill_config("dense")
    keep = ("forget", "override", "num_classes", "sample_shape", "batch_size", "forget_batch_size", "clip_value")
    keep += ("generator_lr", "fake_score_lr", "warmup_steps", "sid_alpha", "t_init", "t_min", "t_max", "forget_weight")
    return DistillConfig(**({name: getattr(common, name) for name in keep} | {"seed": seed, "mask": mask} | changes))


def request(forget: tuple[int, ...], seed: int) -> DistillConfig:
    """A short masked run from the distilled generator."""
    mask = MaskConfig(kind="random", density=0.25, block="row", lr_scale="mass")
    return settings(forget, seed, mask, preset="fast", ema_decay=0.9, warmup_steps=5)


def dense(forget: tuple[int, ...], seed: int, factor: float = 1.0, ema_decay: float = 0.98) -> DistillConfig:
    """The published recipe, all in one stage; ``factor`` multiplies both learning rates."""
    mask = MaskConfig(kind="dense")
    made = settings(forget, seed, mask, preset="published", forget_batch_size=64, ema_decay=ema_decay)
    rates = {"generator_lr": factor * made.generator_lr, "fake_score_lr": factor * made.fake_score_lr}
    return replace(made, **rates)


def to_target(distiller: MaskedDistiller, bench: Bench, kind: str, farthest: float, **given: Any) -> dict[str, Any]:
    """Run until the target is met, or ``MOST`` steps are done; seconds with and without checks."""
    forget, seed = distiller.config.forget, distiller.config.seed
    evaluator, check = bench.evaluator(forget), StopCheck(RULE, bench.judge, forget, seed=seed)
    started = time.perf_counter()
    mask = distiller.build_mask(**given)
    checking, met, figures = 0.0, False, {}
    for step, _ in enumerate(distiller.run(MOST[kind], progress=False), 1):
        if step % EVERY[kind] == 0:
            before = time.perf_counter()
            if check(distiller).stop:
                figures = evaluator(distiller)
                met = figures["frechet_distance"] <= farthest
            checking += time.perf_counter() - before
            if met:
                break
    seconds = time.perf_counter() - started
    final = replace(evaluator, samples=300)(distiller)
    return {"kind": kind, "forget": list(forget), "seed": seed, "met": met, "steps": distiller.steps_done} | {
        "seconds": seconds,
        "checking": checking,
        "density": mask.density,
        "final": final,
    }


def race(bench: Bench, **of_dense: float) -> list[dict[str, Any]]:
    """Requests and dense runs, in turns."""
    lines = []
    for forget, seed in tqdm([((label,), seed) for seed in SEEDS for label in CLASSES], desc="erasures", unit="pair"):
        start = bench.distance(bench.generator, forget)["frechet_distance"]
        farthest = FARTHER * start
        contestants = {
            "request": MaskedDistiller(
                bench.teacher,
                SCHEDULE,
                request(forget, seed),
                generator=bench.generator,
                fake_score=bench.fake_score,
            ),
            "dense": MaskedDistiller(bench.teacher, SCHEDULE, dense(forget, seed, **of_dense)),
        }
        lines += [
            to_target(distiller, bench, kind, farthest) | {"start": start} for kind, distiller in contestants.items()
        ]
    return lines


def stack(bench: Bench) -> list[dict[str, Any]]:
    """Three requests one after the other, and what the judge says of every subset of their deltas."""
    generator, masks, deltas, met = bench.generator, list[BlockMask](), list[Delta](), list[bool]()
    for number, label in enumerate(STACKED):
        config = request((*STACKED[:number], label), seed=0)
        distiller = MaskedDistiller(bench.teacher, SCHEDULE, config, generator=generator, fake_score=bench.fake_score)
        farthest = FARTHER * bench.distance(bench.generator, config.forget)["frechet_distance"]
        met.append(to_target(distiller, bench, "request", farthest, exclude=masks)["met"])
        with distiller.averaged() as averaged:
            delta = Delta.extract(distiller.base, averaged, distiller.mask, name=f"forget {label}", progress=False)
        masks.append(distiller.mask)
        deltas.append(delta)
        generator = applied(bench.generator, deltas)
    lines = []
    for count in range(len(STACKED) + 1):
        for subset in itertools.combinations(range(len(STACKED)), count):
            forms = [applied(bench.generator, [deltas[i] for i in order]) for order in itertools.permutations(subset)]
            alike = all(_equal(forms[0], form) for form in forms)
            line = {"deltas": [STACKED[i] for i in subset], "met": [met[i] for i in subset], "same_in_any_order": alike}
            lines.append(line | accuracies(bench, forms[0]))
    return lines


def applied(generator: nn.Module, deltas: list[Delta]) -> nn.Module:
    """A copy with these deltas, which it knows that it carries."""
    model = copy.deepcopy(generator).eval()
    for delta in deltas:
        delta.apply(model, progress=False)
    return model


def accuracies(bench: Bench, generator: nn.Module) -> dict[str, Any]:
    """Share of each class's images that the judge takes for that class."""
    recognised = {}
    for label in range(10):
        retained = tuple(other for other in range(10) if other != label)
        recognised[label] = bench.distance(generator, retained)["retain_accuracy"] if label in STACKED else None
    others = bench.distance(generator, STACKED)
    return {
        "recognised": {label: share for label, share in recognised.items() if share is not None},
        "others": others["retain_accuracy"],
        "frechet_distance": others["frechet_distance"],
    }


def _equal(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@fast_only()
def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dense_factor", type=float, default=1.0, help="of the dense run's learning rates (1)")
    parser.add_argument("--dense_ema_decay", type=float, default=0.98, help="of its running average (0.98)")
    options = parser.parse_args()
    generator, fake_score = load_distilled(progress=True)
    bench = Bench(load_teacher(progress=True), generator, fake_score, load_judge(progress=True), load_data())
    results: dict[str, Any] = {
        "versions": versions(),
        "race": race(bench, factor=options.dense_factor, ema_decay=options.dense_ema_decay),
    }
    options.out.write_text(json.dumps(results, indent=1))  # the race is there whatever comes of the rest
    options.out.write_text(json.dumps(results | {"stack": stack(bench)}, indent=1))


if __name__ == "__main__":
    main()
