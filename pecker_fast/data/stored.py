"""Images as files hold them, 8 bits a channel, and the one way from there into an `ImageData`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pecker_fast.data.files import MAX_BYTES
from pecker_fast.data.images import ImageData
from pecker_fast.errors import FileFormatError

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

BLOCK = 256
"""Images that are converted at a time."""
MAX_SIDE = 4096
_MAX_CLASSES = 100_000


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Labelled images that are still in their files.

    Attributes:
        source: What error messages name.
        shape: (C, H, W) of every image, C is 1 or 3.
        labels: (N,) int64, indices into ``class_names``.
        class_names: One name per class.
        read: Ascending indices -> blocks (n, C, H, W) uint8, in that order.
        notes: What there is to say about them, for `ImageData.notes`.
    """

    source: Path
    shape: tuple[int, int, int]
    labels: Indices
    class_names: tuple[str, ...]
    read: Callable[[Indices], Iterator[Pixels]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no reader may return.

        Raises:
            FileFormatError: There are no images, or they are neither grey nor RGB, or not square.
        """
        channels, height, width = self.shape
        if len(self.labels) == 0:
            raise FileFormatError(f"{self.source}: holds no images")
        if channels not in (1, 3) or height != width or height < 1:
            raise FileFormatError(
                f"{self.source}: expected square images of 1 or 3 channels, got {channels} of {height}x{width}; "
                "crop or convert them first"
            )
        if height > MAX_SIDE or len(self.labels) * channels * height * width > MAX_BYTES:
            raise FileFormatError(
                f"{self.source}: {len(self.labels)} images of {height}x{width} are beyond what is read into memory; "
                "is the file damaged?"
            )

    def load(
        self, *, image_size: int | None = None, channels: int | None = None, limit: int | None = None
    ) -> ImageData:
        """Read and convert, a block at a time.

        Args:
            image_size: Height and width wanted, those of the images or a whole fraction of them: boxes of pixels
                are averaged. None keeps them.
            channels: 1 or 3; colours become ITU-R 601 luma, grey is repeated. None keeps them.
            limit: At most so many images, evenly spaced over the files.

        Raises:
            ValueError: An argument does not fit the images.
            FileFormatError: A file is damaged.
        """
        factor = self._factor(image_size)
        channels = channels or self.shape[0]
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        chosen = spread(len(self.labels), limit)
        size = self.shape[1] // factor
        images = torch.empty(len(chosen), channels, size, size, device="cpu")
        filled = 0
        for block in self.read(chosen):
            pixels = _with_channels(torch.from_numpy(block), channels).float()
            small = F.avg_pool2d(pixels, factor) if factor > 1 else pixels
            images[filled : filled + len(block)] = small.div_(127.5).sub_(1)
            filled += len(block)
        return ImageData(images, torch.from_numpy(self.labels[chosen]), self.class_names, self.notes)

    def _factor(self, image_size: int | None) -> int:
        own = self.shape[1]
        if image_size is None:
            return 1
        if not 0 < image_size <= own or own % image_size:
            fitting = [own // n for n in range(1, own + 1) if own % n == 0 and own // n >= 4] or [own]
            raise ValueError(
                f"{self.source}: the images are {own}x{own}; image_size (--resolution) must be one of "
                f"{', '.join(map(str, fitting))}, so that whole boxes of pixels are averaged, got {image_size}; "
                "resize them first for others"
            )
        return own // image_size


def spread(count: int, limit: int | None) -> Indices:
    """Indices of at most ``limit`` of ``count`` images at even distances: sorted files keep all their classes.

    Raises:
        ValueError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * count // limit


def blocks_of(parts: Sequence[Pixels]) -> Callable[[Indices], Iterator[Pixels]]:
    """``StoredImages.read`` of arrays (N, C, H, W), which may be windows into mapped files."""

    def read(indices: Indices) -> Iterator[Pixels]:
        start = 0
        for part in parts:
            own = indices[(indices >= start) & (indices < start + len(part))] - start
            for first in range(0, len(own), BLOCK):
                yield part[own[first : first + BLOCK]]
            start += len(part)

    return read


def joined(source: Path, parts: Sequence[StoredImages]) -> StoredImages:
    """Several as one, in this order; in colour if one is, and names that one part has fewer of are those of the others.

    Raises:
        FileFormatError: They differ in size or in classes.
    """
    names = max((part.class_names for part in parts), key=len)
    channels = max(part.shape[0] for part in parts)
    for part in parts:
        other = next((pair for pair in zip(part.class_names, names, strict=False) if pair[0] != pair[1]), None)
        if part.shape[1:] != parts[0].shape[1:] or other is not None:
            first = "" if other is None else f": class {names.index(other[1])} is {other[0]!r} there, else {other[1]!r}"
            raise FileFormatError(
                f"{part.source}: {len(part.class_names)} classes of {part.shape} do not go with the "
                f"{len(parts[0].class_names)} of {parts[0].shape} of {parts[0].source}{first}"
            )

    def read(indices: Indices) -> Iterator[Pixels]:
        start = 0
        for part in parts:
            end = start + len(part.labels)
            for block in part.read(indices[(indices >= start) & (indices < end)] - start):
                yield _with_channels(torch.from_numpy(block), channels).numpy()
            start = end

    shape = (channels, *parts[0].shape[1:])
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return StoredImages(source, shape, np.concatenate([part.labels for part in parts]), names, read, notes)


def checked_names(source: Path, labels: Indices, names: Sequence[str] | None) -> tuple[str, ...]:
    """The classes' names: ``names``, or "0", "1" and so on up to the last label.

    Raises:
        FileFormatError: A label is out of range, or two classes have one name.
    """
    if names is not None and (len(set(names)) != len(names) or not all(names)):
        raise FileFormatError(f"{source}: two classes have the same name, or one has none: {', '.join(names)[:200]}")
    classes = _MAX_CLASSES if names is None else len(names)
    bad = ((labels < 0) | (labels >= classes)).nonzero()[0]
    if len(bad):
        hint = "; leave out images that have no class" if labels[bad[0]] < 0 else ""
        raise FileFormatError(
            f"{source}: label {labels[bad[0]]} of image {bad[0]} is out of range; expected 0 to {classes - 1}{hint}"
        )
    return tuple(names) if names is not None else tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) uint8 with as many channels as wanted."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.int().unbind(1)
    # Pillow's luma, to the bit: weights of ITU-R 601 in 16-bit fixed point, rounded.
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return luma.unsqueeze(1).byte()
