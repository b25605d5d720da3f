"""The losses of Score Forgetting Distillation as pure functions of predictions: one value a sample, no networks.

Score Forgetting Distillation: Chen et al. 2024, arXiv 2409.11219; its generator loss is SiD's, arXiv 2404.04057.
"""

from __future__ import annotations

from torch import Tensor

from pecker_fast.ops.sid_loss import sid_loss

__all__ = ["denoising_loss", "sid_loss"]


def denoising_loss(epsilon: Tensor, prediction: Tensor) -> Tensor:
    """Noise-prediction loss of every sample: ``((epsilon - prediction) ** 2).flatten(1).sum(1)``.

    It trains the fake score on the generator's samples, and it is the loss of PECKER's saliency pass.

    Args:
        epsilon: Noise that was added, (batch, ...).
        prediction: What the network made of the noisy sample, same shape.

    Returns:
        (batch,).

    Raises:
        ValueError: Shapes differ.
    """
    if epsilon.shape != prediction.shape:
        raise ValueError(
            f"denoising_loss: expected a prediction of shape {tuple(epsilon.shape)}, got {tuple(prediction.shape)}"
        )
    return (epsilon - prediction).square().flatten(1).sum(1)
