"""``pecker-fast convert``: published checkpoints and masks into ours, and models into those of diffusers."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from pecker_fast import models
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.output import Destination, bytes_of
from pecker_fast.models import diffusers_export, pipeline_files, sid_lsg
from pecker_fast.models.published import PublishedCheckpoint, load_published
from pecker_fast.models.storage import CONFIG_NAME, WEIGHTS_NAME
from pecker_fast.salun_mask import load_salun_mask
from pecker_fast.schedule import NoiseSchedule

MASK_NAME = "mask.safetensors"
T_INIT = 440
"""Where published generators start."""
STEPS = 50
"""Of DDIM; published networks are sampled with up to 1000."""

_FLAGS = {
    "checkpoint": ("which", "t_init", "num_inference_steps", "resolution"),
    "mask": ("resolution",),
    "diffusers": (),
    "sid_lsg": ("t_init", "base"),
}
"""Of each kind; "from" and "to" are of all."""
_BASE = "pretrained_model_name_or_path"


def run(options: argparse.Namespace) -> Outcome:
    """Convert as ``--kind`` says; the output folder appears only when all of it is there."""
    kinds = {"checkpoint": _checkpoint, "mask": _mask, "diffusers": _diffusers, "sid_lsg": _sid_lsg}
    _check_flags(options)
    return kinds[options.kind](options)


def _check_flags(options: argparse.Namespace) -> None:
    for name in {name: None for names in _FLAGS.values() for name in names}:
        if name not in _FLAGS[options.kind] and getattr(options, name) is not None:
            kinds = " and ".join(f"--kind {kind}" for kind, names in _FLAGS.items() if name in names)
            flag = _BASE if name == "base" else name
            raise ValueError(f"--{flag}: is of {kinds}, and has no meaning with --kind {options.kind}")
    if options.kind == "sid_lsg" and options.base is None:
        raise ValueError(f"--{_BASE}: --kind sid_lsg needs the pipeline folder that the generator was distilled from")


def _checkpoint(options: argparse.Namespace) -> Outcome:
    found = load_published(options.source, options.which or "ema", image_size=options.resolution)
    generation = _generation(options, found)
    parameters = {"model": sum(parameter.numel() for parameter in found.model.parameters())}
    settings = {"from": str(options.source), "which": found.which, "step": found.step}
    output = Destination(options, (CONFIG_NAME, WEIGHTS_NAME), bytes_of(found.model.parameters()))
    if options.dry_run:
        shown = settings | {"architecture": found.model.config, "generation": generation}
        return dry_run(shown, parameters, output.planned())
    with output.folder() as folder:
        models.save(found.model, folder, generation)
    values = {"output_dir": str(options.output_dir), **settings, "parameters": parameters["model"], **generation}
    how = f"in one step from timestep {generation['t_init']}" if found.one_step else "by DDIM"
    text = f"{found.which} of {options.source}: {parameters['model']:,} weights, which draw {how}."
    return Outcome(values, f"{text} Written to {options.output_dir}.")


def _generation(options: argparse.Namespace, found: PublishedCheckpoint) -> dict[str, Any]:
    """How to sample from it: generators in one step, all others by DDIM."""
    wrong = "num_inference_steps" if found.one_step else "t_init"
    if getattr(options, wrong) is not None:
        is_what = "a one-step generator" if found.one_step else "no one-step generator"
        raise ValueError(f"--{wrong}: {found.which} of {options.source} is {is_what}; leave the flag out")
    schedule, config = NoiseSchedule.linear(), found.model.config
    name, default = ("t_init", T_INIT) if found.one_step else ("num_inference_steps", STEPS)
    number = default if getattr(options, name) is None else getattr(options, name)
    low, high = (0, schedule.num_train_timesteps - 1) if found.one_step else (1, schedule.num_train_timesteps)
    if not low <= number <= high:
        raise ValueError(f"--{name}: expected {low} to {high}, got {number}")
    how: dict[str, Any] = (
        {"kind": "one_step", "t_init": number} if found.one_step else {"kind": "ddim", "steps": number}
    )
    size = config["image_size"]
    return how | {"schedule": schedule.to_dict(), "sample_shape": [config["channels"], size, size]}


def _mask(options: argparse.Namespace) -> Outcome:
    mask = load_salun_mask(options.source, image_size=options.resolution)
    output = Destination(options, (MASK_NAME,))
    if options.dry_run:
        settings = {"from": str(options.source), "density": mask.density}
        return dry_run(settings, {"model": mask.total, "active": mask.numel}, output.planned())
    with output.folder() as folder:
        mask.save(folder / MASK_NAME)
    values = {
        "output_dir": str(options.output_dir),
        "mask": str(options.output_dir / MASK_NAME),
        "density": mask.density,
        "active": mask.numel,
        "parameters": mask.total,
    }
    return Outcome(values, f"{mask!r}\nWritten to {values['mask']}.")


def _diffusers(options: argparse.Namespace) -> Outcome:
    exported = diffusers_export.Exported.read(options.source)
    parameters = sum(parameter.numel() for parameter in exported.unet.parameters())
    name = type(exported.unet).__name__
    output = Destination(options, diffusers_export.FILES, bytes_of(exported.unet.parameters()))
    if options.dry_run:
        settings = {"from": str(options.source), "class": name, "scheduler": type(exported.scheduler).__name__}
        return dry_run(settings, {"unet": parameters}, output.planned())
    with output.folder() as folder:
        exported.save(folder)
    values = {"output_dir": str(options.output_dir), "class": name, "parameters": parameters}
    text = f"{name}.from_pretrained({str(options.output_dir)!r}) predicts what {options.source} does."
    return Outcome(values, text)


def _sid_lsg(options: argparse.Namespace) -> Outcome:
    t_init = sid_lsg.T_INIT if options.t_init is None else options.t_init
    generator = sid_lsg.SidGenerator.read(options.source, options.base, t_init=t_init)
    parameters = sum(tensor.numel() for tensor in generator.weights.values())
    dtype = str(next(iter(generator.weights.values())).dtype).removeprefix("torch.")
    with options.source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # the file has no checksums of its own
    settings = {"from": str(options.source), "base": str(options.base), "t_init": t_init, "dtype": dtype}
    settings |= {"sha256": digest}
    room = bytes_of(generator.weights.values())
    output = Destination(options, ("unet/", "scheduler/", pipeline_files.INDEX), room)
    if options.dry_run:
        return dry_run(settings, {"unet": parameters}, output.planned())
    with output.folder() as folder:
        generator.save(folder)
    values = {"output_dir": str(options.output_dir), **settings, "parameters": parameters}
    text = (
        f"{options.source}: {parameters:,} weights, SHA-256 {digest}.\nA pipeline that draws in one step from timestep "
        f"{t_init}, with guidance_scale=0: {options.output_dir}."
    )
    return Outcome(values, text)
