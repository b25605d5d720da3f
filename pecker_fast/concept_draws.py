"""Images of prompts from a pipeline's folder: what it is, how it is sampled, and one noise a prompt and seed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pecker_fast.checkpoint import StrPath, read_json
from pecker_fast.detectors import Pixels, sha256_of
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.foreign_weights import check_files
from pecker_fast.git_lfs import refuse_pointer
from pecker_fast.models.one_step_scheduler import one_step_t_init
from pecker_fast.models.pipeline_families import FAMILIES, PipelineFamily, image_size
from pecker_fast.prompt_files import EvaluationPrompt

INDEX = "model_index.json"
STEPS, GUIDANCE_SCALE = 50, 7.5
"""What Stable Diffusion is drawn with where nothing else is said."""
_STEM, _STEM_OF_TEXT_ENCODER = "diffusion_pytorch_model", "model"


@dataclass(frozen=True)
class PipelineFolder:
    """A Stable Diffusion folder whose files have been looked at, but not loaded.

    Attributes:
        folder: Where it is.
        family: Which kind it is.
        image_size: Height and width of what it draws.
        scheduler: Its scheduler's configuration, as stored.
        one_step: Whether the scheduler is that of a one-step generator.
    """

    folder: Path
    family: PipelineFamily
    image_size: tuple[int, int]
    scheduler: Mapping[str, Any]
    one_step: bool

    def describe(self) -> dict[str, Any]:
        """What its images depend on but for its scheduler, as plain JSON values; reads the UNet's weights once."""
        files = sorted((self.folder / "unet").glob(f"{_STEM}*.safetensors"))
        return {
            "folder": str(self.folder),
            "unet_sha256": {file.name: sha256_of(file) for file in files},
            "one_step": self.one_step,
            "image_size": list(self.image_size),
            "safety_checker": "not used: it would black out what is measured",
        }


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is run.

    Attributes:
        num_inference_steps: Steps of its scheduler.
        guidance_scale: Of classifier-free guidance.
        own_guidance: Whether a prompt's own guidance, where its file has one, comes first.
    """

    num_inference_steps: int
    guidance_scale: float
    own_guidance: bool

    def guidance_of(self, prompt: EvaluationPrompt) -> float:
        """The guidance that a prompt is drawn with."""
        own = prompt.guidance_scale if self.own_guidance else None
        return self.guidance_scale if own is None else own


def is_pipeline(folder: StrPath) -> bool:
    """Whether it is the folder of a diffusers pipeline."""
    return (Path(folder) / INDEX).is_file()


def check_pipeline(folder: StrPath) -> PipelineFolder:
    """Look at a folder without loading it.

    Raises:
        FileFormatError: It is missing, damaged, another kind of pipeline, or its weights are not safetensors.
    """
    root = Path(folder)
    kind = read_json(root / INDEX).get("_class_name")
    found = [family for family in FAMILIES if family.pipeline == kind]
    if not found:
        names = " or ".join(family.pipeline for family in FAMILIES)
        raise FileFormatError(f"{root}: expected a {names}, got {kind!r}; others are not drawn here")
    family = found[0]
    for part, stem in _parts_of(family):
        _check_weights(root / part, stem)
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    return PipelineFolder(root, family, image_size(root), scheduler, one_step_t_init(scheduler) is not None)


def sampling_of(
    pipeline: PipelineFolder, *, steps: int | None = None, guidance: float | None = None, usual_steps: int | None = None
) -> Sampling:
    """What is given; else one step without guidance for a one-step generator, whatever prompt files say; else usual.

    Args:
        pipeline: The folder.
        steps: Number of steps that is asked for.
        guidance: Guidance that is asked for.
        usual_steps: Those of a protocol, for a pipeline of several steps; None takes 50.
    """
    many = STEPS if usual_steps is None else usual_steps
    own_steps, own_guidance = (1, 0.0) if pipeline.one_step else (many, GUIDANCE_SCALE)
    return Sampling(
        own_steps if steps is None else steps,
        own_guidance if guidance is None else guidance,
        own_guidance=guidance is None and not pipeline.one_step,
    )


def load_pipeline(pipeline: PipelineFolder, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Load it with diffusers, from its folder alone, without its safety checker or watermarks.

    Raises:
        FileFormatError: It cannot be loaded, or has weights that are NaN or infinite; the file and the first are named.
        ImportError: diffusers or transformers is not installed.
    """
    diffusers, _ = _libraries()
    for part, stem in _parts_of(pipeline.family):
        check_files(_weights(pipeline.folder / part, stem))
    with quiet_libraries():
        try:
            loaded = getattr(diffusers, pipeline.family.pipeline).from_pretrained(
                pipeline.folder, local_files_only=True, use_safetensors=True, **pipeline.family.plain
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FileFormatError(f"{pipeline.folder}: cannot be loaded: {error}") from error
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device=device, dtype=dtype)


