"""The parts of a comparison that need no network: plan, lines, tuning, statistics, tables."""

from __future__ import annotations

import json
import math

import pytest

from pecker_fast.compare import falsification, statistics, tables, timing
from pecker_fast.compare.methods import DEFAULT, methods
from pecker_fast.compare.plan import Job, Plan, marks, missing
from pecker_fast.compare.results import Results, selected
from pecker_fast.compare.store import RUNS, Store
from pecker_fast.compare.tuning import best_factors
from pecker_fast.errors import FileFormatError

KNOWN = methods()


def plan(**changes):
    given = {"methods": DEFAULT, "forget": (7,), "seeds": (0, 1), "tuning_forget": (0,), "tuning_seeds": (9,)}
    return Plan(**{**given, "factors": (1.0, 2.0), "steps": 100, "samples": 10, **changes})


# -- plan ------------------------------------------------------------------------------------------


def test_every_method_is_tuned_on_the_same_grid_with_other_seeds():
    jobs = plan().tuning(KNOWN)
    assert {(job.method, job.factor) for job in jobs} == {(name, factor) for name in DEFAULT for factor in (1.0, 2.0)}
    assert {job.forget for job in jobs} == {(0,)} and {job.seed for job in jobs} == {9}


def test_a_shared_rate_is_that_of_sfd_and_training_from_scratch_has_its_own():
    asked = plan(methods=("pecker_shared_lr", "retrain"))
    assert {job.method for job in asked.tuning(KNOWN)} == {"sfd"}
    factors = {(job.method, job.factor) for job in asked.reported(KNOWN, {"sfd": 4.0})}
    assert factors == {("pecker_shared_lr", 4.0), ("retrain", 1.0)}


