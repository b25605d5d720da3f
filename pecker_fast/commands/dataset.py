"""The labelled images that a command trains on."""

from __future__ import annotations

from pathlib import Path

from pecker_fast.commands.source import Source
from pecker_fast.data import ImageData, load_digits, load_image_folder
from pecker_fast.errors import FileFormatError

_DIGITS = ((1, 8, 8), 10)


def load_images(path: Path | None, source: Source) -> ImageData:
    """Images as the model of ``source`` draws them, with its classes.

    Args:
        path: Where they are; None takes the digits, for a model of digits.
        source: The model.

    Raises:
        FileFormatError: They cannot be read, or their classes are not the model's.
        ValueError: No path, and a model of something else than digits.
    """
    if path is None:
        if (source.sample_shape, source.num_classes) != _DIGITS:
            raise ValueError(
                f"--train_data_dir: needed, because the model draws {source.num_classes} classes of "
                f"{source.sample_shape}, not the digits"
            )
        return load_digits()
    channels, size, _ = source.sample_shape
    data = load_image_folder(path, image_size=size, channels=channels)
    if len(data.class_names) != source.num_classes:
        raise FileFormatError(
            f"{path}: expected one folder for each of the model's {source.num_classes} classes, "
            f"got {len(data.class_names)}"
        )
    return data