def draw(
    pipeline: Any, prompts: Sequence[EvaluationPrompt], sampling: Sampling, batch_size: int
) -> Iterator[tuple[list[int], Pixels]]:
    """Draw one image a prompt. Its noise comes from its seed alone, on the CPU: the same in any batch, on any device.

    Args:
        pipeline: From ``load_pipeline``.
        prompts: With seeds.
        sampling: How.
        batch_size: Images at a time.

    Yields:
        Positions in ``prompts``, and their images (n, H, W, 3), rounded as diffusers rounds files.

    Raises:
        NonFiniteError: The pipeline drew NaN.
    """
    for positions, guidance in _batches([sampling.guidance_of(prompt) for prompt in prompts], batch_size):
        chosen = [prompts[position] for position in positions]
        images = pipeline(
            [prompt.text for prompt in chosen],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(int(prompt.seed or 0)) for prompt in chosen],
            output_type="np",
        ).images
        if not np.isfinite(images).all():
            raise NonFiniteError(f"the pipeline drew NaN for the prompt {chosen[0].text!r}; try --dtype float32")
        yield positions, np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from a bar a component, and a line for each prompt that is cut.

    Raises:
        ImportError: One of them is not installed.
    """
    libraries = [library.utils.logging for library in _libraries()]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def cut_prompts(pipeline: Any, prompts: Sequence[EvaluationPrompt]) -> int:
    """How many prompts are longer than a tokenizer's limit, and lose their end."""
    texts = list({prompt.text for prompt in prompts})
    cut: set[str] = set()
    for tokenizer in (pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)):
        if tokenizer is not None:
            lengths = map(len, tokenizer(texts)["input_ids"])
            cut |= {text for text, length in zip(texts, lengths, strict=True) if length > tokenizer.model_max_length}
    return sum(prompt.text in cut for prompt in prompts)


def _libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("diffusers"), importlib.import_module("transformers")
    except ImportError as error:
        message = f"drawing needs diffusers and transformers ({error}); run: pip install pecker_fast[diffusers]"
        raise ImportError(message) from error


def _batches(guidances: Sequence[float], size: int) -> Iterator[tuple[list[int], float]]:
    for guidance in dict.fromkeys(guidances):  # a pipeline takes one guidance a call
        alike = [position for position, value in enumerate(guidances) if value == guidance]
        for start in range(0, len(alike), size):
            yield alike[start : start + size], guidance


def _parts_of(family: PipelineFamily) -> list[tuple[str, str]]:
    """Folders with weights, and what their files are called."""
    return [(part, _STEM) for part in ("unet", "vae")] + [
        (part, _STEM_OF_TEXT_ENCODER) for part in family.text_encoders
    ]


def _check_weights(folder: Path, stem: str) -> None:
    read_json(folder / "config.json")
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not whole.is_file() and not index.is_file():
        raise FileFormatError(f"{whole}: no such file; other formats, and variants such as fp16, are not read")
    for file in _weights(folder, stem):
        refuse_pointer(file)
        try:
            with safe_open(file, framework="pt") as stored:
                stored.keys()
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"{file}: damaged: {error}") from error


def _weights(folder: Path, stem: str) -> list[Path]:
    whole = folder / f"{stem}.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*.safetensors"))