def test_one_rate_needs_no_tuning():
    assert plan(factors=(2.0,)).tuning(KNOWN) == []
    assert best_factors([], (2.0,), ["sfd"]) == {"sfd": 2.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tuning_seeds": (1,)}, "tuning_seeds: 1 is reported too"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"tuning_forget": (0, 7)}, "tuning_class: 7 is reported too"),
        ({"methods": ("sfd", "sfd")}, "methods: expected at least one, and none twice"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_classes_that_are_not_there_are_refused():
    plan().check_classes(10)
    with pytest.raises(ValueError, match="--forget_class: unknown class 7; the task has classes 0 to 6"):
        plan().check_classes(7)
    with pytest.raises(ValueError, match="--forget_class: every class is forgotten"):
        plan(forget=(0, 1), tuning_forget=(2,)).check_classes(2)


def test_what_has_a_line_is_not_run_again():
    jobs = plan().reported(KNOWN, dict.fromkeys(DEFAULT, 1.0))
    lines = [{**jobs[0].key, "curve": []}, {**jobs[1].key, "factor": 2.0}, {"phase": "timing", "method": "sfd"}]
    assert missing(jobs, json.loads(json.dumps(lines))) == jobs[1:]


def test_equal_seconds_count_what_comes_before_the_first_step():
    reference = {"method": "sfd", "setup_seconds": 0.0, "step_seconds": 0.1}
    own = {"method": "pecker", "setup_seconds": 2.0, "step_seconds": 0.05}
    assert marks(100, reference, own) == {"equal_steps": 100, "equal_seconds": 160}
    assert marks(100, reference, reference | {"step_seconds": 0.1001}) == {"equal_steps": 100, "equal_seconds": 100}
    assert marks(100, reference, own | {"setup_seconds": 20.0}) == {"equal_steps": 100}
    assert marks(100, reference, reference | {"step_seconds": 9.0})["equal_seconds"] == 100  # its own budget, always


# -- store -----------------------------------------------------------------------------------------


def test_lines_are_kept_and_a_line_cut_short_is_run_again(tmp_path):
    store = Store(tmp_path / "a", {"task": "digits", "steps": 3})
    assert store.lines() == []
    store.append({"phase": "timing", "method": "sfd"})
    with (tmp_path / "a" / RUNS).open("a") as file:
        file.write('{"phase": "rep')
    assert store.lines() == [{"phase": "timing", "method": "sfd"}]
    store.append({"phase": "before"})
    again = Store(tmp_path / "a", {"task": "digits", "steps": 3})
    assert [line["phase"] for line in again.lines()] == ["timing", "before"]


def test_another_comparison_is_not_mixed_in(tmp_path):
    Store(tmp_path, {"task": "digits", "steps": 3})
    with pytest.raises(ValueError, match="holds a comparison with steps = 3, asked for is 4; choose another folder"):
        Store(tmp_path, {"task": "digits", "steps": 4})


def test_damaged_lines_are_named(tmp_path):
    store = Store(tmp_path, {})
    (tmp_path / RUNS).write_text('{"phase": "timing"}\nnonsense\n')
    with pytest.raises(FileFormatError, match=r"runs\.jsonl: line 2 is not JSON"):
        store.lines()
    (tmp_path / RUNS).write_text("[1]\n")
    with pytest.raises(FileFormatError, match="line 1 is not a JSON object"):
        store.lines()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="cannot be made"):
        Store(tmp_path / "file" / "folder", {})


# -- tuning ----------------------------------------------------------------------------------------


def tuned(method, factor, ua, retain, distance, **more):
    found = {"unlearning_accuracy": ua, "retain_accuracy": retain, "frechet_distance": distance}
    return {"phase": "tuning", "method": method, "factor": factor, "seed": 9, "equal_seconds": found, **more}


def test_of_the_rates_that_reach_the_target_the_nearest_is_taken():
    lines = [tuned("a", 1.0, 0.99, 0.95, 3.0), tuned("a", 2.0, 0.97, 0.92, 2.0), tuned("a", 4.0, 0.5, 0.99, 0.1)]
    assert best_factors(lines, (1.0, 2.0, 4.0), ["a"]) == {"a": 2.0}


def test_where_none_does_the_best_of_the_worst_is_taken_and_a_diverged_run_never():
    lines = [
        tuned("a", 1.0, 0.2, 1.0, 0.5),
        tuned("a", 2.0, 0.9, 0.7, 9.0),
        {"phase": "tuning", "method": "a", "factor": 4.0, "seed": 9, "failed": "NaN"},
    ]
    assert best_factors(lines, (1.0, 2.0, 4.0), ["a"]) == {"a": 2.0}
    with pytest.raises(ValueError, match="b: no tuning run"):
        best_factors(lines, (1.0, 2.0), ["b"])


def test_a_rate_is_as_good_as_its_worst_run():
    lines = [tuned("a", 1.0, 0.96, 0.95, 5.0), tuned("a", 2.0, 0.99, 0.95, 1.0), tuned("a", 2.0, 0.1, 0.95, 1.0)]
    assert best_factors(lines, (1.0, 2.0), ["a"]) == {"a": 1.0}


# -- statistics and tables -------------------------------------------------------------------------


def reported(method, seed, distance, ua=1.0, **more):
    names = ("inception_score", "precision", "recall", "coverage", "entropy", "forgotten_probability")
    point = {
        "unlearning_accuracy": ua,
        "retain_accuracy": 0.9,
        "frechet_distance": distance,
        **dict.fromkeys(names, 0.5),
    }
    curve = [{"step": 50, **point, "unlearning_accuracy": 0.5}, {"step": 100, **point}]
    probes = [{"probe": "t_init", "recognised": 0.9}, {"probe": "weights", "recognised": 0.25}]
    attacks = {"mia_auc": 0.5, "mia_auc_low": 0.4, "mia_auc_high": 0.6, "mia_tpr": 0.0, "relearning_steps": 5}
    attacks |= {"probes": probes}
    line = {**Job("reported", method, 2.0, (7,), seed).key, "marks": {"equal_steps": 100, "equal_seconds": 90}}
    return {**line, "equal_steps": point, "equal_seconds": point, "curve": curve, "attacks": attacks, **more}


def test_ratios_are_paired_by_seed():
    ours, theirs = [reported("a", s, 2.0 * (s + 1)) for s in (0, 1)], [reported("b", s, 1.0 * (s + 1)) for s in (1, 0)]
    found = statistics.ratio(ours, theirs, "equal_steps", "frechet_distance")
    assert found == pytest.approx((2.0, 2.0, 2.0))  # the same ratio in both seeds: no width
    assert statistics.difference(ours, theirs, "equal_steps", "unlearning_accuracy") == (0.0, 0.0, 0.0)
    assert statistics.mean(ours[:1], "equal_steps", "frechet_distance") == (2.0, None, None)
    assert statistics.mean([{"failed": "NaN", "curve": []}], "equal_steps", "frechet_distance") is None


def test_a_target_counts_from_where_it_stays():
    line = reported("a", 0, 1.0)
    assert statistics.steps_to_target(line) == 100
    line["curve"].append({**line["curve"][1], "step": 150, "retain_accuracy": 0.1})
    assert statistics.steps_to_target(line) == math.inf


def test_verdicts_say_only_what_intervals_show():
    sure = statistics.Interval
    assert falsification.verdict(None, None, None) == "no difference shown"
    assert (
        falsification.verdict(sure(0.1, 0.05, 0.2), sure(0, -1, 1), sure(1.2, 1.1, 1.3))
        == "better: unlearned; worse: distance"
    )
    assert falsification.verdict(sure(0.1, None, None), None, sure(0.5, 0.4, 0.6)) == "better: distance"


def results():
    lines = [reported(name, seed, 2.0 + seed + (name == "random")) for name in DEFAULT for seed in (0, 1, 2)]
    timings = [
        {"phase": "timing", "method": name, "setup_seconds": 0.5, "step_seconds": 0.1, "peak_mib": 9.0}
        | {"flops": {"step": 1e9, "setup": 0}, "parameters": 100, "trained": 25, "mask_density": 0.25}
        for name in DEFAULT
    ]
    return Results([*timings, *lines], plan(seeds=(0, 1, 2), samples=200), KNOWN)


def test_tables_say_what_the_lines_say():
    made = {table.title: table for table in tables.every(results())}
    qualities = ["Quality at equal steps", "Quality at equal seconds"]
    assert list(made) == ["Does the mask help?", *qualities, "What is left in the weights", "Cost"]
    quality = {row[0]: row for row in made["Quality at equal steps"].rows}
    assert quality["pecker"][5] == "1.00x (1.00 to 1.00)" and quality["sfd"][5] == ""
    assert quality["random"][4].startswith("4 ± ") and quality["random"][1] == "100"
    claims = {row[0]: row for row in made["Does the mask help?"].rows}
    assert claims["pecker against random"][-1] == "better: distance"
    assert "| pecker | 25.0% | 2 * | 100 ms | 1.00x |" in made["Cost"].markdown()  # the end of the grid
    assert "| pecker | 0.5 ± 0 | 0.5 ± 0 | 0.50 (0.40 to 0.60) | 0.0% | 5 | 25% |" in (
        made["What is left in the weights"].markdown()
    )
    assert made["Cost"].text().splitlines()[1].startswith("sfd ")


def test_diverged_runs_are_counted_not_hidden():
    found = results()
    lost = {**Job("reported", "pecker", 2.0, (7,), 3).key, "marks": {"equal_steps": 100, "equal_seconds": 90}}
    found = Results([*found.lines, {**lost, "curve": [], "failed": "the loss is NaN"}], found.plan, KNOWN)
    assert [row[0] for row in tables.quality(found, "equal_steps").rows][1] == "pecker (1 of 4 diverged)"


def test_what_diverges_gets_no_verdict_from_the_runs_that_are_left():
    found = results()
    lines = [line for line in found.lines if (line["method"], line.get("seed")) != ("pecker", 0)]
    lost = {**Job("reported", "pecker", 2.0, (7,), 0).key, "marks": {"equal_steps": 100, "equal_seconds": 90}}
    found = Results([*lines, {**lost, "curve": [], "failed": "the loss is NaN"}], found.plan, KNOWN)
    rows = {row[0]: row for row in falsification.falsification(found).rows}
    assert rows["pecker against random"][-1] == "no verdict: 1 of 3 diverged, against 0 of 3 diverged"


def test_a_difference_of_one_image_is_none():
    one = statistics.Interval(0.005, 0.005, 0.005)  # the same in every seed, and so without width
    assert falsification.verdict(one, None, None, least=1 / 200) == "no difference shown"
    assert falsification.verdict(one, None, None, least=1 / 400) == "better: unlearned"


def test_a_class_that_never_went_away_is_not_one_that_stayed_away():
    def relearned(*steps):
        runs = [reported("sfd", seed, 1.0) for seed in range(len(steps))]
        for run, found in zip(runs, steps, strict=True):
            run["attacks"] = {**run["attacks"], "relearning_steps": found}
        return tables.privacy(Results(runs, plan(seeds=tuple(range(len(steps)))), KNOWN)).rows[0][5]

    assert (
        relearned(0, 0, 0) == "0" and relearned(None, None, 5) == "more than 100" and relearned(5, 5, None, None) == "5"
    )


def test_only_what_is_asked_for_is_counted_and_once():
    lines = [
        *results().lines,
        reported("pecker", 0, 9.0),
        reported("pecker", 7, 9.0),
        reported("pecker", 0, 9.0, factor=4),
    ]
    jobs = plan(seeds=(0, 1, 2)).reported(KNOWN, dict.fromkeys(DEFAULT, 2.0))
    assert selected(lines, jobs) == results().lines


def test_another_process_is_kept_out(tmp_path):
    with Store(tmp_path, {}), pytest.raises(ValueError, match="another process works in it"), Store(tmp_path, {}):
        pass
    with Store(tmp_path, {}):
        pass


def test_timings_are_found_by_method():
    assert set(timing.of(results().lines)) == set(DEFAULT)
