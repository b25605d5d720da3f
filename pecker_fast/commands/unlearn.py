"""``pecker-fast unlearn``: make a diffusion model forget classes, and save the generator that has."""

from __future__ import annotations

import argparse
import json

from pecker_fast.checkpoint import atomic_folder
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.source import classes_text, distill_config, load_source
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask

_WRITES = ("model/", "delta/", "mask.safetensors", "distill_config.json", "metrics.jsonl")


def run(options: argparse.Namespace) -> Outcome:
    """Distil with the mask that the flags ask for; the output folder appears only when all of it is there."""
    source = load_source(options.pretrained_model_name_or_path, options.device)
    mask = None if options.mask_path is None else BlockMask.load(options.mask_path)
    changes = {} if mask is None else {"density": mask.density_asked}
    config = distill_config(options, source, **changes)
    training = Training(options)
    training.check()
    if options.dry_run:
        density = 1.0 if config.mask.kind == "dense" else config.mask.density
        active = round(density * source.parameters) if mask is None else mask.numel
        checkpoints = ("checkpoint-*/",) if options.checkpointing_steps else ()
        writes = [str(options.output_dir / name) for name in (*_WRITES, *checkpoints)]
        settings = {"max_train_steps": options.max_train_steps, **config.to_dict()}
        return dry_run(settings, {"model": source.parameters, "active_at_most": active}, writes)

    with atomic_folder(options.output_dir) as folder:
        distiller = MaskedDistiller(source.model, source.schedule, config)
        if mask is not None:
            _use(distiller, mask, options)
        training.resume(distiller)
        mask = distiller.mask or distiller.build_mask()
        training.run(distiller)
        seconds, metrics = training.total_seconds(), training.last_metrics()
        lines = "".join(json.dumps(dict(step)) + "\n" for step in training.metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        distiller.save(folder)
    values = {
        "output_dir": str(options.output_dir),
        "model": str(options.output_dir / "model"),
        "forget_class": list(config.forget),
        "density": mask.density,
        "trainable_parameters": distiller.active.numel,
        "parameters": source.parameters,
        "seconds": seconds,
        **metrics,
    }
    text = (
        f"Forgot class {classes_text(config.forget)} in {metrics['step']} steps ({seconds:.1f} s), training "
        f"{distiller.active.numel:,} of {source.parameters:,} weights. Written to {options.output_dir}."
    )
    return Outcome(values, text)


def _use(distiller: MaskedDistiller, mask: BlockMask, options: argparse.Namespace) -> None:
    try:
        distiller.use_mask(mask)
    except ValueError as error:
        raise FileFormatError(
            f"{options.mask_path}: does not fit {options.pretrained_model_name_or_path}: {error}"
        ) from error
