"""Published settings for Stable Diffusion, where they differ from those for small class-conditional models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pecker_fast.config import GuidanceConfig

STEPS: Mapping[str, int] = MappingProxyType({"pecker": 25_000, "sfd": 25_000, "esd": 200, "salun": 200})
"""Steps by method.

ESD's code takes 200, of one prompt each. SalUn's takes one epoch over 800 images: 100 steps at batch 8, 200 at batch 4.
The published evaluations of pecker and sfd are after 100 thousand images: 25,000 steps at batch 4.
"""
DISTILL: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "generator_lr": 1e-6,
        "fake_score_lr": 3e-6,
        "betas": (0.0, 0.999),
        "eps": 1e-6,
        "clip_value": None,
        "ema_decay": None,
        "sid_alpha": 1.0,
        "t_init": 625,
        "t_min": 20,
        "t_max": 980,
        "retain_weight": 1.0,
        "forget_weight": 1.0,
        "guidance": GuidanceConfig(fake_score_update=4.5, fake_score=4.5, true_score=4.5, dropout=0.1),
        "share_frozen_weights": True,
    }
)
"""Fields of ``DistillConfig``: those of SFD's Stable Diffusion runs, the batch as one 24 GB card holds it."""
ESD: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "learning_rate": 5e-5,
        "negative_guidance": 2.0,
        "sampling_guidance": 3.0,
        "sampling_steps": 50,
        "max_grad_norm": None,
        "null_class": True,
        "clip_samples": None,
        "share_frozen_weights": True,
    }
)
"""Fields of ``BaselineConfig``: those of ESD's diffusers code, but for the batch."""
SALUN: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "learning_rate": 1e-5,
        "retain_weight": 0.5,
        "sampling_steps": 50,
        "max_grad_norm": None,
        "saliency_clip_norm": None,
        "null_class": True,
        "class_dropout": 0.0,
        "saliency_guidance": 0.0,
        "clip_samples": None,
        "share_frozen_weights": True,
    }
)
"""Fields of ``BaselineConfig``: those of SalUn's Stable Diffusion code; the saliency pass has no guidance here."""
