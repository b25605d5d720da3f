"""Numbers of a step: read without waiting for the next one, not finite ones noticed late but always."""

import json

import pytest
import torch
from test_distiller import SCHEDULE, config, unet

from pecker_fast import MaskedDistiller, step_metrics
from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.errors import NonFiniteError
from pecker_fast.step_metrics import StepMetrics


class Late:
    """A device some steps behind the host: numbers arrive when so many later ones have been asked for."""

    behind = 2
    asked = 0
    waited = 0

    def __init__(self, numbers):
        self.own, self.found = Late.asked, numbers.clone()
        Late.asked += 1

    def arrived(self):
        return Late.asked - self.own > Late.behind

    def numbers(self):
        Late.waited += not self.arrived()
        return self.found.tolist()


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(step_metrics, "fetch", Late)
    monkeypatch.setattr(Late, "asked", 0)
    monkeypatch.setattr(Late, "waited", 0)
    return Late


def distiller():
    return MaskedDistiller(unet(dropout=0.0), SCHEDULE, config())


def losses(*values):
    return {name: torch.tensor(value) for name, value in zip(("a", "b"), values, strict=True)}


def test_a_mapping_of_floats():
    metrics = StepMetrics(3, losses(0.1, 2.0))
    assert list(metrics) == ["step", "a", "b"] and len(metrics) == 3
    assert dict(metrics) == metrics == {"step": 3, "a": float(torch.tensor(0.1)), "b": 2.0}
    assert isinstance(metrics["step"], int) and isinstance(metrics["a"], float)
    assert repr(metrics) == repr(dict(metrics))
    with pytest.raises(KeyError, match="c"):
        metrics["c"]


def test_json_takes_it(tmp_path):
    write_json(tmp_path / "file.json", {"losses": [StepMetrics(1, losses(1.5, 2.0))]})
    assert read_json(tmp_path / "file.json") == {"losses": [{"step": 1, "a": 1.5, "b": 2.0}]}
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        write_json(tmp_path / "file.json", {"losses": torch.zeros(1)})
    assert json.loads((tmp_path / "file.json").read_text())["losses"]


def test_on_the_cpu_they_are_those_of_the_step_at_once():
    ran, stepped = distiller(), distiller()
    for metrics in ran.run(3, progress=False):
        assert metrics.arrived()
        assert metrics == {"step": stepped.steps_done + 1} | {n: float(v) for n, v in stepped.step().items()}


def test_no_step_waits_for_the_numbers(late):
    expected = [dict(metrics) for metrics in distiller_with(fetch=step_metrics._There)]
    late.waited = late.asked = 0
    run = distiller().run(5, progress=False)
    yielded = []
    for metrics in run:
        assert not metrics.arrived() and late.waited == 0
        assert repr(metrics) == f"<step {metrics.step}, still computed>"
        yielded.append(metrics)
    assert late.waited == late.behind  # the last ones, after the run
    assert [dict(metrics) for metrics in yielded] == expected
    assert late.waited == late.behind  # whatever was looked at is kept


def distiller_with(fetch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_metrics, "fetch", fetch)
        yield from distiller().run(5, progress=False)


def test_reading_waits_once(late):
    metrics = next(distiller().run(5, progress=False))
    assert metrics["generator_loss"] == dict(metrics)["generator_loss"] and late.waited == 1


@pytest.mark.parametrize("behind, noticed_after", [(0, 2), (1, 3), (2, 4), (9, 5)])
def test_numbers_that_are_not_finite_stop_the_run_when_they_arrive(late, monkeypatch, behind, noticed_after):
    """Step 2 is bad; the error comes so many steps later, or after the last one, and names step 2."""
    monkeypatch.setattr(late, "behind", behind)
    steps = (StepMetrics(step, losses(1.0, float("nan") if step == 2 else 1.0)) for step in range(1, 6))
    passed = []
    with pytest.raises(NonFiniteError, match="step 2: b is nan; lower the learning rates"):
        passed.extend(step_metrics.checked(steps_noting(steps, seen := [])))
    assert len(seen) == noticed_after


def steps_noting(steps, seen):
    for metrics in steps:
        seen.append(metrics.step)
        yield metrics


@pytest.mark.gpu
def test_a_run_on_a_gpu_never_waits():
    made = MaskedDistiller(unet(dropout=0.0).cuda(), SCHEDULE, config(merge_batches=True))
    for _ in made.run(2, progress=False):  # compiles and chooses
        pass
    run, yielded = made.run(3, progress=False), []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            yielded.append(next(run))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))).all() for metrics in yielded)
