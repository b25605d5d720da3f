"""The scheduler with which diffusers takes the one step of a one-step generator."""

from __future__ import annotations

from typing import Any

from pecker_fast.concepts.pipeline import diffusers_library


def one_step_scheduler(scheduler: Any, t_init: int) -> Any:
    """Euler over the betas up to ``t_init``: of noise z its one step makes ``(b z - b epsilon(b z, t_init)) / a``.

    Args:
        scheduler: The one that the UNet was trained with; its ``prediction_type`` is kept.
        t_init: Timestep at which the generator starts.

    Returns:
        EulerDiscreteScheduler, to be used with ``num_inference_steps=1`` and ``guidance_scale=0``.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: The scheduler has no such timestep.
    """
    betas = scheduler.betas.tolist()
    if not 0 <= t_init < len(betas):
        raise ValueError(f"t_init: expected a timestep below the scheduler's {len(betas)}, got {t_init}")
    return diffusers_library().EulerDiscreteScheduler(
        trained_betas=betas[: t_init + 1],
        num_train_timesteps=t_init + 1,
        timestep_spacing="trailing",
        prediction_type=scheduler.config.prediction_type,
    )
