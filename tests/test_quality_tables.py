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


def machine(*arms):
    return {"seconds_of_a_step": dict.fromkeys(arms, 1.0), "seconds_of_the_masks": dict.fromkeys(arms, 0.0)}


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(tables, "EQUAL_SECONDS", 20)


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
    never = [point(10, ua=0), point(20, ua=0)]
    lost = [line("dense", factor=1.0, fd=1.0, points=never), line("dense", factor=2.0, fd=3.0)]
    assert tuning.best_factors(lost) == {"dense": 2.0}


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
    same = [line("same", seed=seed, fd=2.0 + 0.01 * seed) for seed in range(3)]
    results = {"machine": machine("published", "worse", "noisy", "same"), "masked": []}
    results["switches"] = [*published, *worse, *noisy, *same]
    assert tables.verdicts(results) == {"worse": False, "noisy": True, "same": True}
    table = tables.switches(results)
    assert "| worse | 1.00 | 1.00 | 20 | 100.0% | 100.0% | 1.50x" in table
    assert "hurts distance at equal steps, distance at equal seconds |" in table
    assert "| no harm shown |" in table and "| harmless |" in table  # a wide interval shows nothing


def test_masks_are_in_the_equal_seconds():
    results = {"machine": machine("published", "quick")}
    results["machine"]["seconds_of_a_step"]["quick"] = 0.5
    results["machine"]["seconds_of_the_masks"]["quick"] = 15.0
    assert tables.equal_steps(results, "published") == 20.0 and tables.equal_steps(results, "quick") == 10.0
    with pytest.raises(ValueError, match="40 steps are needed, the runs have 20"):
        tables.distance([(line(), line())], 40.0)


def test_masks_have_targets_of_their_own():
    published = [line("published", seed=seed, fd=2.0) for seed in range(3)]
    late = [point(10, ua=0.5), point(20, ua=0.5), point(30)]
    made = {"sparse": {"fd": 2.9}, "far": {"fd": 3.1}, "late": {"points": late}, "half": {"fd": 2.9, "density": 0.5}}
    made["bad"] = {"points": [point(10, ua=0.5, ra=0.8), point(20)]}
    masked = [line(arm, seed=seed, **more) for arm, more in made.items() for seed in range(3)]
    results = {"machine": machine("published", *made), "switches": published, "masked": masked}
    assert tables.verdicts(results) == {"sparse": True, "far": False, "late": False, "half": False, "bad": False}
    assert "targets met: no: retained |" in tables.masked(results)


def test_erasures_are_compared_pair_by_pair():
    def run(kind, seed, seconds):
        made = {"kind": kind, "forget": [7], "seed": seed, "met": True, "steps": 20, "seconds": seconds, "start": 2.0}
        return made | {"checking": seconds / 2, "final": point(20)}

    race = [run(kind, seed, times * (1 + seed)) for kind, times in (("request", 1), ("dense", 8)) for seed in range(3)]
    table = tables.erasures({"erasures": {"race": race}})
    assert "A request takes **8.0x** less time (8.0 to 8.0), 8.0x without the checks" in table


@pytest.mark.parametrize("study", arms.STUDIES)
def test_every_arm_makes_a_config(study):
    for arm in arms.STUDIES[study]:
        config = arm.tuned(2.0).config((7,), 3)
        assert (config.forget, config.seed, config.batch_size) == ((7,), 3, arms.BATCH)
        if "fast" in arm.name:
            assert config.forget_samples == arms.BATCH // 8
        if "published" in arm.name:
            assert not config.merge_batches and config.forget_samples == arms.BATCH
        assert config.generator_lr == config.fake_score_lr == 2 * arms.LR
