"""The statistics behind docs/quality.md, on made-up runs whose answer is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))

import arms  # noqa: E402
import statistics_of_runs  # noqa: E402
import tables  # noqa: E402
import tuning  # noqa: E402


def point(step, ua=1.0, ra=1.0, fd=2.0):
    return {"step": step, "unlearning_accuracy": ua, "retain_accuracy": ra, "frechet_distance": fd}


def line(arm="a", seed=0, factor=1.0, fd=2.0, points=None, **other):
    curve = points or [point(10, ua=0.5), point(20, fd=fd)]
    made = {"arm": arm, "factor": factor, "forget": [7], "seed": seed, "curve": curve, "final": point(20, fd=fd)}
    return made | {"density": 0.1, "mass": None, "generator_lr": 1.0, "flops": {"step": 10}} | other


def test_the_target_must_be_kept():
    assert tuning.steps_to_target([point(5, ua=0.9), point(10), point(15)]) == 10
    assert tuning.steps_to_target([point(5), point(10, ra=0.8), point(15)]) == 15
    assert tuning.steps_to_target([point(5), point(10, ua=0.9)]) == math.inf


def test_the_best_factor_is_near_and_quick():
    slow = [point(10, ua=0.5), point(20, ua=0.5), point(30)]
    lines = [line("dense", factor=1.0, fd=3.0), line("dense", factor=2.0, fd=2.5)]
    lines += [line("m", factor=1.0, fd=1.0, points=slow), line("m", factor=2.0, fd=4.0), line("m", factor=4.0, fd=5.0)]
    lines += [line("n", factor=1.0, points=slow), line("n", factor=2.0, points=[point(10, ua=0), point(20, ua=0)])]
    assert tuning.best_factors(lines) == {"dense": 2.0, "m": 2.0, "n": 1.0}


def test_intervals():
    found = statistics_of_runs.interval([1.0, 2.0, 3.0])
    assert found.value == 2.0 and found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    times = statistics_of_runs.ratio([2.0, 8.0], [1.0, 4.0])
    assert times == pytest.approx((2.0, 2.0, 2.0))
    assert statistics_of_runs.at(line(), 15, "unlearning_accuracy") == 0.75
    assert statistics_of_runs.at(line(), 99, "unlearning_accuracy") == 1.0


def test_verdicts_say_what_hurts():
    published = [line("published", seed=seed, fd=2.0 + 0.01 * seed) for seed in range(3)]
    worse = [line("worse", seed=seed, fd=3.0 + 0.01 * seed) for seed in range(3)]
    noisy = [line("noisy", seed=seed, fd=fd) for seed, fd in enumerate((1.0, 4.0, 2.1))]
    seconds = {"published": 1.0, "worse": 1.0, "noisy": 0.5}
    results = {"machine": {"seconds_of_a_step": seconds}, "switches": [*published, *worse, *noisy], "masked": []}
    found = tables.verdicts(results)
    assert found["worse"].startswith("hurts distance at equal steps") and found["noisy"] == "harmless"
    table = tables.switches(results)
    assert "| worse | 1.00 | 1.00 | 20 | 100.0% | 100.0% | 1.50x" in table


@pytest.mark.parametrize("study", arms.STUDIES)
def test_every_arm_makes_a_config(study):
    for arm in arms.STUDIES[study]:
        config = arm.tuned(2.0).config((7,), 3)
        assert (config.forget, config.seed, config.batch_size) == ((7,), 3, arms.BATCH)
        if "fast" in arm.name:
            assert config.reuse_generator_forward and config.forget_samples == arms.BATCH // 4
        if "published" in arm.name:
            assert not config.merge_batches and config.forget_samples == arms.BATCH
        assert config.generator_lr == config.fake_score_lr == 2 * arms.LR
