"""``pecker-fast delta``: what an erasure changed, as a small file that is applied and taken back."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from pecker_fast.classes import Classes
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.classes import same_classes
from pecker_fast.commands.output import Destination, bytes_of
from pecker_fast.commands.weights import ModelFolder
from pecker_fast.delta import Delta
from pecker_fast.delta import file as delta_file
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.models.pipeline_scheduler import scheduler_change, switched


def run(options: argparse.Namespace) -> Outcome:
    """Do one of the four actions; a folder that is written appears only when all of it is there."""
    actions = {"extract": _extract, "apply": _switch, "revert": _switch, "info": _info}
    return actions[options.action](options)


def _extract(options: argparse.Namespace) -> Outcome:
    before, after = ModelFolder.read(options.before), ModelFolder.read(options.after)
    _same_classes({str(options.before): before.classes, str(options.after): after.classes})
    mask = BlockMask.load(options.mask_path)
    name = options.name or options.output_dir.name
    old, new = before.scheduler, after.scheduler
    metadata = {} if old is None or new is None else scheduler_change(old, new)
    metadata |= {} if before.classes is None else before.classes.to_dict()
    given = {"name": name, "metadata": metadata, "ledger": before.ledger, "progress": not options.quiet}
    try:
        delta = Delta.extract(before.weights, after.weights, mask, **given)
    except ValueError as error:
        raise FileFormatError(f"{options.before} and {options.after}: {error}") from error
    room = bytes_of(delta.payload.values())
    output = Destination(options, (delta_file.PAYLOAD_NAME, delta_file.CONFIG_NAME, "README.md"), room)
    if options.dry_run:
        settings = {"before": str(options.before), "after": str(options.after), "name": name}
        return dry_run(settings, _sizes(delta), output.planned())
    with output.folder() as folder:
        delta.save(folder)
    values = {"output_dir": str(options.output_dir), **_values(delta, options.output_dir)}
    return Outcome(values, f"{delta!r}\nWritten to {options.output_dir}.")


def _switch(options: argparse.Namespace) -> Outcome:
    """Apply or revert, in memory first: what does not fit is refused before anything is written."""
    model = ModelFolder.read(options.model)
    scheduler, applied = model.scheduler, options.action == "apply"
    deltas = [Delta.load(folder) for folder in options.delta]
    for folder, delta in zip(options.delta, deltas, strict=True):
        _same_classes({str(options.model): model.classes, str(folder): Classes.listed_in(delta.metadata)})
        switch = delta.apply if applied else delta.revert
        try:
            switch(model.weights, ledger=model.ledger, progress=not options.quiet)
            if scheduler is not None:
                scheduler = switched(scheduler, delta.metadata, applied)
        except ValueError as error:
            raise FileFormatError(f"{options.model} and {folder}: {error}") from error
    carried = [record.name for record in model.ledger.holding(model.weights)]
    output = Destination(options, model.writes, bytes_of(model.weights.values()))
    if options.dry_run:
        settings = {"model": str(options.model), options.action: [str(folder) for folder in options.delta]}
        return dry_run(settings, _sizes(*deltas), output.planned())
    with output.folder() as folder:
        model.write(folder, scheduler)
    names = ", ".join(delta.record.label for delta in deltas)
    text = f"{'Applied' if applied else 'Reverted'} {names}."
    values = {"output_dir": str(options.output_dir), "weights": _sizes(*deltas)["changed"], "carried": carried}
    if scheduler is not None:
        values["scheduler"] = scheduler.class_name
        text += "" if scheduler == model.scheduler else f" The scheduler is {scheduler.class_name} now."
    return Outcome(values, f"{text} Written to {options.output_dir}.")


def _same_classes(sides: Mapping[str, Classes | None]) -> None:
    """Where both sides name their classes; that one belongs to the other is told by the weights."""
    named = {what: classes for what, classes in sides.items() if classes is not None}
    if len(named) == len(sides):
        same_classes(named)


def _info(options: argparse.Namespace) -> Outcome:
    deltas = {str(folder): Delta.load(folder) for folder in options.delta}
    overlaps = [
        {"deltas": [a, b], "weights": names}
        for (a, first), (b, second) in combinations(deltas.items(), 2)
        if (names := first.overlaps(second))
    ]
    values = {
        "deltas": {folder: _values(delta, Path(folder)) for folder, delta in deltas.items()},
        "disjoint": not overlaps,
        "overlaps": overlaps,
    }
    lines = [f"{folder}\n{_text(delta)}" for folder, delta in deltas.items()]
    if len(deltas) > 1:
        pairs = ["{} and {}".format(*overlap["deltas"]) for overlap in overlaps]
        clash = f"These change the same weights and do not stack: {'; '.join(pairs)}."
        lines.append(clash if overlaps else "They change different weights: they stack in any order.")
    return Outcome(values, "\n\n".join(lines))


def _text(delta: Delta) -> str:
    info = delta.info()
    largest = sorted(info["layers"].items(), key=lambda layer: -layer[1])[:3]
    lines = [repr(delta), f"most in: {', '.join(f'{name} ({count:,})' for name, count in largest)}"]
    lines += [f"{kind}: {value}" for kind, value in (info["hashes"] | info["versions"]).items()]
    return "\n".join(f"  {line}" for line in lines + [f"{key}: {value}" for key, value in info["metadata"].items()])


def _values(delta: Delta, folder: Path) -> dict[str, Any]:
    return delta.info() | {"file": delta_file.read_config(folder)["payload"]}


def _sizes(*deltas: Delta) -> dict[str, int]:
    return {"model": deltas[0].mask.total, "changed": sum(delta.mask.numel for delta in deltas)}
