"""``pecker-fast unlearn``: make a diffusion model forget classes, and save the generator that has."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pecker_fast.baseline_flags import DISTILL
from pecker_fast.baseline_flags import check_flags as check_method_flags
from pecker_fast.commands import Outcome, dry_run, judging, unlearn_baseline, unlearn_concept
from pecker_fast.commands.earlier import RECORD
from pecker_fast.commands.output import Destination, bytes_of, bytes_of_checkpoints
from pecker_fast.commands.requests import Request
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.source import Source, distill_config, load_source
from pecker_fast.commands.together import group_of, is_first
from pecker_fast.concept_flags import PECKER, SFD, asks_for_prompts, check_class_flags
from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.config import DistillConfig
from pecker_fast.distill_checkpoint import KIND
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.mask import BlockMask

STEPS = 500
_WRITES = ("model/", "delta/", "mask.safetensors", "distill_config.json", "metrics.jsonl")


def run(options: argparse.Namespace) -> Outcome:
    """Unlearn by the method that the flags ask for: prompts from a pipeline, classes from any other folder."""
    if PipelineFolder.is_one(options.pretrained_model_name_or_path) or asks_for_prompts(options):
        return unlearn_concept.run(options)
    check_class_flags(options)
    if options.max_train_steps is None:
        options.max_train_steps = STEPS  # in place: config.yaml says what was done
    if options.method in (PECKER, SFD):
        options = argparse.Namespace(**vars(options) | {"method": DISTILL, "asked": options} | _mask_of(options))
    check_method_flags(options)
    return distil(options) if options.method == DISTILL else unlearn_baseline.run(options)


def _mask_of(options: argparse.Namespace) -> dict[str, str]:
    if options.method == PECKER:
        return {}
    if options.mask not in (None, "dense"):
        raise ValueError(f"--mask {options.mask}: --method {SFD} trains every weight; take {PECKER}")
    return {"mask": "dense"}


def distil(options: argparse.Namespace) -> Outcome:
    """Distil with the mask that the flags ask for; the output folder appears only when all of it is there."""
    source = load_source(options.pretrained_model_name_or_path, options.device)
    request = Request.read(options, source)
    mask = None if options.mask_path is None else BlockMask.load(options.mask_path)
    if mask is not None:
        request.check_mask(mask, source.model, options)
    forget, override = request.classes
    changes = {} if mask is None else {"density": mask.density_asked}
    config = distill_config(
        options,
        source,
        forget=forget,
        override=override,
        retain=request.retain,
        defaults=request.defaults,
        mask=changes,
    )
    Training(options).check()
    judging.check_flags(options, source, config)
    output = _output(options, source, config, mask)
    if options.dry_run:
        return _dry_run(options, output, source, config, mask)

    stop = judging.make(options, source, config.forget, config.seed)
    training = Training(options, stop)
    with output.folder() as folder:
        distiller = MaskedDistiller(
            source.model, source.schedule, config, **request.networks, process_group=group_of(options)
        )
        if mask is not None:
            distiller.use_mask(mask)
        training.resume(distiller)
        mask = distiller.mask or request.build_mask(distiller)
        training.run(distiller)
        seconds = training.total_seconds()
        distiller.save(folder)
        if is_first(options):
            lines = "".join(json.dumps(dict(step)) + "\n" for step in training.metrics)
            (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
            request.write(folder, options)
    values = {
        "output_dir": str(options.output_dir),
        "model": str(options.output_dir / "model"),
        "forget_class": list(request.forget),
        "forget_class_names": source.classes.names_of(request.forget),
        "density": mask.density,
        "trainable_parameters": distiller.active.numel,
        "parameters": source.parameters,
        "seconds": seconds,
        **training.last_metrics(),
    }
    if stop is not None:
        values["stopped"] = training.stopped
    return Outcome(values, _text(options, values, source.classes.text(request.forget)))


def _active(source: Source, config: DistillConfig, mask: BlockMask | None) -> int:
    density = 1.0 if config.mask.kind == "dense" else config.mask.density
    return round(density * source.parameters) if mask is None else mask.numel


def _output(options: argparse.Namespace, source: Source, config: DistillConfig, mask: BlockMask | None) -> Destination:
    active = _active(source, config, mask)
    trained = active + (active if config.fake_score_mask else source.parameters)
    room = bytes_of(source.model.parameters()) + bytes_of_checkpoints(options, trained)
    return Destination(options, (*_WRITES, *((RECORD,) if options.init else ())), room, KIND)


def _dry_run(
    options: argparse.Namespace, output: Destination, source: Source, config: DistillConfig, mask: BlockMask | None
) -> Outcome:
    settings = {"max_train_steps": options.max_train_steps, **config.to_dict()}
    if (names := source.classes.names_of(config.forget)) is not None:
        settings["forget_class_names"] = names
    parameters = {"model": source.parameters, "active_at_most": _active(source, config, mask)}
    return dry_run(settings, parameters, output.planned(*(("checkpoint-*/",) if options.checkpointing_steps else ())))


def _text(options: argparse.Namespace, values: dict[str, Any], classes: str) -> str:
    text = (
        f"Forgot class {classes} in {values['step']} steps ({values['seconds']:.1f} s), "
        f"training {values['trainable_parameters']:,} of {values['parameters']:,} weights. "
        f"Written to {options.output_dir}."
    )
    if options.stop_on is None:
        return text
    if values["stopped"] is None:
        return f"{text}\nThe target was NOT reached: {options.stop_on} did not hold in two checks in a row."
    bounds = f"ua {values['ua']:.4f} [>= {values['ua_lower']:.4f}], retain {values['retain']:.4f} "
    return f"{text}\nThe target was reached, {options.stop_on}: {bounds}[>= {values['retain_lower']:.4f}]."
