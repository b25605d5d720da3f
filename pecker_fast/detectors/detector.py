"""The two methods that a detector has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pecker_fast.checkpoint import StrPath
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_files import EvaluationPrompt

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]


@runtime_checkable
class Detector(Protocol):
    """Looks at images. What it needs is loaded when it is made, so that what is missing stops a run before it draws."""

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on, as plain JSON values: name, version, thresholds, SHA-256 of the weights."""
        ...

    def measure(self, images: Pixels, prompts: Sequence[EvaluationPrompt], /) -> Mapping[str, Values]:
        """Name of a measure -> one value an image, (N,), which depends on that image and its prompt alone.

        Booleans are reported as a share, and ``seen`` is the name for "the concept is seen". Floating-point numbers are
        reported as a mean. NaN, and what a ``numpy.ma`` array masks, says that there is no such number for an image.

        Args:
            images: (N, H, W, 3) RGB.
            prompts: (N,) what was asked for.
        """
        ...


def sha256_of(file: StrPath) -> str:
    """SHA-256 of a file, in hexadecimal; of a folder, that of its files' names and digests in sorted order.

    Raises:
        FileFormatError: There is no such file.
    """
    path = Path(file)
    try:
        if not path.is_dir():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        names = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    lines = [f"{sha256_of(path / name)}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_threshold(name: str, threshold: float, least: float = 0.0) -> float:
    """A probability from ``least``.

    Raises:
        ValueError: It is not.
    """
    if not least <= threshold <= 1:
        raise ValueError(f"{name}: expected a threshold from {least:g} to 1, got {threshold}")
    return float(threshold)
