"""``pecker-fast unlearn --method`` of a baseline: the model stays one of many steps."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from pecker_fast import models
from pecker_fast.baseline_flags import BASELINE_FIELDS, SALUN, SHARED_FIELDS
from pecker_fast.baselines import Baseline, BaselineConfig, salun, salun_mask_config
from pecker_fast.baselines.needs import PARTS
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.classes import chosen, retain_of
from pecker_fast.commands.dataset import load_images
from pecker_fast.commands.output import Destination, bytes_of
from pecker_fast.commands.requests import Request
from pecker_fast.commands.source import Source, fields_of, load_source, mask_settings
from pecker_fast.commands.together import group_of
from pecker_fast.mask import BlockMask
from pecker_fast.mask_config import MaskConfig
from pecker_fast.step_metrics import check_finite

_WRITES = ("model/", "delta/", "mask.safetensors", "baseline_config.json", "metrics.jsonl")


def run(options: argparse.Namespace) -> Outcome:
    """Train by the method's rule; the output folder appears only when all of it is there."""
    if group_of(options) is not None:
        raise ValueError(f"--method {options.method}: trains in one process; only distill trains in several")
    source = load_source(options.pretrained_model_name_or_path, options.device)
    config = baseline_config(options, source)
    mask = None if options.mask_path is None else BlockMask.load(options.mask_path)
    if mask is not None:
        Request(config.forget, config.override, config.retain, None, ()).check_mask(mask, source.model, options)
    needed = PARTS[config.method] or options.train_data_dir is not None
    data = load_images(options.train_data_dir, source) if needed else None
    baseline = Baseline(source.model, source.schedule, config, data=data)
    output = Destination(options, _WRITES, bytes_of(source.model.parameters()))
    if options.dry_run:
        return _dry_run(options, output, source, config, mask)

    started = time.perf_counter()
    with output.folder() as folder:
        if mask is not None:
            baseline.use_mask(mask)
        metrics = list(baseline.run(options.max_train_steps, progress=not options.quiet, label=options.method))
        for step in metrics:
            check_finite(step)
        seconds = time.perf_counter() - started
        baseline.save(folder)
        lines = "".join(json.dumps(dict(step)) + "\n" for step in metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = _values(options, source, baseline, seconds) | dict(metrics[-1])
    return Outcome(values, _text(options, values, source.classes.text(config.forget)))


def baseline_config(options: argparse.Namespace, source: Source) -> BaselineConfig:
    """The settings that the flags ask for, checked against the model.

    Raises:
        ValueError: An unknown class, or a number out of range.
    """
    asked = chosen(options, source.classes)
    own_steps = models.load_config(options.pretrained_model_name_or_path)["generation"]["steps"]
    settings: dict[str, Any] = {
        "forget": asked.forget,
        "override": asked.override,
        "retain": retain_of(source.classes, asked.forget, asked.retain),
        "num_classes": source.num_classes,
        "sample_shape": source.sample_shape,
        "sampling_steps": own_steps,
        **fields_of(options, BASELINE_FIELDS | SHARED_FIELDS),
        "mask": _mask_config(options),
    }
    if options.max_grad_norm is not None:
        settings["max_grad_norm"] = options.max_grad_norm or None
    return salun(**settings) if options.method == SALUN else BaselineConfig(method=options.method, **settings)


def _mask_config(options: argparse.Namespace) -> MaskConfig:
    """Every weight unless flags say otherwise; for SalUn its own mask unless they do."""
    flags: Mapping[str, Any] = mask_settings(options)
    return salun_mask_config(**flags) if options.method == SALUN else MaskConfig(**{"kind": "dense", **flags})


def _dry_run(
    options: argparse.Namespace, output: Destination, source: Source, config: BaselineConfig, mask: BlockMask | None
) -> Outcome:
    density = 1.0 if config.mask.kind == "dense" else config.mask.density
    active = round(density * source.parameters) if mask is None else mask.numel
    settings = {"max_train_steps": options.max_train_steps, **config.to_dict()}
    if (names := source.classes.names_of(config.forget)) is not None:
        settings["forget_class_names"] = names
    return dry_run(settings, {"model": source.parameters, "active_at_most": active}, output.planned())


def _values(options: argparse.Namespace, source: Source, baseline: Baseline, seconds: float) -> dict[str, Any]:
    return {
        "output_dir": str(options.output_dir),
        "model": str(options.output_dir / "model"),
        "method": options.method,
        "forget_class": list(baseline.config.forget),
        "forget_class_names": source.classes.names_of(baseline.config.forget),
        "density": baseline.active.mask.density,
        "trainable_parameters": baseline.active.numel,
        "parameters": source.parameters,
        "seconds": seconds,
    }


def _text(options: argparse.Namespace, values: dict[str, Any], classes: str) -> str:
    return (
        f"Unlearned class {classes} by {options.method} in {values['step']} steps ({values['seconds']:.1f} s), "
        f"training {values['trainable_parameters']:,} of {values['parameters']:,} weights. "
        f"Written to {options.output_dir}."
    )
