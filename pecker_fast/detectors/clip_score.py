"""CLIP score: how near an image is to its prompt, by a CLIP model in a local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pecker_fast.checkpoint import StrPath, read_json
from pecker_fast.detectors.detector import Pixels, Values, sha256_of
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.foreign_weights import check_files
from pecker_fast.prompt_files import EvaluationPrompt


class ClipScore:
    """``100 cos(image, prompt)`` of CLIP's projected embeddings, not cut off at zero; measure ``clip_score``.

    A prompt longer than the model's tokens is cut. The number says whether an image fits *its own* prompt: of a prompt
    with the forgotten concept it should fall, of others it should not.
    """

    def __init__(self, folder: StrPath, *, device: torch.device | str = "cpu") -> None:
        """Load it.

        Args:
            folder: Of transformers' ``CLIPModel`` with its processor, weights as safetensors.
            device: Where it runs.

        Raises:
            FileFormatError: The folder is missing or damaged, or holds another model.
            ImportError: transformers is not installed.
        """
        self._device, self._folder = torch.device(device), Path(folder)
        kind = read_json(self._folder / "config.json").get("model_type")
        if kind != "clip":
            raise FileFormatError(
                f"{folder}: expected a CLIP model, whose config.json says model_type clip, got {kind!r}"
            )
        self._model, self._processor = self._load()
        self._sha256 = sha256_of(self._folder / "model.safetensors")

    def describe(self) -> dict[str, Any]:
        """Which CLIP."""
        config = self._model.config
        return {
            "name": "clip",
            "folder": self._folder.name,
            "sha256": self._sha256,
            "version": f"transformers {metadata.version('transformers')}",
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "layers": config.vision_config.num_hidden_layers,
            "threshold": None,
        }

    @torch.no_grad()
    def measure(self, images: Pixels, prompts: Sequence[EvaluationPrompt]) -> Mapping[str, Values]:
        """Score.

        Raises:
            NonFiniteError: An embedding is NaN or infinite.
        """
        inputs = self._processor(
            text=[prompt.text for prompt in prompts],
            images=list(images),
            return_tensors="pt",
            padding="max_length",  # so that no prompt's embedding depends on its neighbours' lengths
            max_length=self._model.config.text_config.max_position_embeddings,
            truncation=True,
        ).to(self._device)
        found = self._model(**inputs)
        score = 100 * torch.nn.functional.cosine_similarity(found.image_embeds.double(), found.text_embeds.double())
        if not bool(score.isfinite().all()):
            raise NonFiniteError(f"{self._folder}: CLIP's embeddings are NaN or infinite; are its weights damaged?")
        return {"clip_score": np.asarray(score.cpu())}

    def _load(self) -> tuple[Any, Any]:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ImportError(
                f"CLIP score needs transformers ({error}); run: pip install pecker_fast[diffusers]"
            ) from error
        if not (self._folder / "model.safetensors").is_file():
            raise FileFormatError(f"{self._folder}: no model.safetensors; other formats are not read")
        check_files([self._folder / "model.safetensors"])
        try:
            model = CLIPModel.from_pretrained(self._folder, local_files_only=True, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(self._folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise FileFormatError(f"{self._folder}: cannot be loaded as a CLIP model: {error}") from error
        return model.to(self._device).eval(), processor
