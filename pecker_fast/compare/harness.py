"""The comparison from end to end: time, tune, run, report. What is there already is not done again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pecker_fast.classes import Classes
from pecker_fast.compare import figures, judging, page, tables, timing
from pecker_fast.compare.contestants import Runner, make
from pecker_fast.compare.methods import REFERENCE, Method
from pecker_fast.compare.one_run import run
from pecker_fast.compare.plan import Job, Plan, marks, missing
from pecker_fast.compare.results import Results, selected
from pecker_fast.compare.retrained import Retrained
from pecker_fast.compare.store import Line, Store
from pecker_fast.compare.task import Task
from pecker_fast.compare.tuning import best_factors

VERSION = 1
"""Of what a folder holds: of methods, judging and lines."""


@dataclass(frozen=True)
class Harness:
    """One comparison.

    Attributes:
        task: Makes what it is about; called once in every process.
        known: All methods by name.
        plan: What is asked for.
        processes: How many runs at once, each with one thread if there are several.
        progress: Show progress bars.
        diagnose: Look at gradients too.
    """

    task: Callable[[], Task]
    known: dict[str, Method]
    plan: Plan
    processes: int = 1
    progress: bool = True
    diagnose: bool = False

    def run(self, folder: Path) -> Results:
        """Do what is missing in ``folder``, and write the report; of what there is, where it is interrupted.

        Raises:
            KeyboardInterrupt: With what is kept.
            ValueError: A class that the task does not have; another comparison in the folder, or one that is running.
            FileFormatError: The folder cannot be written, or is damaged.
        """
        task = self.task()
        self._check_classes(task)
        with Store(folder, self.settings(task)) as store:
            try:
                self._before(task, store)
                self._timing(task, store)
                self._work(self.plan.tuning(self.known), task, store, "tuning")
                self._work(self._reported(store.lines()), task, store, "runs")
            except KeyboardInterrupt:
                kept = len(store.lines())
                if any(line["phase"] == "reported" for line in store.lines()):
                    self.report(store, task)
                raise KeyboardInterrupt(f"{kept} lines are kept in {folder}; the same command goes on") from None
            return self.report(store, task)

    def settings(self, task: Task) -> dict[str, Any]:
        """What a folder of runs must agree on; methods and seeds may be added later."""
        chosen = {name: value for name, value in vars(self.plan).items() if name not in ("methods", "seeds")}
        masked = self.known["random"].mask
        return {"version": VERSION, **task.description(), **chosen, "density": masked.density, "block": masked.block}

    def report(self, store: Store, task: Task) -> Results:
        """Tables, pictures and the page of what was asked for."""
        jobs = self._reported(store.lines())
        results = Results(selected(store.lines(), jobs), self.plan, self.known)
        made = tables.every(results)
        (store.folder / "table.md").write_text(tables.markdown(made), encoding="utf-8")
        pictures = figures.write(results, store.folder, task.train.class_names, self.plan.forget)
        classes = task.classes.text(self.plan.forget)
        settings = {"seeds": list(self.plan.seeds), "forgotten": classes, **self.settings(task)}
        page.write(store.folder / "report.html", results, made, pictures, settings)
        return results

    def _check_classes(self, task: Task) -> None:
        """Of what is forgotten there must be images: for the judge, and for an attacker, who has others of it."""
        self.plan.check_classes(task.num_classes)
        for flag, labels in (("--forget_class", self.plan.forget), ("--tuning_class", self.plan.tuning_forget)):
            task.classes.check_seen(flag, labels)
        Classes.of_images(task.held_out).check_seen("--forget_class", self.plan.forget, "in the test part")

    # -- the parts ---------------------------------------------------------------------------------

    def _before(self, task: Task, store: Store) -> None:
        """What the judge says of the model before anything is forgotten."""
        if any(line["phase"] == "before" for line in store.lines()):
            return
        untouched = make(self.known["fine_tune"], task, self._job("fine_tune"))
        panel = judging.Panel(task, self.plan.forget, self.plan.samples, self.plan.seeds[0])
        line = {"phase": "before", "method": "before", "seed": panel.seed, "equal_steps": panel.verdict(untouched)}
        store.append({**line, "attacks": panel.attacks(untouched)})
        panel.save_picture(untouched, store.folder / "samples" / "before.npz")

    def _timing(self, task: Task, store: Store) -> None:
        """Steps of all methods that have no timing yet, against the reference; with the threads of the runs."""
        known = timing.of(store.lines())
        new = [name for name in dict.fromkeys((REFERENCE, *self.plan.methods)) if name not in known]
        if not new:
            return
        names = new if REFERENCE in new else [REFERENCE, *new]
        made = {name: partial(make, self.known[name], task, self._job(name)) for name in names}
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.processes > 1 else threads)
        try:
            lines = timing.race(made, self.progress, known.get(REFERENCE))
        finally:
            torch.set_num_threads(threads)
        for line in lines:
            store.append(line)

    def _job(self, name: str) -> Job:
        return Job("reported", name, 1.0, self.plan.forget, self.plan.tuning_seeds[0])

    def _reported(self, lines: Sequence[Line]) -> list[Job]:
        tuned = {self.known[name].tuned_as or name for name in self.plan.methods if not self.known[name].own_length}
        factors = best_factors(lines, self.plan.factors, sorted(tuned))
        return self.plan.reported(self.known, factors)

    def _work(self, jobs: Sequence[Job], task: Task, store: Store, label: str) -> None:
        """Runs that have no line yet, in as many processes as are asked for."""
        left = missing(jobs, store.lines())
        timings = timing.of(store.lines())
        work = [(job, self._marks(job, timings, task)) for job in left]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(left), desc=label, unit="run", disable=not self.progress)
        with bar:
            for line in self._lines(work, task, store.folder):
                store.append(line)
                bar.update()

    def _marks(self, job: Job, timings: dict[str, Line], task: Task) -> dict[str, int]:
        if self.known[job.method].own_length:
            return {"equal_steps": task.retrain_steps}
        found = marks(self.plan.steps, timings[REFERENCE], timings[job.method])
        if job.phase == "reported" or "equal_seconds" not in found:
            return found
        return {"equal_seconds": found["equal_seconds"]}  # what rates are chosen by

    def _lines(self, work: Sequence[tuple[Job, dict[str, int]]], task: Task, folder: Path) -> Iterator[Line]:
        if self.processes == 1 or len(work) < 2:
            yield from (_one(self, task, folder, *job) for job in work)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, _start, (self, folder)) as pool:
            futures = [pool.submit(_in_process, *job) for job in work]
            try:
                for done in as_completed(futures):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is done is kept, what waits is not begun
                raise


def _one(harness: Harness, task: Task, folder: Path, job: Job, at: dict[str, int]) -> Line:
    plan = harness.plan
    samples = plan.samples if job.phase == "reported" else max(2, plan.samples // 2)
    panel = judging.Panel(task, job.forget, samples, job.seed)
    method = harness.known[job.method]
    contestant: Runner = Retrained(task, job) if method.own_length else make(method, task, job)
    line = run(job, contestant, panel, at, harness.diagnose and job.phase == "reported")
    if job.phase == "reported" and job.seed == plan.seeds[0] and "failed" not in line:
        panel.save_picture(contestant, folder / "samples" / f"{job.method}.npz")
    return line


_PROCESS: dict[str, Any] = {}
"""What a process of the pool works with."""


def _start(harness: Harness, folder: Path) -> None:
    torch.set_num_threads(1)
    _PROCESS.update(harness=harness, task=harness.task(), folder=folder)


def _in_process(job: Job, at: dict[str, int]) -> Line:
    return _one(_PROCESS["harness"], _PROCESS["task"], _PROCESS["folder"], job, at)
