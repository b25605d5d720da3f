"""What each method needs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pecker_fast.baselines.config import Method

NEEDS: Mapping[Method, tuple[str, str]] = MappingProxyType(
    {
        "fine_tune": ("labelled images of retained classes", "3"),
        "gradient_ascent": ("labelled images of retained and forgotten classes", "6 (3 without retain_weight)"),
        "random_label": ("labelled images of retained and forgotten classes", "7 (4 without retain_weight)"),
        "esd": ("none: class labels", "5 + (sampling_steps - 1) / 2 (twice the sampling with a null class)"),
        "selective_amnesia": ("none: generated images", "6, and once the Fisher information and the replay"),
        "retrain": ("labelled images of retained classes", "3"),
    }
)
"""Method -> what data it trains on, and what a step costs in F, a forward of the network on a batch, all weights."""

PARTS: Mapping[Method, tuple[str, ...]] = MappingProxyType(
    {
        "fine_tune": ("retain",),
        "gradient_ascent": ("retain", "forget"),
        "random_label": ("retain", "forget"),
        "esd": (),
        "selective_amnesia": (),
        "retrain": ("retain",),
    }
)
"""Method -> whose real images it trains on."""
