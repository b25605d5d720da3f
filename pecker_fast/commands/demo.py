"""``pecker-fast demo``: erase digits three ways and show what came out."""

from __future__ import annotations

import argparse
import dataclasses

from pecker_fast.commands import Outcome
from pecker_fast.commands.classes import chosen
from pecker_fast.commands.output import Destination


def run(options: argparse.Namespace) -> Outcome:
    """Train or load the digits model and its judge, run masked, random and dense, and write the report."""
    from pecker_fast import demo, digits_task, report

    asked = chosen(options, digits_task.CLASSES)
    config = demo.DemoConfig(
        forget=asked.forget,
        override=asked.override,
        seed=options.seed,
        density=options.mask_density,
        block=options.block,
        steps=options.max_train_steps,
        short=options.short,
        cache_dir=options.cache_dir,
        progress=not options.quiet,
    )
    output = Destination(options, demo.WRITES)
    if options.dry_run:
        settings = dataclasses.asdict(config) | {"cache_dir": str(config.cache_dir or digits_task.default_cache_dir())}
        plan = {"settings": settings, "plan": demo.plan(config), "would_write": output.planned()}
        return Outcome({"dry_run": True, **plan})
    with output.folder() as folder:
        metrics = demo.run_demo(config, folder)
    page = options.output_dir / "report.html"
    return Outcome(metrics, f"{report.table(metrics)}\n\nOpen {page} for the pictures and what the numbers mean.")
