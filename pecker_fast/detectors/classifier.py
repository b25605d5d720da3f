"""A classifier that ``pecker-fast judge`` trained, as a detector of one of its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pecker_fast import models
from pecker_fast.checkpoint import StrPath
from pecker_fast.classes import Classes, ClassLabel
from pecker_fast.detectors.detector import Pixels, Values, sha256_of
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.models import DigitsClassifier, ImageClassifier
from pecker_fast.prompt_files import EvaluationPrompt


class Classifier:
    """The concept is seen where the classifier takes the image for that class before all others.

    Measures: ``seen``, ``probability`` (softmax of that class), and ``correct`` for prompts with a label: it is that
    class.
    """

    def __init__(self, folder: StrPath, label: ClassLabel, *, device: torch.device | str = "cpu") -> None:
        """Load it.

        Args:
            folder: Of the classifier.
            label: The class to be seen, by its number or its name.
            device: Where it runs.

        Raises:
            FileFormatError: The folder is missing or damaged, or holds no classifier.
            ValueError: It has no such class, or never saw an image of it.
        """
        network = models.load(folder)
        if not isinstance(network, DigitsClassifier | ImageClassifier):
            raise FileFormatError(f"{folder}: is a model that draws images; expected a classifier's folder")
        known = Classes.of_module(network) or Classes(int(network.config["num_classes"]))
        (found,) = known.find(str(folder), [label])
        known.check_seen(str(folder), [found])
        self.classes, self.label, self.class_names = known.count, found, known.names_of([found])
        self.name, self.sha256 = Path(folder).name, sha256_of(folder)
        self._device, self._network = torch.device(device), network.to(device).eval()

    def describe(self) -> dict[str, Any]:
        """Which classifier, which class, and how images are made to fit."""
        size, channels = (self._network.config[key] for key in ("image_size", "channels"))
        return {
            "name": "classifier",
            "folder": self.name,
            "sha256": self.sha256,
            "class": self.label,
            "class_names": self.class_names,
            "classes": self.classes,
            "threshold": "largest of all classes",
            "resized_to": [channels, size, size],
        }

    @torch.no_grad()
    def measure(self, images: Pixels, prompts: Sequence[EvaluationPrompt]) -> Mapping[str, Values]:
        """Classify.

        Raises:
            ValueError: A prompt's label is none of the classifier's.
            NonFiniteError: Its logits are NaN or infinite.
        """
        logits = self._network(self._fitted(images))
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{self.name}: the classifier's logits are NaN or infinite; are its weights damaged?")
        predicted = logits.argmax(1).cpu().numpy()
        found = {
            "seen": predicted == self.label,
            "probability": logits.double().softmax(1)[:, self.label].cpu().numpy(),
        }
        labels = [prompt.label for prompt in prompts]
        unknown = [label for label in labels if label is not None and not 0 <= label < self.classes]
        if unknown:
            raise ValueError(f"{self.name}: expected labels 0 to {self.classes - 1}, got {unknown[0]}")
        right = [label == guess for label, guess in zip(labels, predicted, strict=True)]
        missing = [label is None for label in labels]
        return found if all(missing) else found | {"correct": np.ma.array(right, mask=missing, dtype=bool)}

    def _fitted(self, images: Pixels) -> Tensor:
        """(N, C, size, size) in [-1, 1]: grey is the mean of the colours, sizes change by antialiased interpolation."""
        config = self._network.config
        inputs = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if config["channels"] == 1:
            inputs = inputs.mean(1, keepdim=True)
        size = (config["image_size"], config["image_size"])
        if inputs.shape[2:] != size:
            inputs = F.interpolate(inputs, size, mode="bilinear", antialias=True)
        return inputs.clamp(-1, 1)
