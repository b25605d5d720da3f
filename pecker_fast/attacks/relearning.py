"""Relearning: how many steps on how few images bring a forgotten class back.

A model that only hides a class is a few steps away from it; one that never knew it needs as many as a new class.
The number means little alone: compare it with that of a model retrained without the class, on the same images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast.attacks.recognition import (
    Judge,
    check_generation,
    check_judge,
    check_model,
    fixed_noise,
    recognised_share,
)
from pecker_fast.errors import NonFiniteError
from pecker_fast.schedule import NoiseSchedule


@dataclass(frozen=True)
class RelearningResult:
    """What a relearning attack found.

    Attributes:
        steps_to_return: First step checked at which the class was back; 0 if it never was away, None if it stayed away
            for all steps.
        curve: (step, share of the samples in which the judge sees a forgotten class) of every check.
    """

    steps_to_return: int | None
    curve: tuple[tuple[int, float], ...]


def relearn(
    model: nn.Module,
    generation: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    *,
    judge: Judge,
    target_share: float = 0.5,
    max_steps: int = 200,
    every: int = 10,
    lr: float = 1e-4,
    batch_size: int = 32,
    samples: int = 100,
    seed: int = 0,
) -> RelearningResult:
    """Fine-tune a copy of a model on few images of the forgotten classes until the judge sees them again.

    Plain noise prediction, ``mean (epsilon - epsilon_theta(x_t, t, label))^2``, by Adam on all weights. A ``ddim``
    model gets uniform timesteps. A ``one_step`` generator gets only its own ``t_init``: it is never run anywhere else,
    so that what it answers at other timesteps shows in no sample, and an attacker would not spend steps on it.

    Args:
        model: ``(x_t, t, label) -> epsilon``; copied, never changed.
        generation: How to sample from it, as in `pecker_fast.models.storage`.
        images: (N, C, H, W) in [-1, 1]: the attacker's images, 10 say.
        labels: (N,) int64 their classes; these are the forgotten ones, and all of them are sampled and counted.
        judge: Images -> logits, in eval mode, on the model's device.
        target_share: The class is back when the judge sees a forgotten class in this share of the samples.
        max_steps: Steps after which the attack gives up.
        every: Steps between two checks; the resolution of the answer.
        lr: Learning rate.
        batch_size: Images a step, drawn with replacement, each with noise of its own.
        samples: Images of each class a check, from the same noise each time.
        seed: Of batches, noise, dropout and samples.

    Raises:
        ValueError: An argument is out of range, or the model has masked layers.
        NonFiniteError: The loss or the judge's logits became NaN or infinite.
    """
    check_model(model)
    check_judge(judge)
    check_generation(generation)
    _check_images(images, labels, generation)
    _check_numbers(target_share, max_steps=max_steps, every=every, batch_size=batch_size, samples=samples, lr=lr)
    attacked = copy.deepcopy(model).requires_grad_(True)
    forget = labels.unique().tolist()
    condition = torch.tensor(forget, device="cpu").repeat_interleave(samples)
    noise = fixed_noise(len(condition), generation, seed)
    curve: list[tuple[int, float]] = []
    for step in _finetuned(attacked, generation, images, labels, max_steps, lr, batch_size, seed):
        if step % every and step != max_steps:
            continue
        attacked.eval()
        curve.append((step, recognised_share(attacked, generation, condition, noise, judge=judge, forget=forget)))
        if curve[-1][1] >= target_share:
            return RelearningResult(step, tuple(curve))
    return RelearningResult(None, tuple(curve))


def _finetuned(
    model: nn.Module,
    generation: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    max_steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Yield the number of steps taken, from 0 to ``max_steps``."""
    schedule = NoiseSchedule.from_dict(generation["schedule"])
    weight = next(model.parameters())
    images, labels = images.to(weight), labels.to(weight.device)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    yield 0
    for step in range(1, max_steps + 1):
        model.train()
        index = torch.randint(len(images), (batch_size,), generator=draw, device="cpu")
        t = _timesteps(generation, schedule, batch_size, draw)
        epsilon = torch.randn(batch_size, *images.shape[1:], generator=draw, device="cpu").to(weight)
        x0, condition, t = images[index.to(weight.device)], labels[index.to(weight.device)], t.to(weight.device)
        with _seeded(seed + step, weight.device), torch.enable_grad():
            loss = F.mse_loss(model(schedule.add_noise(x0, epsilon, t), t, condition), epsilon)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the relearning loss became {loss.item()} at step {step}; lower lr={lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def _timesteps(generation: Mapping[str, Any], schedule: NoiseSchedule, count: int, draw: torch.Generator) -> Tensor:
    if generation["kind"] == "one_step":
        return torch.full((count,), generation["t_init"], device="cpu")
    return torch.randint(schedule.num_train_timesteps, (count,), generator=draw, device="cpu")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed what dropout draws from, and restore it afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_images(images: Tensor, labels: Tensor, generation: Mapping[str, Any]) -> None:
    shape = tuple(generation["sample_shape"])
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise ValueError(
            f"images: expected floating-point (N, *{shape}) with N at least 1, got {images.dtype} {tuple(images.shape)}"
        )
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
    if not bool(images.isfinite().all()):
        raise NonFiniteError("images hold NaN or infinite values")


def _check_numbers(target_share: float, *, lr: float, **counts: int) -> None:
    if not 0.0 < target_share <= 1.0 or not lr > 0.0:
        raise ValueError(f"expected target_share in (0, 1] and lr above 0, got {target_share} and {lr}")
    for name, count in counts.items():
        if count < (name != "max_steps"):
            raise ValueError(f"{name} is out of range: {count}")
