"""Files that commands read and write: images as npz or PNG, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecker_fast.checkpoint import atomic_file
from pecker_fast.data import ImageData
from pecker_fast.data.npz import read_npz
from pecker_fast.errors import FileFormatError

Pixels = npt.NDArray[np.uint8]


def write_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write aside and rename, so that ``file`` is complete or absent.

    Raises:
        FileFormatError: The file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as unfinished, unfinished.open("wb") as stream:
            write(stream)
    except OSError as error:
        raise FileFormatError(f"{file}: cannot be written ({error.strerror})") from error


def to_pixels(images: Tensor) -> Pixels:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, rounded."""
    return images.detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()


def write_images(
    file: Path, images: Tensor, labels: Tensor, columns: int, class_names: Sequence[str] | None = None
) -> None:
    """Write images as an npz with ``images``, ``labels`` and ``class_names``, or as a grid if ``file`` ends in .png.

    Args:
        file: Where to.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) int64.
        columns: Images in a row of the grid.
        class_names: One a class, for the npz; None leaves them out.

    Raises:
        FileFormatError: The file cannot be written.
        ImportError: A PNG is asked for, and Pillow is not installed.
    """
    pixels = to_pixels(images)
    if file.suffix.lower() == ".png":
        _write_grid(file, pixels, columns)
        return
    arrays: dict[str, Any] = {"images": pixels, "labels": labels.cpu().numpy()}
    if class_names is not None:
        arrays["class_names"] = np.array(class_names, dtype=np.str_)
    write_file(file, lambda stream: np.savez_compressed(stream, **arrays))


def read_images(file: Path, sample_shape: Sequence[int]) -> ImageData:
    """Read an npz that ``write_images`` wrote; nothing is unpickled.

    Args:
        file: The npz.
        sample_shape: (C, H, W) that the images must have.

    Returns:
        Images (N, C, H, W) float32 in [-1, 1], labels (N,) int64, names of classes.

    Raises:
        FileFormatError: The file is missing, truncated, or holds something else.
    """
    stored = read_npz(file)
    if stored.shape != tuple(sample_shape):
        channels, height, width = sample_shape
        got, high, wide = stored.shape
        raise FileFormatError(
            f"{file}: expected images (N, {height}, {width}, {channels}), got (N, {high}, {wide}, {got}); "
            "draw them with pecker-fast sample from a model of that size"
        )
    return stored.load()


def _write_grid(file: Path, pixels: Pixels, columns: int) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "writing a PNG needs Pillow, which is not installed; run: pip install pecker_fast[demo], or write an .npz"
        ) from error
    count, height, width, channels = pixels.shape
    if channels not in (1, 3):
        raise ValueError(f"{file}: a PNG holds 1 or 3 channels, the model has {channels}; write an .npz")
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    scale = max(1, 32 // height)  # tiny images are hard to see
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_file(file, lambda stream: picture.save(stream, format="png"))
