"""The scheduler with which stock diffusers draws, in one step, what a one-step generator draws, and how it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pecker_fast.schedule import NoiseSchedule

T_INIT_MARK = "_pecker_fast_t_init"
"""In a scheduler's config: where the generator starts. diffusers keeps names with an underscore, and never warns."""
_FULL = 1000
"""Timesteps of the schedules that one-step generators were cut from before there was a mark."""


def one_step_scheduler(schedule: NoiseSchedule, t_init: int, prediction_type: str = "epsilon") -> Any:
    """``EulerDiscreteScheduler`` whose only step is ``sigma (z - epsilon(std z, t_init, c))``.

    Its betas end at ``t_init``, where its one timestep lies. Pipelines take it with ``num_inference_steps=1`` and
    ``guidance_scale=0``; ``one_step_sample`` draws the same up to rounding to float32, which is what diffusers holds
    betas in.

    Args:
        schedule: The schedule that the network was trained with.
        t_init: The timestep at which the generator is evaluated.
        prediction_type: What the network gives: "epsilon", or "v_prediction", from which
            ``epsilon = alpha v + std x_t`` follows.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: ``t_init`` lies outside the schedule, or ``prediction_type`` is another one.
    """
    if not 0 <= t_init < schedule.num_train_timesteps:
        raise ValueError(f"t_init: expected 0 to {schedule.num_train_timesteps - 1}, got {t_init}")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', got {prediction_type!r}")
    betas = betas_of(schedule)[: t_init + 1]
    scheduler = diffusers_library().EulerDiscreteScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect on trailing steps, but pipelines warn of anything else
    )
    scheduler.register_to_config(**{T_INIT_MARK: t_init})
    return scheduler


def one_step_t_init(config: Mapping[str, Any]) -> int | None:
    """Where a one-step generator starts, by the config of a pipeline's scheduler; None where it takes many steps.

    The mark says it, and None there says that it takes many. Without a mark, as older folders have it, trailing steps
    on betas that end before a whole schedule does are a generator's.

    Args:
        config: ``scheduler/scheduler_config.json``.
    """
    betas = config.get("trained_betas")
    if config.get("timestep_spacing") != "trailing" or not isinstance(betas, list) or not betas:
        return None
    last, timesteps = len(betas) - 1, config.get("num_train_timesteps")
    if T_INIT_MARK in config:
        return last if config[T_INIT_MARK] == last else None
    whole = max(_FULL, timesteps) if isinstance(timesteps, int) else _FULL
    return last if len(betas) < whole else None


def betas_of(schedule: NoiseSchedule) -> list[float]:
    """The betas of which the schedule is the cumulative product."""
    table = schedule.alphas_cumprod
    before = torch.cat([table.new_ones(1), table[:-1]])
    betas: list[float] = (1 - table / before).tolist()
    return betas


def diffusers_library() -> Any:
    """The module, imported here and not with the package.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "this needs diffusers, which is not installed; run: pip install pecker_fast[diffusers]"
        ) from error
    return diffusers
