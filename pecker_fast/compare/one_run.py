"""One run of a comparison: train, look on the way, judge where it counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pecker_fast.compare.contestants import Runner, get_ready
from pecker_fast.compare.diagnostics import gradients
from pecker_fast.compare.judging import Panel
from pecker_fast.compare.plan import Job
from pecker_fast.compare.store import Line
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.errors import NonFiniteError
from pecker_fast.pretrain import seeded
from pecker_fast.stopping import fresh_seed

GLANCES = {"one_step": 10, "ddim": 4}
"""Looks on the way; images in many steps cost more than the training between."""


def run(job: Job, contestant: Runner, panel: Panel, marks: Mapping[str, int], diagnose: bool = False) -> Line:
    """Train to the last mark; a run that diverges is a result too.

    Args:
        job: Which one it is.
        contestant: Without its mask yet.
        panel: Who judges.
        marks: Name -> step at which everything is judged; attacks are made at the last of them alone.
        diagnose: Also look at a generator's gradients, after the last step.

    Returns:
        The job's key; "marks"; "curve" with "step" and accuracies, and "attacks", of reported runs; each mark's verdict
        by its name; "diagnostics" if asked for; "mask_density", "mass", "learning_rate_scale"; "seconds" of setup and
        training, as they were. Or "failed", with what happened.
    """
    line: dict[str, Any] = {**job.key, "marks": dict(marks), "curve": []}
    with seeded(fresh_seed("compare", job.method, job.seed), contestant.device):  # what dropout draws
        try:
            _train(line, job, contestant, panel, diagnose)
        except NonFiniteError as error:
            line["failed"] = str(error)
            return line
        if job.phase == "reported":
            try:
                line["attacks"] = panel.attacks(contestant)
            except NonFiniteError as error:  # the attacker's loss, not the method's
                line["attacks"] = {"failed": str(error)}
    return line


def _train(line: Line, job: Job, contestant: Runner, panel: Panel, diagnose: bool) -> None:
    """Fill in what training shows."""
    marks: Mapping[str, int] = line["marks"]
    started = time.perf_counter()
    mask = get_ready(contestant)
    line |= {"mask_density": mask.density, "mass": mask.mass, "learning_rate_scale": contestant.lr_scale}
    last, seconds = max(marks.values()), time.perf_counter() - started
    looks = GLANCES[contestant.generation["kind"]] if job.phase == "reported" else 0
    glances = {round(last * (i + 1) / looks) for i in range(looks)}
    started = time.perf_counter()
    for metrics in contestant.run(last, progress=False):
        step = int(metrics["step"])
        seconds += time.perf_counter() - started
        if step in glances:
            line["curve"].append({"step": step, **panel.glance(contestant)})
        if diagnose and step == last and isinstance(contestant, MaskedDistiller):
            line["diagnostics"] = gradients(contestant)
        for name in (name for name, at in marks.items() if at == step):
            line[name] = panel.verdict(contestant)
        started = time.perf_counter()
    line["seconds"] = seconds
