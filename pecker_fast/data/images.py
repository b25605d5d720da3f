"""Labelled images in memory."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images, all of one size.

    Attributes:
        images: (N, C, H, W) float32 in [-1, 1].
        labels: (N,) int64, indices into ``class_names``.
        class_names: One name per class.
        notes: What their reader has to say, a sentence each: which split they are of, what it left out.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes, dtypes and label range.

        Raises:
            ValueError: One of them is not as documented; the message says which.
        """
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.float32:
            raise ValueError(f"images must be (N, C, H, W) float32, got {tuple(images.shape)} {images.dtype}")
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be ({len(images)},) int64 to match the images, got {tuple(labels.shape)} {labels.dtype}"
            )
        classes = len(self.class_names)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"labels must lie in [0, {classes - 1}] for {classes} class names, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def subset(self, indices: Tensor) -> "ImageData":
        """The images at ``indices`` (int64 or bool), in that order, with all class names kept."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def split(self, held_out: float = 0.2, seed: int = 0) -> tuple["ImageData", "ImageData"]:
        """Divide into a training and a held-out part, each class in the same proportion.

        Args:
            held_out: Share of every class (rounded to whole images) that goes into the second part.
            seed: Fixes the choice; the same seed gives the same parts on every machine.

        Returns:
            Training part and held-out part, each in the original order of the images.

        Raises:
            ValueError: ``held_out`` is not strictly between 0 and 1.
        """
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out must lie strictly between 0 and 1, got {held_out}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        for label in range(len(self.class_names)):
            members = (self.labels == label).nonzero().squeeze(1).cpu()
            order = torch.randperm(len(members), generator=generator, device="cpu")
            chosen[members[order[: round(held_out * len(members))]]] = True
        return self.subset(~chosen), self.subset(chosen)
