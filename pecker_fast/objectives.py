"""The losses of Score Forgetting Distillation as pure functions of predictions: one value a sample, no networks.

Score Forgetting Distillation: Chen et al. 2024, arXiv 2409.11219; its generator loss is SiD's, arXiv 2404.04057.
"""

from __future__ import annotations

from torch import Tensor

from pecker_fast.ops.sid_loss import OMEGA_MIN, sid_loss

__all__ = ["denoising_loss", "score_difference_loss", "sid_loss", "sid_loss_of_samples"]


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


def sid_loss_of_samples(x0: Tensor, x0_true: Tensor, x0_fake: Tensor, alpha: float = 1.2) -> Tensor:
    """SiD's generator loss of every sample as it is published, in estimates of x0, differentiated by autograd.

    ``omega = (x0_true - x0).abs().mean().clamp(min=1e-5).detach()`` and
    ``((x0_true - x0_fake) * ((x0_true - x0) - alpha * (x0_true - x0_fake))).sum() / omega``, each sample by itself.
    The value and the gradient through both predictions are those of ``sid_loss``, which needs one pass instead.

    Args:
        x0: Samples of the generator, (batch, ...).
        x0_true: What the true score makes of the noisy samples, same shape.
        x0_fake: What the fake score makes of them, same shape.
        alpha: SiD's alpha.

    Returns:
        (batch,).
    """
    difference, missing = x0_true - x0_fake, x0_true - x0
    omega = missing.detach().abs().flatten(1).mean(1).clamp(min=OMEGA_MIN)
    return (difference * (missing - alpha * difference)).flatten(1).sum(1) / omega


def score_difference_loss(
    x0: Tensor, epsilon: Tensor, epsilon_true: Tensor, epsilon_fake: Tensor, sigma: Tensor
) -> Tensor:
    """Loss of every sample whose gradient is the difference of the scores, with no part through the networks.

    Diff-Instruct (Luo et al. 2023, arXiv 2305.18455) in the form that Score Forgetting Distillation's code has: with
    ``d = epsilon_fake - epsilon_true`` and ``omega = clamp(sigma * mean|epsilon - epsilon_true|, 1e-5)`` the gradient
    with respect to x0 is ``-sigma * d / omega``; the value is that of ``sid_loss`` with alpha 1.

    Args:
        x0: Samples of the generator, (batch, ...); the loss is differentiable in these alone.
        epsilon: Noise that was added, same shape.
        epsilon_true: Prediction of the true score, same shape.
        epsilon_fake: Prediction of the fake score, same shape.
        sigma: b / a at each sample's timestep, (batch,).

    Returns:
        (batch,).
    """
    shape = (-1, *[1] * (x0.dim() - 1))
    epsilon_true, epsilon_fake = epsilon_true.detach(), epsilon_fake.detach()
    omega = (sigma * (epsilon - epsilon_true).flatten(1).abs().mean(1)).clamp(min=OMEGA_MIN)
    direction = (sigma / omega).view(shape) * (epsilon_fake - epsilon_true)
    missing = sigma.view(shape) * (epsilon - epsilon_fake) + x0.detach() - x0
    return (direction * missing).flatten(1).sum(1)
