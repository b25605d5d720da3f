"""``pecker-fast compare``: every method on the same work."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from pecker_fast.classes import Classes
from pecker_fast.commands import Outcome, comparing, dry_run
from pecker_fast.commands.classes import chosen
from pecker_fast.commands.output import Destination

_WRITES = (
    *("compare.json", "runs.jsonl", "table.md", "quality.png", "curves.png", "samples.png", "report.html"),
    "samples",
)


def run(options: argparse.Namespace) -> Outcome:
    """Do what is missing in the folder, and write tables, figures and the page."""
    from pecker_fast.compare import tables
    from pecker_fast.compare.harness import Harness

    comparing.check_flags(options)
    classes = comparing.classes_of_task(options)
    known, plan = _known(options), _plan(options, classes)
    harness = Harness(
        partial(comparing.load_task, comparing.task_flags(options)),
        known,
        plan,
        options.processes,
        not options.quiet,
        options.diagnostics,
    )
    output = Destination(options, _WRITES)
    if options.dry_run:
        return _dry_run(output, harness, classes)
    with output.grown() as folder:
        results = harness.run(folder)
    made = tables.every(results)
    text = "\n\n".join(f"{table.title}\n{table.text()}" for table in made)
    values = {
        "output_dir": str(options.output_dir),
        "methods": list(plan.methods),
        "forget_class": list(plan.forget),
        "forget_class_names": classes.names_of(plan.forget),
        "runs": sum(line["phase"] == "reported" for line in results.lines),
        "tables": {table.title: [dict(zip(table.head, row, strict=True)) for row in table.rows] for table in made},
    }
    return Outcome(
        values, f"{text}\n\nOpen {options.output_dir / 'report.html'} for pictures and what the numbers mean."
    )


def _known(options: argparse.Namespace) -> dict[str, Any]:
    from pecker_fast.compare.methods import methods

    return dict(methods(options.mask_density, options.block))


def _plan(options: argparse.Namespace, classes: Classes) -> Any:
    from pecker_fast.compare.methods import DEFAULT
    from pecker_fast.compare.plan import Plan

    known, names = _known(options), tuple(options.methods or DEFAULT)
    if names == ("all",):
        names = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: unknown method {name!r}; expected all, or some of {', '.join(known)}")
    forget = chosen(options, classes).forget
    tuning = classes.find("--tuning_class", options.tuning_class or ()) or classes.retained(forget)[:1]
    classes.check_seen("--tuning_class", tuning)
    return Plan(
        methods=names,
        forget=forget,
        seeds=tuple(options.seeds),
        tuning_forget=tuning,
        tuning_seeds=tuple(options.tuning_seeds),
        factors=tuple(options.learning_rate_factors),
        steps=options.max_train_steps,
        samples=options.num,
    )


def _dry_run(output: Destination, harness: Any, classes: Classes) -> Outcome:
    plan = harness.plan
    factors = dict.fromkeys(harness.known, 1.0)
    runs = {"tuning": len(plan.tuning(harness.known)), "reported": len(plan.reported(harness.known, factors))}
    named = {"forget_class_names": classes.names_of(plan.forget)}
    return dry_run({**vars(plan), **named, "runs": runs}, {}, output.planned())
