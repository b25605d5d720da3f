"""Readers of labelled images; each returns an `ImageData`."""

from pecker_fast.data.dataset import load_dataset
from pecker_fast.data.digits import load_digits
from pecker_fast.data.folder import load_image_folder
from pecker_fast.data.images import ImageData
from pecker_fast.data.npz import write_npz

__all__ = ["ImageData", "load_dataset", "load_digits", "load_image_folder", "write_npz"]
