"""Labelled images that a baseline draws its batches from: given ones, or the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.baselines.config import BaselineConfig
from pecker_fast.classes import Classes, check_same
from pecker_fast.data import ImageData
from pecker_fast.sampling import EpsilonModel, ddim_sample
from pecker_fast.schedule import NoiseSchedule


class Images:
    """Images of some classes, on the device that draws from them.

    Args:
        images: (N, *sample_shape) in [-1, 1].
        labels: (N,) int64.
        rng: Where draws come from.
    """

    def __init__(self, images: Tensor, labels: Tensor, rng: torch.Generator) -> None:
        self.images = images
        self.labels = labels
        self.rng = rng

    @classmethod
    def of(cls, data: ImageData, classes: Sequence[int], rng: torch.Generator, dtype: torch.dtype) -> Images:
        """Those of ``classes``."""
        chosen = torch.isin(data.labels, torch.tensor(classes, device=data.labels.device))
        return cls(data.images[chosen].to(rng.device, dtype), data.labels[chosen].to(rng.device), rng)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` images and their labels, with replacement."""
        index = torch.randint(len(self.images), (count,), generator=self.rng, device=self.rng.device)
        return self.images[index], self.labels[index]

    def epochs(self, batches: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``batches`` of ``size``, every image once before any comes again."""
        order = torch.zeros(0, dtype=torch.int64, device=self.rng.device)
        for _ in range(batches):
            while len(order) < size:
                again = torch.randperm(len(self.images), generator=self.rng, device=self.rng.device)
                order = torch.cat([order, again])
            index, order = order[:size], order[size:]
            yield self.images[index], self.labels[index]


def check_data(
    data: ImageData | None, config: BaselineConfig, needed: Sequence[str], known: Classes | None = None
) -> None:
    """Refuse images that a method cannot be trained on.

    Args:
        data: The images.
        config: Classes and shape that they must have.
        needed: Of "retain" and "forget", what the method looks at.
        known: What the model says of its classes.

    Raises:
        ValueError: There are none, or of other shapes or classes, or none of a class that is needed.
    """
    if data is None:
        if needed:
            raise ValueError(f"Baseline: method {config.method!r} trains on labelled images; give data=ImageData(...)")
        return
    if tuple(data.images.shape[1:]) != config.sample_shape:
        raise ValueError(f"data: expected images of {config.sample_shape}, got {tuple(data.images.shape[1:])}")
    if len(data.class_names) != config.num_classes:
        raise ValueError(f"data: expected {config.num_classes} classes, the model's, got {len(data.class_names)}")
    own = Classes.of_images(data)
    if known is not None:
        check_same({"the model": known, "data": own})
    for part in needed:
        classes = config.forget if part == "forget" else config.retained
        if missing := [label for label in classes if label in own.unseen]:
            raise ValueError(
                f"data: method {config.method!r} needs images of every class to {part}, there are none of class "
                f"{own.text(missing[:1])}"
            )


@torch.no_grad()
def generated(
    model: EpsilonModel,
    schedule: NoiseSchedule,
    config: BaselineConfig,
    labels: Tensor,
    rng: torch.Generator,
    dtype: torch.dtype,
    *,
    progress: bool = False,
) -> Images:
    """The model's own images, drawn by DDIM in batches of ``config.batch_size``; they stay on its device."""
    parts, steps, clip = [], config.sampling_steps, config.clip_samples
    with tqdm(total=len(labels), desc="sampling", unit="image", disable=not progress) as bar:
        for some in labels.to(rng.device).split(config.batch_size):
            noise = torch.randn((len(some), *config.sample_shape), generator=rng, device=rng.device).to(dtype)
            parts.append(ddim_sample(model, schedule, noise, some, steps=steps, clip=clip))
            bar.update(len(some))
    return Images(torch.cat(parts), labels.to(rng.device), rng)
