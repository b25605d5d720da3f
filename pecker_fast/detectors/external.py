"""Anybody's detector, by where it is: ``module:name`` or ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pecker_fast.detectors.detector import Detector, Pixels, Values, check_threshold, sha256_of
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_files import EvaluationPrompt


class External:
    """A function of images as a detector.

    The function maps (N, H, W, 3) uint8 to (N,) probabilities that the concept (the named person, say) is seen; NaN
    where it cannot tell, as where there is no face. Measures: ``seen`` (at least the threshold), ``probability`` (mean
    over images with one) and ``no_face`` (share of NaN): the two figures of evaluations by a celebrity detector.
    """

    def __init__(
        self,
        function: Callable[[Pixels], Any],
        *,
        threshold: float = 0.5,
        name: str | None = None,
        source: Path | None = None,
    ) -> None:
        """Wrap a function.

        Args:
            function: Images to probabilities.
            threshold: Least probability that counts as seen.
            name: For reports; None takes the function's.
            source: The file that it comes from, whose SHA-256 is recorded.

        Raises:
            ValueError: The threshold is out of range.
        """
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.threshold = check_threshold(self.name, threshold)
        self._function, self._source = function, source
        self._source_sha256 = None if source is None else sha256_of(source)

    def describe(self) -> dict[str, Any]:
        """Name, threshold, and which code it is; what weights the function loads it alone knows."""
        module = sys.modules.get(getattr(self._function, "__module__", ""))
        return {
            "name": self.name,
            "version": getattr(module, "__version__", None),
            "threshold": self.threshold,
            "source": None if self._source is None else self._source.name,
            "source_sha256": self._source_sha256,
            "sha256": None,
        }

    def measure(self, images: Pixels, prompts: Sequence[EvaluationPrompt]) -> Mapping[str, Values]:
        """Ask the function.

        Raises:
            ValueError: It gave something else than (N,) probabilities.
        """
        found = np.asarray(self._function(images), dtype=float)
        told = ~np.isnan(found)
        if found.shape != (len(images),) or not np.all((found[told] >= 0) & (found[told] <= 1)):
            raise ValueError(
                f"{self.name}: expected {len(images)} probabilities from 0 to 1 (NaN: no face), got shape {found.shape}"
                + (f", {np.nanmin(found):g} to {np.nanmax(found):g}" if told.any() else "")
            )
        return {"seen": np.where(told, found, -1.0) >= self.threshold, "probability": found, "no_face": ~told}


def load_detector(place: str, *, threshold: float | None = None) -> Detector:
    """The detector at ``module:name`` or ``file.py:name``.

    ``name`` is a function of images (see ``External``), a class of no arguments with the two methods of ``Detector``,
    or an instance of one. **This runs the code there.**

    Args:
        place: Where it is.
        threshold: Of a function, 0.5 if None; others have their own.

    Raises:
        FileFormatError: There is no such file.
        ImportError: There is no such module, or it cannot be imported.
        ValueError: There is no such name, it is nothing of the above, or it has a threshold of its own.
    """
    where, colon, name = place.rpartition(":")
    if not (colon and where and name):
        raise ValueError(f"expected module:name or file.py:name, got {place!r}")
    module, file = _module(where)
    if not hasattr(module, name):
        raise ValueError(f"{place}: {where} has no {name}")
    found = getattr(module, name)
    if inspect.isclass(found):
        found = found()
    if isinstance(found, Detector):
        if threshold is not None:
            raise ValueError(f"{place}: has a threshold of its own; set it there")
        return found
    if not callable(found):
        raise ValueError(f"{place}: expected a function of images, or describe and measure, got {type(found).__name__}")
    return External(found, threshold=0.5 if threshold is None else threshold, name=place, source=file)


def _module(where: str) -> tuple[ModuleType, Path | None]:
    if not where.endswith(".py"):
        module = importlib.import_module(where)
        return module, None if getattr(module, "__file__", None) is None else Path(str(module.__file__))
    file = Path(where)
    if not file.is_file():
        raise FileFormatError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(f"_detector_{sha256_of(file)[:16]}_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ImportError(f"{file}: not Python that can be read: {error}") from error
    return module, file
