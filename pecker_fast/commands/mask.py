"""``pecker-fast mask``: choose the weights that matter to a class, and train nothing."""

from __future__ import annotations

import argparse

from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.output import Destination
from pecker_fast.commands.source import distill_config, forget_batches, load_source
from pecker_fast.distiller import MaskedDistiller


def run(options: argparse.Namespace) -> Outcome:
    """Build the mask as the distiller would, from generated or given images, and save it."""
    output = Destination(options)
    output.check()
    source = load_source(options.pretrained_model_name_or_path, options.device)
    config = distill_config(options, source)
    if options.dry_run:
        active = round(config.mask.density * source.parameters)
        parameters = {"model": source.parameters, "active_at_most": active}
        asked = {"forget": config.forget, "forget_class_names": source.classes.names_of(config.forget)}
        return dry_run(config.mask.to_dict() | asked, parameters, output.planned())
    batches = None
    if options.train_data_dir is not None:
        batches = forget_batches(options.train_data_dir, source, config)
    mask = MaskedDistiller(source.model, source.schedule, config).build_mask(batches)
    with output.folder() as folder:
        mask.save(folder / output.file_name)
    values = {
        "output_file": str(options.output_file),
        "forget_class": list(config.forget),
        "forget_class_names": source.classes.names_of(config.forget),
        "density": mask.density,
        "density_asked": mask.density_asked,
        "saliency_mass": mask.mass,
        "active": mask.numel,
        "parameters": mask.total,
        "layers": mask.layer_densities,
    }
    text = f"{mask.summary()}\n\nFor class {source.classes.text(config.forget)}. Written to {options.output_file}."
    return Outcome(values, text)
