"""Data sets that commands are given, checked against the model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pecker_fast.commands.classes import is_of_digits, name_unseen, same_classes
from pecker_fast.data import ImageData, load_dataset, load_digits
from pecker_fast.data.dataset import Split

if TYPE_CHECKING:
    from pecker_fast.commands.source import Source


def load_images(path: Path | None, source: Source, *, split: Split = "train", limit: int | None = None) -> ImageData:
    """Read the images of a model's classes, in the model's size and channels.

    Args:
        path: Whatever `pecker_fast.data.load_dataset` reads; None takes the digits, for a model of digits.
        source: The model; only ``sample_shape`` and ``classes`` are looked at.
        split: Which part of it.
        limit: At most so many images, evenly spaced.

    Raises:
        FileFormatError: The data are missing or damaged, or their classes are not the model's.
        ValueError: The images cannot be averaged to the model's size, or no path for a model of something else.
    """
    channels, size, _ = source.sample_shape
    if path is None:
        if not is_of_digits(source.sample_shape, source.classes):
            raise ValueError(
                f"--train_data_dir: needed, because the model draws {source.num_classes} classes of "
                f"{source.sample_shape}, not the digits"
            )
        return load_digits()
    data = load_dataset(path, image_size=size, channels=channels, split=split, limit=limit)
    same_classes({"the model": source.classes, str(path): name_unseen(str(path), data)})
    return data
