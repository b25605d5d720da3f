"""The loss threshold attack on a noise-predicting network: scores for `membership_inference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pecker_fast.errors import NonFiniteError
from pecker_fast.schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t, t, label) -> epsilon``: any module or function of that signature."""


@torch.no_grad()
def denoising_scores(
    predict: Predict,
    schedule: NoiseSchedule,
    images: Tensor,
    labels: Tensor,
    *,
    timesteps: Sequence[int],
    seeds: Sequence[int] = (0,),
    batch_size: int = 256,
) -> Tensor:
    """Scores of the loss threshold attack (Yeom et al. 2018, arXiv 1709.01604) on a noise-predicting network.

    ``-mean over timesteps, seeds, pixels of (epsilon - epsilon_theta(x_t, t, label))^2``: an image whose noise is
    predicted well is taken for a member. All images meet the same noise at the same timesteps, so that scores
    differ by image alone and do not depend on the batch size or on which images are scored together.

    Args:
        predict: ``(x_t, t, label) -> epsilon``; a module must be in eval mode.
        schedule: The schedule that the network was trained with.
        images: (N, C, H, W) in [-1, 1], on the network's device and in its dtype.
        labels: (N,) labels.
        timesteps: Timesteps to add noise at.
        seeds: Of the noises, one a seed and timestep.
        batch_size: Images a forward.

    Returns:
        (N,) float64 scores on the device of the images.

    Raises:
        ValueError: An argument is empty or out of range.
        NonFiniteError: The network predicts NaN or infinite values.
    """
    if images.ndim != 4 or len(images) == 0 or labels.shape != (len(images),):
        raise ValueError(
            f"expected images (N, C, H, W) and labels (N,), got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if not timesteps or not seeds or batch_size < 1:
        raise ValueError(
            f"expected at least one timestep and seed, and batch_size of at least 1, "
            f"got {timesteps}, {seeds} and {batch_size}"
        )
    scores = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for t in timesteps:
            noise = torch.randn(images.shape[1:], generator=draw, dtype=torch.float64, device="cpu").to(images)
            for part in torch.arange(len(images), device=images.device).split(batch_size):
                scores[part] -= _noise_errors(predict, schedule, images[part], labels[part], t, noise)
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("the network predicts NaN or infinite noise; are its weights damaged?")
    return scores / (len(timesteps) * len(seeds))


def _noise_errors(
    predict: Predict, schedule: NoiseSchedule, images: Tensor, labels: Tensor, t: int, noise: Tensor
) -> Tensor:
    """Mean squared error of the predicted noise, (B,) float64."""
    x_t = schedule.add_noise(images, noise.expand_as(images), t)
    epsilon = predict(x_t, torch.full_like(labels, t, dtype=torch.int64), labels)
    if epsilon.shape != images.shape:
        raise ValueError(f"predict: expected noise of shape {tuple(images.shape)}, got {tuple(epsilon.shape)}")
    return (epsilon - noise).double().square().flatten(1).mean(dim=1)
