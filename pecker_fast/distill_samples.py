"""What a distiller's generator makes: one-step samples, by its running-average weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.sampling import one_step_sample


@contextmanager
def averaged(generator: nn.Module, active: ActiveParameters | None) -> Iterator[nn.Module]:
    """Within the block ``generator`` has its running-average weights, if there are any, and is in eval mode."""
    training = generator.training
    try:
        generator.eval()
        with nullcontext() if active is None or active.ema is None else active.ema_weights():
            yield generator
    finally:
        generator.train(training)


def draw_start(shape: tuple[int, ...], seed: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise to start from; ``seed`` None draws from the global random state."""
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=rng, device=device).to(dtype)


@torch.no_grad()
def sample(generator: nn.Module, losses: DistillLosses, noise: Tensor, labels: Tensor) -> Tensor:
    """One step from ``noise`` (n, *sample_shape) for classes ``labels`` (n,)."""
    predict = functools.partial(losses.predict, generator)
    return one_step_sample(predict, losses.schedule, noise, labels, t_init=losses.config.t_init)
