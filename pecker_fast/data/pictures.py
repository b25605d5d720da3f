"""Encoded pictures (PNG, JPEG): looked at by their headers, then decoded to 8 bits a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from pecker_fast.data.stored import Pixels
from pecker_fast.errors import FileFormatError

_MODES = {1: "L", 3: "RGB"}
_GREY = {"1", "L", "LA"}
# 8 bits a channel. Pillow would clip or reinterpret others (16-bit grey, CMYK) without saying so.
_READABLE = {*_GREY, "P", "RGB", "RGBA"}
_FORMATS = ("PNG", "JPEG")

Opener = Callable[[], IO[bytes]]


def opener_of(file: Path) -> Opener:
    """Opens a file."""
    return lambda: file.open("rb")


def shape_of(name: str, opener: Opener) -> tuple[int, int, int]:
    """(C, H, W) of a picture by its header; nothing is decoded. Palettes count as colour.

    Raises:
        FileFormatError: It is no PNG or JPEG of 8 bits a channel.
        ImportError: Pillow is not installed.
    """
    with _opened(name, opener) as image:
        return 1 if image.mode in _GREY else 3, image.height, image.width


def decode(name: str, opener: Opener, shape: tuple[int, int, int]) -> Pixels:
    """The pixels, (C, H, W) as ``shape`` says; transparency is dropped.

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
        pixels = np.array(image.convert(_MODES[channels]))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


@contextmanager
def _opened(name: str, opener: Opener) -> Iterator[Any]:
    try:
        from PIL import Image
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
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise FileFormatError(f"{name}: not a readable image ({error}); replace or remove it") from error
