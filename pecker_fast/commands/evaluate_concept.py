"""``pecker-fast evaluate`` of a pipeline: what is left of the concept, and what became of its neighbours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pecker_fast.checkpoint import write_json
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.concept_pictures import GRID, ConceptPictures
from pecker_fast.commands.concept_prompts import prompt_sets
from pecker_fast.commands.output import Destination
from pecker_fast.commands.source import fields_of, torch_device
from pecker_fast.concept_evaluation import ConceptEvaluation, DrawSettings, check_folders, evaluate_concept
from pecker_fast.detectors import Classifier, ClipScore, Detector, NudeNet, load_detector
from pecker_fast.evaluate_flags import BUILT_IN
from pecker_fast.prompt_files import PromptSet

RESULTS, ROWS = "results.json", "images.jsonl"


def run(options: argparse.Namespace) -> Outcome:
    """Draw, measure, and write what was asked for; everything that can be missing is looked for first."""
    sets, protocol = prompt_sets(options)
    folders = check_folders(options.model, options.original)
    if options.save_images and options.output_dir is None:
        raise ValueError("--save_images: name the folder to write to with --output_dir")
    found = detectors(options)
    settings = DrawSettings(
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        usual_steps=None if protocol is None else protocol.num_inference_steps,
        batch_size=options.eval_batch_size,
        device=str(torch_device(options.device)),
        dtype=getattr(torch, options.dtype),
        progress=not options.quiet,
    )
    if options.dry_run:
        return _planned(options, sets, found, {side: settings.sampling_of(at) for side, at in folders.items()})
    with _output(options) as folder:
        pictures = None if folder is None else ConceptPictures(folder, sets, options.save_images)
        evaluation = evaluate_concept(
            options.model,
            sets,
            found,
            original=options.original,
            settings=settings,
            on_images=None if pictures is None else pictures.add,
            scratch=folder,
        )
        if folder is not None and pictures is not None:
            pictures.write()
            _write(folder, evaluation)
    values = evaluation.values | ({} if options.output_dir is None else {"output_dir": str(options.output_dir)})
    return Outcome(values, _text(values))


def detectors(options: argparse.Namespace) -> dict[str, Detector]:
    """Those that the flags ask for, loaded.

    Raises:
        FileFormatError: Weights are missing or damaged.
        ImportError: A package is missing.
        ValueError: A flag lacks the one that it belongs to.
    """
    for flag, owner in (
        ("nudenet_threshold", "nudenet"),
        ("nudenet_labels", "nudenet"),
        ("nudenet_resolution", "nudenet"),
        ("detector_threshold", "detector"),
        ("judge_class", "judge"),
        ("neighbour_classes", "judge"),
        ("neighbour_classes", "neighbour_concepts"),
    ):
        if getattr(options, flag) is not None and getattr(options, owner) is None:
            raise ValueError(f"--{flag}: belongs to --{owner}; give --{owner} too")
    if options.judge is not None and options.judge_class is None:
        raise ValueError("--judge_class: expected the class of --judge that the concept is")
    device, found = torch_device(options.device), dict[str, Detector]()
    if options.nudenet is not None:
        given = fields_of(options, {f"nudenet_{name}": name for name in ("threshold", "labels", "resolution")})
        found["nudenet"] = NudeNet(None if options.nudenet == BUILT_IN else options.nudenet, **given)
    if options.judge is not None:
        found["judge"] = Classifier(options.judge, options.judge_class, device=device)
    for place in options.detector or ():
        found[place] = load_detector(place, threshold=options.detector_threshold)
    if options.clip_model is not None:
        found["clip"] = ClipScore(options.clip_model, device=device)
    return found


def _output(options: argparse.Namespace) -> AbstractContextManager[Path | None]:
    return nullcontext() if options.output_dir is None else _destination(options).folder()


def _destination(options: argparse.Namespace) -> Destination:
    return Destination(options, (RESULTS, ROWS, GRID, *(("images/",) if options.save_images else ())))


def _write(folder: Path, evaluation: ConceptEvaluation) -> None:
    write_json(folder / RESULTS, evaluation.values)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in evaluation.rows)
    (folder / ROWS).write_text(lines, encoding="utf-8")


def _planned(
    options: argparse.Namespace,
    sets: Mapping[str, PromptSet],
    found: Mapping[str, Detector],
    samplings: Mapping[str, Any],
) -> Outcome:
    settings = {
        "model": str(options.model),
        "original": None if options.original is None else str(options.original),
        "images": {name: len(chosen.prompts) for name, chosen in sets.items()},
        "detectors": {name: detector.describe() for name, detector in found.items()},
        "sampling": {side: vars(sampling) for side, sampling in samplings.items()},
    }
    return dry_run(settings, {}, [] if options.output_dir is None else _destination(options).planned())


def _text(values: Mapping[str, Any]) -> str:
    """A block of lines for each set, and one for each neighbour."""
    lines: list[str] = []
    for name, found in values["sets"].items():
        lines += [f"{name}: {found['images']} images", *_lines(found)]
        for concept, part in found.get("by_concept", {}).items():
            lines += [f"  {concept}: {part['images']} images", *(f"  {line}" for line in _lines(part))]
    sides = [side for side in (values["model"], values["original"]) if side is not None]
    if cut := max(side["cut_prompts"] for side in sides):
        total = sum(found["images"] for found in values["sets"].values())
        lines.append(f"{cut} of {total} images are of prompts longer than the tokenizer takes, which lost their end.")
    if values["original"] is None:
        lines.append("No --original: what was there before is unknown, and so is the damage.")
    elif not values["same_sampling"]:
        lines.append("The two were sampled in different ways, so that their images would differ even without erasing.")
    return "\n".join(lines)


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, measures in found["measures"].items():
        for measure, pair in measures.items():
            sides = [pair[side] for side in ("before", "after") if pair[side] is not None]
            lines.append(f"  {name} {measure}: {' -> '.join(map(_figure, sides))}")
    moved = found["change"]
    if moved is not None:
        psnr = "" if moved["psnr_db"] is None else f", PSNR {moved['psnr_db']:.1f} dB"
        lines.append(
            f"  images changed: {_figure(moved['changed'])}, "
            f"mean absolute difference {_figure(moved['mean_absolute_difference'])}{psnr}"
        )
    return lines


def _figure(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    if found["n"] == 0:
        return "no image has one"
    if "share" in found:
        return f"{found['share']:.1%} [{low:.1%}, {high:.1%}]"
    return f"{found['mean']:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
