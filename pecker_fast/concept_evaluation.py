"""What a pipeline still draws of an erased concept, and what erasing it did to related ones: before and after."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import pecker_fast
from pecker_fast.checkpoint import StrPath
from pecker_fast.concept_draws import (
    PipelineFolder,
    Sampling,
    check_pipeline,
    cut_prompts,
    draw,
    load_pipeline,
    quiet_libraries,
)
from pecker_fast.concept_draws import sampling_of as _sampling_of
from pecker_fast.concept_tables import CHANGE, Columns, change, collect, rows, set_values
from pecker_fast.detectors import Detector, Pixels
from pecker_fast.leftovers import scratch_folder
from pecker_fast.prompt_files import EvaluationPrompt, PromptSet

CONCEPT, NEIGHBOURS = "concept", "neighbours"
_PACKAGES = ("torch", "diffusers", "transformers", "numpy")

OnImages = Callable[[str, list[int], Pixels], None]


@dataclass(frozen=True)
class ConceptEvaluation:
    """The outcome.

    Attributes:
        values: Everything, as plain JSON values.
        rows: One mapping an image: its set, prompt, seed, and what was measured on it.
    """

    values: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class DrawSettings:
    """How images are drawn; None is left to the pipeline, see ``concept_draws.sampling_of``.

    Attributes:
        num_inference_steps: Steps.
        guidance_scale: Guidance, which then also holds for prompts with one of their own.
        usual_steps: Of a protocol, for pipelines of several steps.
        batch_size: Images at a time; has no part in the result but for rounding.
        device: Where.
        dtype: Of the weights and the arithmetic.
        progress: Whether a bar is shown.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    usual_steps: int | None = None
    batch_size: int = 4
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    progress: bool = False

    def sampling_of(self, pipeline: PipelineFolder) -> Sampling:
        """How this pipeline is run."""
        return _sampling_of(
            pipeline, steps=self.num_inference_steps, guidance=self.guidance_scale, usual_steps=self.usual_steps
        )


def evaluate_concept(
    model: StrPath,
    prompt_sets: Mapping[str, PromptSet],
    detectors: Mapping[str, Detector],
    *,
    original: StrPath | None = None,
    settings: DrawSettings | None = None,
    on_images: OnImages | None = None,
    scratch: StrPath | None = None,
) -> ConceptEvaluation:
    """Draw the same prompts and seeds with the model before and after erasing, and measure both.

    Shares come with Wilson's 95 % interval, means with Student's, all with their N. The images of each prompt and seed
    are compared as they are, too: share that changed at all, mean absolute difference (of the range), PSNR.

    Args:
        model: Stable Diffusion folder after erasing.
        prompt_sets: "concept" and "neighbours", and any others; every prompt has a seed.
        detectors: What looks at the images, by name.
        original: Folder before erasing; without it there is no "before", and damage cannot be told.
        settings: How images are drawn.
        on_images: Called with "before" or "after", positions in the sets one after the other, and images.
        scratch: Folder on a disk with room for all images of one side, which lie there meanwhile; None takes the
            system's temporary folder, which may be memory.

    Raises:
        FileFormatError: A folder cannot be used; both are looked at before anything is drawn.
        ValueError: A set is missing or empty, a prompt has no seed, the two draw images of different sizes, nothing
            would be measured, or a detector gives something else than its protocol says.
        NonFiniteError: A pipeline or a detector gives NaN or infinite values.
    """
    settings = settings or DrawSettings()
    check_sets(prompt_sets)
    if original is None and not detectors:
        raise ValueError("nothing to measure: expected a detector, or the original to compare images with")
    if CHANGE in detectors:
        raise ValueError(f"detectors: {CHANGE} is the name of how far the images moved; choose another one")
    folders = check_folders(model, original)
    prompts = [prompt for chosen in prompt_sets.values() for prompt in chosen.prompts]
    described = {name: detector.describe() for name, detector in detectors.items()}
    sides: dict[str, Columns] = {}
    records: dict[str, Any] = {"before": None}
    with scratch_folder(Path(scratch or tempfile.gettempdir())) as place:
        shape = (len(prompts), *folders["after"].image_size, 3)
        images = np.lib.format.open_memmap(place / "images.npy", "w+", np.uint8, shape)
        for side, folder in folders.items():
            drawing = _Drawing(side, folder, settings, detectors, on_images)
            with quiet_libraries():
                sides[side], records[side] = drawing.measure(prompts, images)
        del images  # some systems remove no file that is mapped
    values = {
        "format": "pecker_fast.concept_evaluation",
        "version": 1,
        "model": records["after"],
        "original": records["before"],
        "same_sampling": None if original is None else _sampled_alike(records["before"], records["after"]),
        "detectors": described,
        "sets": _sets(prompt_sets, sides),
        "versions": {"pecker_fast": pecker_fast.__version__} | {name: metadata.version(name) for name in _PACKAGES},
    }
    return ConceptEvaluation(values, list(rows(prompt_sets, sides)))


