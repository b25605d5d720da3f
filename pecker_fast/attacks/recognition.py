"""How often a judge sees forgotten classes in what a model draws: what every attack is measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.maskable import STORE
from pecker_fast.metrics import unlearning_accuracy
from pecker_fast.models import generate

_BATCH = 256

Judge = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) in [-1, 1] on the model's device -> logits (n, classes); a module must be in eval mode."""


class _Nothing(nn.Module):
    """Predicts no noise."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


def fixed_noise(count: int, generation: Mapping[str, Any], seed: int) -> Tensor:
    """Standard normal noise for ``count`` images, the same on every device: (count, *sample_shape) on the CPU."""
    return torch.randn(count, *generation["sample_shape"], generator=torch.Generator().manual_seed(seed), device="cpu")


@torch.no_grad()
def recognised_share(
    model: nn.Module,
    generation: Mapping[str, Any],
    condition: Tensor,
    noise: Tensor,
    *,
    judge: Judge,
    forget: Sequence[int],
) -> float:
    """Share of the images in which the judge sees any forgotten class: ``1 - unlearning_accuracy``.

    Args:
        model: ``(x_t, t, condition) -> epsilon``, in eval mode.
        generation: How to sample from it, as in `pecker_fast.models.storage`.
        condition: (N,) labels.
        noise: (N, C, H, W) start.
        judge: See ``Judge``.
        forget: The forgotten classes.

    Raises:
        ValueError: ``generation`` is incomplete, or the judge gives something other than logits.
        NonFiniteError: The judge's logits are NaN or infinite.
    """
    weight = next(model.parameters())
    logits = []
    for labels, start in zip(condition.split(_BATCH), noise.split(_BATCH), strict=True):
        images = generate(model, generation, labels.to(weight.device), noise=start.to(weight))
        logits.append(judge(images))
    escaped = round(unlearning_accuracy(torch.cat(logits), forget) * len(condition))
    return (len(condition) - escaped) / len(condition)


def check_generation(generation: Mapping[str, Any]) -> None:
    """Refuse a ``generation`` that cannot be sampled with, before anything is computed.

    Raises:
        ValueError: An entry is missing or out of range.
    """
    nobody = torch.empty(0, dtype=torch.int64, device="cpu")
    generate(_Nothing(), generation, nobody)  # it checks every entry and draws no image


def check_model(model: nn.Module) -> None:
    """Refuse a model whose masked layers would let only some weights be attacked.

    Raises:
        ValueError: The model has masked layers.
    """
    if any(STORE in vars(module) for module in model.modules()):
        raise ValueError("model: has masked layers, of which most weights are frozen; call remove() on its parameters")


def check_judge(judge: Judge) -> None:
    """Refuse a judge whose answers are random.

    Raises:
        ValueError: It is a module in training mode.
    """
    if isinstance(judge, nn.Module) and judge.training:
        raise ValueError(f"judge: {type(judge).__name__} is in training mode; call judge.eval() first")
