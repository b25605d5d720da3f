"""Images from a noise-predicting network: in one step, or in many by deterministic DDIM."""

from collections.abc import Callable

import torch
from torch import Tensor

from pecker_fast.schedule import NoiseSchedule

EpsilonModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t, t, condition) -> epsilon``: any module or function of that signature."""


@torch.no_grad()
def one_step_sample(
    model: EpsilonModel, schedule: NoiseSchedule, noise: Tensor, condition: Tensor, *, t_init: int
) -> Tensor:
    """Denoise pure noise once: ``x_0 = sigma_init (z - epsilon(std_init z, t_init, c))``.

    This is the generator of Score Forgetting Distillation (arXiv 2409.11219), without gradients.

    Args:
        model: Predicts the noise; call ``.eval()`` on it first.
        schedule: The schedule that the model was trained with.
        noise: (B, ...) standard normal ``z``.
        condition: (B, ...) labels or prompt embeddings, passed on to the model.
        t_init: The timestep at which the model is evaluated.

    Returns:
        Samples of the shape and dtype of ``noise``, not clamped.
    """
    t = _full_timesteps(noise, t_init)
    return schedule.sigma(t_init) * (noise - model(schedule.std(t_init) * noise, t, condition))


@torch.no_grad()
def ddim_sample(
    model: EpsilonModel,
    schedule: NoiseSchedule,
    noise: Tensor,
    condition: Tensor,
    *,
    steps: int,
    clip: float | None = None,
) -> Tensor:
    """Sample by deterministic DDIM (eta = 0; Song et al. 2021, arXiv 2010.02502).

    Timesteps are spaced evenly and start at the last one ("trailing", Lin et al. 2024, arXiv 2305.08891).

    Args:
        model: Predicts the noise; call ``.eval()`` on it first.
        schedule: The schedule that the model was trained with.
        noise: (B, ...) standard normal start.
        condition: (B, ...) labels or prompt embeddings, passed on to the model.
        steps: Number of network evaluations, at most the number of training timesteps.
        clip: Clamp each prediction of ``x_0`` to [-clip, clip]: 1 for images in [-1, 1], None for latents.
            At the first timesteps ``sigma`` blows up errors of the network far beyond the range of the data.

    Returns:
        Samples of the shape and dtype of ``noise``.

    Raises:
        ValueError: ``steps`` or ``clip`` is out of range.
    """
    timesteps = _ddim_timesteps(schedule, steps, clip)
    return _ddim(model, schedule, noise, condition, timesteps, None, clip)


@torch.no_grad()
def ddim_partial(
    model: EpsilonModel,
    schedule: NoiseSchedule,
    noise: Tensor,
    condition: Tensor,
    *,
    steps: int,
    stop: int,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The first ``stop`` evaluations of ``ddim_sample``: samples on their way, as Erased Stable Diffusion takes them.

    Args:
        model: Predicts the noise; call ``.eval()`` on it first.
        schedule: The schedule that the model was trained with.
        noise: (B, ...) standard normal start.
        condition: (B, ...) labels or prompt embeddings, passed on to the model.
        steps: Evaluations of the whole way.
        stop: Evaluations to make, from 0 (the noise itself) to ``steps - 1``.
        clip: As in ``ddim_sample``.

    Returns:
        ``x_t`` of the shape and dtype of ``noise``, and its timestep for every sample, int64 (B,).

    Raises:
        ValueError: ``steps``, ``stop`` or ``clip`` is out of range.
    """
    timesteps = _ddim_timesteps(schedule, steps, clip)
    if not 0 <= stop < steps:
        raise ValueError(f"stop must lie in [0, {steps - 1}], got {stop}")
    x_t = _ddim(model, schedule, noise, condition, timesteps[:stop], timesteps[stop], clip)
    return x_t, _full_timesteps(noise, timesteps[stop])


def _ddim_timesteps(schedule: NoiseSchedule, steps: int, clip: float | None) -> list[int]:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps must lie in [1, {total}], got {steps}")
    return [total * (steps - index) // steps - 1 for index in range(steps)]


def _ddim(
    model: EpsilonModel,
    schedule: NoiseSchedule,
    x_t: Tensor,
    condition: Tensor,
    timesteps: list[int],
    end: int | None,
    clip: float | None,
) -> Tensor:
    """From the first of ``timesteps`` through all of them to timestep ``end``, or to x_0 where that is None."""
    for t, t_next in zip(timesteps, [*timesteps[1:], end], strict=False):
        epsilon = model(x_t, _full_timesteps(x_t, t), condition)
        x_0 = schedule.predict_x0(x_t, epsilon, t)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
            epsilon = (x_t - schedule.alpha(t) * x_0) / schedule.std(t)
        x_t = x_0 if t_next is None else schedule.add_noise(x_0, epsilon, t_next)
    return x_t


def _full_timesteps(noise: Tensor, t: int) -> Tensor:
    return torch.full((len(noise),), t, dtype=torch.int64, device=noise.device)
