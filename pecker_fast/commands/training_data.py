"""The images that ``--train_data_dir`` names, or the built-in digits."""

from __future__ import annotations

import argparse

from pecker_fast.commands.classes import name_unseen
from pecker_fast.data import ImageData, load_dataset, load_digits


def load_training_data(options: argparse.Namespace) -> ImageData:
    """Read what the flags name, as `pecker_fast.data.load_dataset` does; classes without an image are told.

    Raises:
        FileFormatError: The data are missing or damaged.
        ValueError: Flags of a folder without one, or a size that the images cannot be averaged to.
    """
    if options.train_data_dir is not None:
        data = load_dataset(
            options.train_data_dir,
            image_size=options.resolution,
            channels=options.channels,
            split=options.split,
            format=options.data_format,
            limit=options.max_train_samples,
        )
        name_unseen(str(options.train_data_dir), data)
        return data
    if options.resolution not in (None, 8):
        raise ValueError(f"--resolution: the built-in digits are 8x8, got {options.resolution}; give --train_data_dir")
    for flag in ("data_format", "max_train_samples"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag}: says how --train_data_dir is read; give --train_data_dir too")
    return load_digits()
