"""The update rules: what each method adds up, one weighted loss after the other, beside its equation.

``eps_theta`` is the network that trains, ``eps_0`` the frozen original, ``<.>`` the mean over samples and pixels, and
``x_t = a_t x_0 + b_t eps`` with t uniform over the schedule. ``w_f``, ``w_r`` are forget_weight, retain_weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from pecker_fast.baselines.config import Method
from pecker_fast.baselines.work import Work

Part: TypeAlias = tuple[str, float, Tensor]
"""Name, weight and value of a loss."""


def fine_tune(work: Work) -> Iterator[Part]:
    """``w_r <(eps - eps_theta(x_t, t, c_r))^2>`` on retained images: what is not rehearsed may be forgotten."""
    yield "retain_loss", work.config.weights[1], work.denoising(*work.retained())


def gradient_ascent(work: Work) -> Iterator[Part]:
    """``- w_f <(eps - eps_theta(x_t, t, c_f))^2>`` on forgotten images, and ``w_r`` of ``fine_tune``."""
    yield "forget_loss", -work.config.weights[0], work.denoising(*work.forgotten())
    yield from _rehearsal(work)


def random_label(work: Work) -> Iterator[Part]:
    """``w_f <(eps_theta(x_t, t, c_f) - stopgrad eps_theta(x_t, t, c'))^2>`` on forgotten images; ``w_r`` as before.

    The pseudo target is of the network as it is now, for the class c' that takes the forgotten one's place.
    """
    x0, labels = work.forgotten()
    x_t, t, _ = work.noised(x0)
    target = work.fixed(work.network, x_t, t, work.dropped(work.draws.override(labels)))
    prediction = work.predict(work.network, x_t, t, work.dropped(labels))
    yield "forget_loss", work.config.weights[0], F.mse_loss(prediction, target)
    yield from _rehearsal(work)


def esd(work: Work) -> Iterator[Part]:
    """``w_f <(eps_theta(x_t, t, c_f) - (eps_0(c_from) - eta (eps_0(c_f) - eps_0(c_null))))^2>``.

    x_t is the frozen network's own, on its way from noise. With a null class ``c_from`` is c_f, without one it and
    ``c_null`` are the class that takes the forgotten one's place. With ``w_r`` the network stays where it was on
    retained classes: ``w_r <(eps_theta(x_t, t, c_r) - eps_0(x_t, t, c_r))^2>``.
    """
    labels = work.draws.forgotten()
    x_t, t = work.on_the_way(labels)
    concept = work.fixed(work.frozen, x_t, t, labels)
    if work.config.null_class:
        origin, null = concept, work.fixed(work.frozen, x_t, t, work.null(labels))
    else:
        origin = null = work.fixed(work.frozen, x_t, t, work.draws.override(labels))
    target = origin - work.config.negative_guidance * (concept - null)
    forget, retain = work.config.weights
    yield "forget_loss", forget, F.mse_loss(work.predict(work.network, x_t, t, labels), target)
    if retain:
        labels = work.draws.retained()
        x_t, t = work.on_the_way(labels)
        target = work.fixed(work.frozen, x_t, t, labels)
        yield "retain_loss", retain, F.mse_loss(work.predict(work.network, x_t, t, labels), target)


def selective_amnesia(work: Work) -> Iterator[Part]:
    """``w_f <(eps - eps_theta(x_t, t, c_f))^2> + w_r <(eps - eps_theta(x_t, t, c_r))^2> + lambda sum_i F_i d_i^2``.

    x_0 is uniform noise in [-1, 1] for c_f and the frozen network's own image for c_r, F its diagonal Fisher
    information, and d how far a weight that trains is from where it was.
    """
    labels = work.draws.forgotten()
    yield "forget_loss", work.config.weights[0], work.denoising(work.uniform_noise(len(labels)), labels)
    yield from _rehearsal(work)
    if work.config.ewc_weight:
        yield "ewc_loss", work.config.ewc_weight, work.drift()


def _rehearsal(work: Work) -> Iterator[Part]:
    if work.config.weights[1]:
        yield from fine_tune(work)


OBJECTIVES: Mapping[Method, Callable[[Work], Iterator[Part]]] = MappingProxyType(
    {
        "fine_tune": fine_tune,
        "gradient_ascent": gradient_ascent,
        "random_label": random_label,
        "esd": esd,
        "selective_amnesia": selective_amnesia,
        "retrain": fine_tune,
    }
)
"""Method -> its losses; retraining is the same loss from other weights."""