def check_folders(model: StrPath, original: StrPath | None) -> dict[str, PipelineFolder]:
    """The folders as "after" and, if there is an original, "before", looked at but not loaded.

    Raises:
        FileFormatError: One of them cannot be used.
        ValueError: They draw images of different sizes.
    """
    folders = {"after": check_pipeline(model)}
    if original is not None:
        folders["before"] = check_pipeline(original)
        after, before = folders["after"].image_size, folders["before"].image_size
        if after != before:
            raise ValueError(f"{model} draws images of {after}, {original} of {before}; they cannot be compared")
    return folders


def check_sets(prompt_sets: Mapping[str, PromptSet]) -> None:
    """Refuse sets that are missing or empty, and prompts without a seed.

    Raises:
        ValueError: They are.
    """
    for name in (CONCEPT, NEIGHBOURS):
        if name not in prompt_sets:
            raise ValueError(f"prompt_sets: expected {CONCEPT} and {NEIGHBOURS}, got {', '.join(prompt_sets) or None}")
    for name, chosen in prompt_sets.items():
        if not chosen.prompts or any(prompt.seed is None for prompt in chosen.prompts):
            raise ValueError(f"prompt_sets: {name}: expected prompts that all have a seed (see with_seeds)")


class _Drawing:
    """One pipeline's images, measured as they come."""

    def __init__(
        self,
        side: str,
        folder: PipelineFolder,
        settings: DrawSettings,
        detectors: Mapping[str, Detector],
        on_images: OnImages | None,
    ) -> None:
        self.side, self.folder, self.settings = side, folder, settings
        self.detectors, self.on_images = detectors, on_images

    def measure(self, prompts: Sequence[EvaluationPrompt], images: Pixels) -> tuple[Columns, dict[str, Any]]:
        """Fills ``images`` with those after erasing; those before it are compared with them."""
        columns: Columns = {}
        sampling = self.settings.sampling_of(self.folder)
        pipeline = load_pipeline(self.folder, self.settings.device, self.settings.dtype)
        bar = tqdm(total=len(prompts), desc=f"Images {self.side}", unit="image", disable=not self.settings.progress)
        with bar:
            for positions, pixels in draw(pipeline, prompts, sampling, self.settings.batch_size):
                if self.side == "after":
                    images[positions] = pixels
                else:
                    collect(columns, CHANGE, change(pixels, images[positions]), positions, len(prompts))
                chosen = [prompts[position] for position in positions]
                for name, detector in self.detectors.items():
                    collect(columns, name, detector.measure(pixels, chosen), positions, len(prompts))
                if self.on_images is not None:
                    self.on_images(self.side, positions, pixels)
                bar.update(len(positions))
        record = self.folder.describe() | asdict(sampling) | {"cut_prompts": cut_prompts(pipeline, prompts)}
        # As it was run: a pipeline mends what it takes for mistakes in what is stored.
        record["scheduler"] = json.loads(pipeline.scheduler.to_json_string())
        return columns, record | {"dtype": str(self.settings.dtype), "device": str(self.settings.device)}


def _sampled_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether images differ for the weights alone."""
    return all(before[key] == after[key] for key in ("scheduler", *(field.name for field in fields(Sampling))))


def _sets(prompt_sets: Mapping[str, PromptSet], sides: Mapping[str, Columns]) -> dict[str, Any]:
    values, start = {}, 0
    for name, chosen in prompt_sets.items():
        values[name] = set_values(chosen, start, sides)
        start += len(chosen.prompts)
    return values
