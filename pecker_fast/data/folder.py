"""Image folders: ``root/<class name>/*.png`` (or jpg), class indices in the order of the sorted names."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pecker_fast.data.images import ImageData
from pecker_fast.errors import FileFormatError

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_PILLOW_MODES = {1: "L", 3: "RGB"}
# 8 bits a channel. Pillow would clip or reinterpret others (16-bit grey, CMYK) without saying so.
_READABLE_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


def load_image_folder(path: str | Path, *, image_size: int, channels: int = 3) -> ImageData:
    """Read every image below ``path``, one folder a class.

    Images are not resized: which filter was used changes Frechet distances, so that is left to the user.
    Transparency is dropped, hidden folders and other files are ignored.

    Args:
        path: Folder with one subfolder per class.
        image_size: Height and width that every image must have.
        channels: 1 (grey) or 3 (RGB); images are converted.

    Returns:
        Images (N, channels, image_size, image_size) float32 in [-1, 1], classes sorted by name, files within.

    Raises:
        FileFormatError: The folder is missing or empty, or an image is unreadable or of another size.
        ValueError: ``channels`` is neither 1 nor 3.
        ImportError: Pillow is not installed.
    """
    if channels not in _PILLOW_MODES:
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    root = Path(path)
    classes = _class_folders(root)
    images, labels = [], []
    for label, folder in enumerate(classes):
        for file in _image_files(folder):
            images.append(_read_image(file, image_size, _PILLOW_MODES[channels]))
            labels.append(label)
    pixels = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    names = tuple(folder.name for folder in classes)
    return ImageData(pixels.float().div_(127.5).sub_(1), torch.tensor(labels, dtype=torch.int64), names)


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileFormatError(f"{root}: no such folder; expected one subfolder per class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise FileFormatError(f"{root}: holds no class folders; put each class into a subfolder of its own")
    return folders


def _image_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise FileFormatError(f"{folder}: holds no .png or .jpg images; add some or remove the folder")
    return files


def _read_image(file: Path, image_size: int, mode: str) -> Tensor:
    """Read one file as (H, W, C) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow, which is not installed; run: pip install pecker_fast[demo]"
        ) from error
    try:
        with Image.open(file) as image:
            # Both are known from the header: nothing large or strange is ever decoded.
            _check_header(file, image.size, image.mode, image_size)
            pixels = np.array(image.convert(mode))
    except FileFormatError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileFormatError(f"{file}: not a readable image ({error}); replace or remove it") from error
    return torch.from_numpy(pixels).view(image_size, image_size, -1)


def _check_header(file: Path, size: tuple[int, int], mode: str, image_size: int) -> None:
    if size != (image_size, image_size):
        raise FileFormatError(
            f"{file}: expected {image_size}x{image_size} pixels, got {size[0]}x{size[1]}; "
            "resize the images first or pass another image_size"
        )
    if mode not in _READABLE_MODES:
        raise FileFormatError(f"{file}: expected 8-bit grey or RGB, got mode {mode!r}; convert it first")
