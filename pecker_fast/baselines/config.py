"""Settings of a baseline: every default once, validated where it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from pecker_fast.config import DistillConfig
from pecker_fast.mask_config import MaskConfig
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.settings import (
    check_classes,
    check_numbers,
    check_retained,
    is_number,
    known_keys,
    one_of,
    retained_classes,
    to_tuple,
)

Method = Literal["fine_tune", "gradient_ascent", "random_label", "esd", "selective_amnesia", "retrain"]
METHODS: tuple[Method, ...] = get_args(Method)

ONLY: Mapping[str, tuple[Method, ...]] = MappingProxyType(
    {
        "forget_weight": ("gradient_ascent", "random_label", "esd", "selective_amnesia"),
        "override": ("random_label", "esd"),
        "class_dropout": ("fine_tune", "gradient_ascent", "random_label", "selective_amnesia", "retrain"),
        "negative_guidance": ("esd",),
        "sampling_guidance": ("esd",),
        "ewc_weight": ("selective_amnesia",),
        "fisher_samples": ("selective_amnesia",),
        "fisher_timesteps": ("selective_amnesia",),
        "replay_samples": ("selective_amnesia",),
    }
)
"""Field -> the methods in which it has a say; fields that are not named here have one in all."""

_NUMBERS = {
    **dict.fromkeys(("num_classes", "batch_size", "fisher_samples", "replay_samples"), "a positive integer"),
    **dict.fromkeys(("forget_batch_size", "fisher_timesteps"), "a positive integer or None"),
    "sampling_steps": "a positive integer",
    "learning_rate": "a positive number",
    **dict.fromkeys(("max_grad_norm", "saliency_clip_norm", "clip_samples"), "a positive number or None"),
    **dict.fromkeys(("retain_weight", "forget_weight"), "a number >= 0 or None"),
    **dict.fromkeys(("eps", "weight_decay", "ewc_weight", "saliency_guidance"), "a number >= 0"),
    **dict.fromkeys(("negative_guidance", "sampling_guidance"), "a number >= 0"),
    "class_dropout": "a number in [0, 1)",
    "ema_decay": "a number in [0, 1) or None",
    "warmup_steps": "an integer >= 0",
    "seed": "an integer from 0 to 2**63 - 1",
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """One erasure by a method of the literature: docs/baselines.md has the equations and what is published.

    All losses are means over samples and pixels. A published loss that sums over pixels is that mean with the number
    of pixels (times channels) as its weight, which is what the defaults of the weights say.

    Attributes:
        method: "fine_tune", "gradient_ascent", "random_label" (SalUn's, without a mask), "esd", "selective_amnesia" or
            "retrain". SalUn is ``salun(...)``.
        forget: Classes to forget.
        num_classes: Classes in all.
        sample_shape: (channels, height, width).
        override: What a forgotten class is taught to look like ("random_label"), or moves away from ("esd" without a
            null class): one class for each forgotten one, or one for all; None takes the next retained class.
        retain: Classes that are kept; None are all that are not forgotten. Override ones may lie outside.
        batch_size: Samples of retained classes in each update.
        forget_batch_size: Samples of forgotten classes in each update; None takes ``batch_size``.
        mask: Which weights train; "retrain" trains all. A saliency mask is SalUn's: by the noise-prediction loss
            on real images of the classes to forget (on the model's own where the method has no data).
        saliency_clip_norm: Norm that the gradient of each batch of the saliency pass is clipped to; None does not clip.
        saliency_guidance: Guidance s of the saliency pass, ``(1 + s) eps_c - s eps_null``; needs ``null_class``.
        learning_rate: Before ``mask.lr_scale``.
        betas: Adam's.
        eps: Adam's.
        weight_decay: Decoupled weight decay of the weights that train.
        max_grad_norm: Norm that the gradient of the weights that train is clipped to; None does not clip.
        warmup_steps: Steps of linear learning-rate warm-up.
        ema_decay: Of the running average that is sampled and saved; None takes the weights as they are.
        retain_weight: Weight of the loss on retained classes; None is the published one: 1 for "fine_tune" and
            "retrain", 1e-3 times the number of pixels for "gradient_ascent", 3.072 for "random_label" (1e-3 times
            those of CIFAR-10), 0 for "esd", the number of pixels for "selective_amnesia".
        forget_weight: Weight of the loss on forgotten classes; None is the published one: 1 for "random_label" and
            "esd", the number of pixels for "gradient_ascent" and "selective_amnesia".
        null_class: The model was trained with class dropout, so that label ``num_classes`` means no class.
        class_dropout: Share of labels replaced by the null class; needs ``null_class``.
        negative_guidance: eta of "esd".
        sampling_guidance: Guidance of "esd" when it samples, with a null class.
        ewc_weight: lambda of "selective_amnesia".
        fisher_samples: Generated samples of every class that its Fisher information is averaged over.
        fisher_timesteps: Timesteps, evenly spaced, that the loss of a sample is summed over there, the sum scaled to
            all of them; None takes all.
        replay_samples: Generated samples of every retained class that "selective_amnesia" rehearses.
        sampling_steps: DDIM steps, wherever the method or ``Baseline.sample`` draws.
        clip_samples: There, what estimates of the image are clipped to; None does not clip, as for latents.
        share_frozen_weights: As in ``DistillConfig``.
        seed: Of every draw: batches, noise, timesteps, dropout, random masks, initial weights.
    """

    method: Method
    forget: tuple[int, ...]
    num_classes: int
    sample_shape: tuple[int, int, int]
    override: tuple[int, ...] | None = None
    retain: tuple[int, ...] | None = None
    batch_size: int = 128
    forget_batch_size: int | None = None
    mask: MaskConfig = field(default_factory=lambda: MaskConfig(kind="dense"))
    saliency_clip_norm: float | None = 1.0
    saliency_guidance: float = 0.0
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    ema_decay: float | None = None
    retain_weight: float | None = None
    forget_weight: float | None = None
    null_class: bool = False
    class_dropout: float = 0.0
    negative_guidance: float = 2.0
    sampling_guidance: float = 3.0
    ewc_weight: float = 10.0
    fisher_samples: int = 500
    fisher_timesteps: int | None = None
    replay_samples: int = 500
    sampling_steps: int = 50
    clip_samples: float | None = 1.0
    share_frozen_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("BaselineConfig.method", self.method, METHODS)
        optional = ("override", "retain")
        for name in ("forget", "sample_shape", "betas", *optional):  # lists are welcome, and JSON has nothing else
            if name not in optional or getattr(self, name) is not None:
                object.__setattr__(self, name, to_tuple(f"BaselineConfig.{name}", getattr(self, name)))
        if isinstance(self.mask, Mapping):
            object.__setattr__(self, "mask", MaskConfig.from_dict(self.mask))
        self._check_numbers()
        if not self.forget:
            raise ValueError("BaselineConfig.forget: expected at least one class to forget, got none")
        check_classes("BaselineConfig", self.forget, self.override, self.num_classes)
        check_retained("BaselineConfig", self.retain, self.forget, self.num_classes)
        self._check_mask()
        self._check_null_class()
        for name, weight in _published_weights(self.method, math.prod(self.sample_shape)).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, weight)

    def _check_numbers(self) -> None:
        check_numbers(self, _NUMBERS)
        if len(self.sample_shape) != 3 or not all(is_number(size, "a positive integer") for size in self.sample_shape):
            raise ValueError(
                f"BaselineConfig.sample_shape: expected (channels, height, width), got {self.sample_shape}"
            )
        if len(self.betas) != 2 or not all(is_number(beta, "a number in [0, 1)") for beta in self.betas):
            raise ValueError(f"BaselineConfig.betas: expected two numbers in [0, 1), got {self.betas}")

    def _check_mask(self) -> None:
        if not isinstance(self.mask, MaskConfig):
            raise ValueError(f"BaselineConfig.mask: expected a MaskConfig, got {self.mask!r}")
        if self.mask.kind == "saliency" and self.mask.saliency != "noise_prediction":
            raise ValueError(
                f"BaselineConfig.mask: saliency={self.mask.saliency!r} looks at a distiller's loss; baselines have "
                f"saliency='noise_prediction' alone"
            )
        if self.method == "retrain" and self.mask != dataclasses.replace(self.mask, kind="dense", region="all"):
            raise ValueError(
                f"BaselineConfig.mask: 'retrain' trains every weight, from scratch; expected kind 'dense' and region "
                f"'all', got kind {self.mask.kind!r} and region {self.mask.region!r}"
            )

    def _check_null_class(self) -> None:
        for name in ("null_class", "share_frozen_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"BaselineConfig.{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("class_dropout", "saliency_guidance"):
            if getattr(self, name) and not self.null_class:
                raise ValueError(
                    f"BaselineConfig.{name}: {getattr(self, name)} needs a model that was trained with a null class; "
                    f"say null_class=True, or leave it at 0"
                )

    @property
    def weights(self) -> tuple[float, float]:
        """``forget_weight`` and ``retain_weight``; a weight that has no say is 0."""
        return self.forget_weight or 0.0, self.retain_weight or 0.0

    @property
    def retained(self) -> tuple[int, ...]:
        """Classes that are kept."""
        return retained_classes(self.retain, self.forget, self.num_classes)

    @property
    def forget_samples(self) -> int:
        """Samples of forgotten classes in each update."""
        return self.forget_batch_size or self.batch_size

    @property
    def substitutes(self) -> tuple[int, ...]:
        """What takes the place of each forgotten class: ``override``, or the next retained class, round the end."""
        if self.override is not None:
            return self.override if len(self.override) > 1 else self.override * len(self.forget)
        return tuple(min(self.retained, key=lambda kept: (kept - label) % self.num_classes) for label in self.forget)

    def for_draws(self, schedule: NoiseSchedule) -> DistillConfig:
        """The same classes, batches, mask and Adam as a distiller has them, so that its parts serve here too."""
        return DistillConfig(
            forget=self.forget,
            num_classes=self.num_classes,
            sample_shape=self.sample_shape,
            override=self.substitutes,
            retain=self.retain,
            batch_size=self.batch_size,
            forget_batch_size=self.forget_batch_size,
            mask=self.mask,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip_value=None,
            warmup_steps=self.warmup_steps,
            t_init=0,
            t_min=0,
            t_max=schedule.num_train_timesteps,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaselineConfig:
        """From ``to_dict``; unknown keys are refused."""
        known_keys(cls, values)
        return cls(**values)


_CIFAR10_PIXELS = 3 * 32 * 32


def _published_weights(method: Method, pixels: int) -> dict[str, float]:
    """The weights as they are published, of losses that are means over pixels."""
    forget, retain = {
        "fine_tune": (0.0, 1.0),
        "retrain": (0.0, 1.0),
        "gradient_ascent": (pixels, 1e-3 * pixels),  # sums both
        # SalUn weighs a mean against a sum, so 1e-3 means what it meant on the images that it was chosen for.
        "random_label": (1.0, 1e-3 * _CIFAR10_PIXELS),
        "esd": (1.0, 0.0),
        "selective_amnesia": (pixels, pixels),  # sums both, as is the Fisher information's
    }[method]
    return {"forget_weight": float(forget), "retain_weight": float(retain)}


def salun_mask_config(**changes: Any) -> MaskConfig:
    """SalUn's mask: half of the weights, single ones, ranked over the whole network by the signed sum of gradients.

    Args:
        **changes: Fields of ``MaskConfig`` to have otherwise.
    """
    published: dict[str, Any] = {
        "kind": "saliency",
        "density": 0.5,
        "block": "element",
        "scope": "global",
        "accumulate": "signed_sum",
        "saliency": "noise_prediction",
        "batches": 40,  # an epoch over the 5000 images of a class of CIFAR-10
        "batch_size": 128,
        "lr_scale": "none",
    }
    return MaskConfig(**published | changes)


def salun(method: Method = "random_label", **settings: Any) -> BaselineConfig:
    """SalUn as published (Fan et al. 2024, arXiv 2310.12508): "random_label" or "gradient_ascent" under its mask.

    With ``null_class=True`` also its class dropout 0.1 and its guidance 2.0 in the saliency pass.

    Args:
        method: "random_label" or "gradient_ascent".
        **settings: Fields of ``BaselineConfig``.

    Raises:
        ValueError: Another method, or a setting that makes no sense.
    """
    one_of("salun: method", method, ("random_label", "gradient_ascent"))
    guided = {"class_dropout": 0.1, "saliency_guidance": 2.0} if settings.get("null_class") else {}
    return BaselineConfig(**{"method": method, "mask": salun_mask_config(), **guided, **settings})
