"""What a generator's gradients look like while it forgets: where they point, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pecker_fast.apply import dense_copy
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.draws import Batch, Draws

BATCHES = 8


def gradients(distiller: MaskedDistiller, batches: int = BATCHES, seed: int = 0) -> dict[str, Any]:
    """Of the generator's loss, its parts on forgotten and on retained classes, over all weights that can be masked.

    On copies and draws of its own: the run notices nothing.

    Args:
        distiller: With a mask, and with classes to forget.
        batches: Gradients of each part, at least 2.
        seed: Of the draws.

    Returns:
        "cosine": of the two mean gradients, and "cosine_active" on the active weights alone. "mass_forget",
        "mass_retain": share of the summed magnitude of the mean gradient that is on active weights ("mask_density" is
        what chance would have). "signal_forget", "signal_retain": squared norm of the mean gradient over the mean
        squared norm, unbiased by the number of batches: 1 where all batches agree, 0 where they do not (and by chance a
        little below).

    Raises:
        RuntimeError: There is no mask yet.
        ValueError: Fewer than two batches, or nothing is forgotten.
    """
    if distiller.mask is None:
        raise RuntimeError("no mask yet: call build_mask() first")
    if batches < 2 or not distiller.config.forget:
        raise ValueError(f"expected at least 2 batches and classes to forget, got {batches}, {distiller.config.forget}")
    generator = dense_copy(distiller.generator).requires_grad_(True)
    fake_score = dense_copy(distiller.fake_score).requires_grad_(False)
    draws = Draws(distiller.config, distiller.device, distiller.dtype, seed)
    weights = {name: weight for name, weight in generator.named_parameters() if name in distiller.mask.parameters}
    losses, retained = distiller.losses, distiller.config.batch_size

    def gradient(batch: Batch) -> Tensor:
        with losses.frozen_parts():
            x0 = losses.generate(generator, batch.noise, batch.labels)
            loss = (batch.weights * losses.of_generator(distiller.true_score, fake_score, batch, x0)).sum()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), found, strict=True)]
        return torch.cat([piece.flatten().float() for piece in flat])

    drawn = [draws.batch() for _ in range(batches)]
    parts = {"retain": [batch[:retained] for batch in drawn], "forget": [batch[retained:] for batch in drawn]}
    active = torch.cat([distiller.mask.to_dense(name).flatten() for name in weights]).to(distiller.device)
    found = {name: _mean_and_signal(map(gradient, part)) for name, part in parts.items()}
    return {
        "mask_density": distiller.mask.density,
        "cosine": _cosine(found["forget"][0], found["retain"][0]),
        "cosine_active": _cosine(found["forget"][0][active], found["retain"][0][active]),
        **{f"mass_{name}": _mass(mean, active) for name, (mean, _) in found.items()},
        **{f"signal_{name}": signal for name, (_, signal) in found.items()},
    }


def _mean_and_signal(vectors: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Mean of the vectors, and the share of their squared length that is the mean's; one vector at a time."""
    total, squares, count = torch.zeros((), device="cpu"), 0.0, 0
    for vector in vectors:
        total = total.to(vector) + vector
        squares += float(vector.double().square().sum())
        count += 1
    if squares == 0:
        return total / count, 0.0
    # |sum|^2 has the squares on its diagonal; what is left are count (count - 1) products of different vectors.
    products = (float(total.double().square().sum()) - squares) / (count * (count - 1))
    return total / count, products / (squares / count)


def _cosine(a: Tensor, b: Tensor) -> float | None:
    lengths = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / lengths if lengths else None


def _mass(gradient: Tensor, active: Tensor) -> float:
    magnitude = gradient.double().abs()
    return float(magnitude[active].sum() / magnitude.sum()) if bool(magnitude.any()) else 0.0
