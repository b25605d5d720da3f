"""``pecker-fast distill``: a one-step generator of everything, once, for requests for erasure to start from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pecker_fast import distilled
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.output import Destination, bytes_of, bytes_of_checkpoints
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.source import distill_config, load_source
from pecker_fast.commands.together import group_of, is_first
from pecker_fast.distill_checkpoint import KIND
from pecker_fast.distiller import MaskedDistiller

_WRITES = ("model/", "fake_score/", distilled.CONFIG, distilled.RECORD, "metrics.jsonl")


def run(options: argparse.Namespace) -> Outcome:
    """Distil every weight and forget nothing; where that was done with these settings already, say so and stop."""
    source = load_source(options.pretrained_model_name_or_path, options.device)
    config = distill_config(options, source, forget=(), mask={"kind": "dense"})
    settings = distilled.wanted(config, source.schedule, source.model, options.max_train_steps)
    if not options.overwrite and (seconds := _done(options, settings)) is not None:
        text = f"{options.output_dir}: distilled already, with these settings and from this model."
        return Outcome(_values(options, source.parameters, seconds, cached=True), text)
    training = Training(options)
    training.check()
    room = 2 * bytes_of(source.model.parameters()) + bytes_of_checkpoints(options, 2 * source.parameters)
    output = Destination(options, _WRITES, room, KIND)
    if options.dry_run:
        more = ("checkpoint-*/",) if options.checkpointing_steps else ()
        return dry_run(settings, {"model": source.parameters, "active": source.parameters}, output.planned(*more))

    with output.folder() as folder:
        distiller = MaskedDistiller(source.model, source.schedule, config, process_group=group_of(options))
        training.resume(distiller)
        if distiller.mask is None:
            distiller.build_mask()
        training.run(distiller, label="distil")
        seconds = training.total_seconds()
        if is_first(options):
            distilled.write(distiller, folder, options.max_train_steps, seconds)
            lines = "".join(json.dumps(dict(step)) + "\n" for step in training.metrics)
            (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = {**_values(options, source.parameters, seconds, cached=False), **training.last_metrics()}
    text = (
        f"Distilled in {values['step']} steps ({seconds:.1f} s), all of {source.parameters:,} weights. "
        f"Written to {options.output_dir}."
    )
    return Outcome(values, text)


def _done(options: argparse.Namespace, settings: dict[str, Any]) -> float | None:
    """Seconds that it took where it was done before; None where it was not."""
    folder = options.output_dir
    if not (folder / distilled.RECORD).is_file():
        return None
    distilled.check_same(distilled.read_record(folder), settings, folder)
    return float(distilled.load(folder).record["seconds"])


def _values(options: argparse.Namespace, parameters: int, seconds: float, *, cached: bool) -> dict[str, Any]:
    return {
        "output_dir": str(options.output_dir),
        "model": str(options.output_dir / "model"),
        "fake_score": str(options.output_dir / "fake_score"),
        "cached": cached,
        "parameters": parameters,
        "seconds": seconds,
    }
