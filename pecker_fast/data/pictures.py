"""Encoded pictures: looked at by their headers, then decoded to 8 bits a channel, upright."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from pecker_fast.data.stored import Pixels
from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are read as pictures, in lower case; what they are, their content says."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}
_GREY = {"1", "L", "LA"}
# 8 bits a channel. Pillow would clip or reinterpret others (16-bit grey, CMYK) without saying so.
_READABLE = {*_GREY, "P", "PA", "RGB", "RGBA"}

Opener = Callable[[], IO[bytes]]


def is_picture(file: Path) -> bool:
    """Whether a file is read as a picture, by its name."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def opener_of(file: Path) -> Opener:
    """Opens a file."""
    return lambda: file.open("rb")


def shape_of(name: str, opener: Opener) -> tuple[int, int, int]:
    """(C, H, W) of a picture by its header; nothing is decoded. Palettes count as colour.

    Raises:
        FileFormatError: It is no picture of 8 bits a channel.
        ImportError: Pillow is not installed.
    """
    with _opened(name, opener) as image:
        return 1 if image.mode in _GREY else 3, image.height, image.width


def common_shape(source: Path, pictures: Iterable[tuple[str, Opener]]) -> tuple[int, int, int]:
    """(C, H, W) of all: the size of the first, which the others must have when they are decoded; colour if any has it.

    Headers are looked at up to the first picture in colour; all of them where all are grey.

    Args:
        source: What an error names where there are no pictures.
        pictures: Name for messages and opener of each.

    Raises:
        FileFormatError: There are none, or one is no picture of 8 bits a channel.
        ImportError: Pillow is not installed.
    """
    size = None
    for name, opener in pictures:
        channels, *own = shape_of(name, opener)
        size = size or own
        if channels == 3:
            return 3, size[0], size[1]
    if size is None:
        raise FileFormatError(f"{source}: holds no images")
    return 1, size[0], size[1]


def decode(name: str, opener: Opener, shape: tuple[int, int, int]) -> Pixels:
    """The pixels, (C, H, W) as ``shape`` says, turned as EXIF says; transparency is dropped.

    Of several pictures in a file it is the first.

    Raises:
        FileFormatError: The picture has another size, or is damaged.
        ImportError: Pillow is not installed.
    """
    channels, height, width = shape
    with _opened(name, opener) as image:
        # Known from the header: nothing large or strange is ever decoded.
        if image.size != (width, height):
            raise FileFormatError(
                f"{name}: expected {width}x{height} pixels, got {image.width}x{image.height}; "
                "resize the images first or pass another image_size"
            )
        pixels = np.array(_upright(image).convert(_MODES[channels]))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _upright(image: Any) -> Any:
    """As cameras mean it: many store the picture as the sensor lay, and how to turn it. Sizes are square here."""
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    # With the transparency of a palette Pillow wants to be asked for it before it is dropped.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


@contextmanager
def _opened(name: str, opener: Opener) -> Iterator[Any]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow, which is not installed; run: pip install pecker_fast[demo]"
        ) from error
    try:
        with opener() as stream, Image.open(stream, formats=_FORMATS) as image:
            if image.mode not in _READABLE:
                raise FileFormatError(f"{name}: expected 8-bit grey or RGB, got mode {image.mode!r}; convert it first")
            yield image
    except FileFormatError:
        raise
    except UnidentifiedImageError as error:
        with opener() as stream:
            refuse_pointer(name, stream.read(100))
        raise FileFormatError(f"{name}: not a readable image ({error}); replace or remove it") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise FileFormatError(f"{name}: not a readable image ({error}); replace or remove it") from error
