"""Settings of a distillation run: every default once, validated where it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from pecker_fast.mask_config import MaskConfig
from pecker_fast.settings import (
    check_classes,
    check_numbers,
    check_retained,
    check_substitutes,
    is_number,
    known_keys,
    one_of,
    retained_classes,
    to_tuple,
)

Preset = Literal["published", "exact", "fast"]
GuidedPart = Literal["fake_score_update", "fake_score", "true_score"]

SWITCHES: Mapping[str, Mapping[Preset, bool]] = MappingProxyType(
    {
        "merge_batches": {"published": False, "exact": True, "fast": True},
        "closed_form_loss": {"published": False, "exact": True, "fast": True},
        "skip_frozen": {"published": False, "exact": True, "fast": True},
        "reuse_generator_forward": {"published": False, "exact": False, "fast": False},
        "stop_gradient": {"published": False, "exact": False, "fast": False},
    }
)
"""Switch of ``DistillConfig`` -> what each preset sets it to; docs/design.md has what they save and what they cost."""
FAST_FORGET_SHARE = 8
"""Preset "fast" draws one forgotten sample for so many retained ones."""
_NUMBERS = {
    **dict.fromkeys(("num_classes", "batch_size"), "a positive integer"),
    **dict.fromkeys(("forget_batch_size", "micro_batch_size"), "a positive integer or None"),
    **dict.fromkeys(("generator_lr", "fake_score_lr"), "a positive number"),
    "clip_value": "a positive number or None",
    **dict.fromkeys(("eps", "weight_decay", "retain_weight", "forget_weight"), "a number >= 0"),
    **dict.fromkeys(("warmup_steps", "t_init", "t_min", "t_max"), "an integer >= 0"),
    "ema_decay": "a number in [0, 1) or None",
    "sid_alpha": "a finite number",
    "seed": "an integer from 0 to 2**63 - 1",
}


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance while distilling: ``eps_null + scale (eps_c - eps_null)``, twice the batch; 1 is none.

    For networks that know a null class: label ``num_classes``, of text-conditional ones the row after the last prompt.

    Attributes:
        fake_score_update: Scale of the fake score where it learns the generator's samples (kappa 1 of Zhou et al. 2024,
            arXiv 2406.01561, as SFD uses it for Stable Diffusion).
        fake_score: Of the fake score where the generator learns from it (kappa 2 and 3).
        true_score: Of the true score (kappa 4).
        negative_in: Which of the three see ``DistillConfig.negative`` instead of the null class.
        dropout: Share of the samples of the fake score's update whose class is dropped, for the generator too.
    """

    fake_score_update: float = 1.0
    fake_score: float = 1.0
    true_score: float = 1.0
    negative_in: tuple[GuidedPart, ...] = ("true_score",)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "negative_in", to_tuple("GuidanceConfig.negative_in", self.negative_in))
        for part in self.negative_in:
            one_of("GuidanceConfig.negative_in", part, get_args(GuidedPart))
        scales = dict.fromkeys(get_args(GuidedPart), "a positive number")
        check_numbers(self, {**scales, "dropout": "a number in [0, 1)"})

    def scale(self, part: GuidedPart) -> float:
        """Of one network in one update."""
        return float(getattr(self, part))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GuidanceConfig:
        """From ``dataclasses.asdict``; unknown keys are refused."""
        known_keys(cls, values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One erasure: what to forget, what to put in its place, and how to train. Defaults are SFD's for CIFAR-10.

    Attributes:
        preset: What the switches below are where they are not given (None): "published" (the iteration as it is
            published, 22 forwards), "exact" (everything that computes the same for less), or "fast" (also an eighth of
            the forgotten samples, which costs a little quality a step and none a second: docs/quality.md). It is looked
            up when a config is made: ``dataclasses.replace`` keeps the switches, whatever preset it is given.
        forget: Classes to forget; none distils the generator without forgetting.
        override: What the true score is asked for in their place: one class for each forgotten one, one for all, or
            None for a random retained class at every draw.
        num_classes: Classes in all.
        sample_shape: (channels, height, width).
        retain: Classes that are kept; None are all that are not forgotten. Override and negative ones may lie outside.
        negative: What takes the null class's place in the guidance of forgotten samples: one class for each forgotten
            one, or one for all; None leaves the null class. See ``GuidanceConfig.negative_in``.
        batch_size: Samples of retained classes in each update.
        forget_batch_size: Samples of forgotten classes in each update; None takes ``batch_size``, or an eighth of it
            with preset "fast". Weights are those of the means, so that the gradient's expectation is the same.
        micro_batch_size: Samples that go through the networks at a time, their gradients added up: the same update in
            less memory. None takes all at once.
        mask: Which weights of the generator train.
        generator_lr: Learning rate of the generator, before ``mask.lr_scale``.
        fake_score_lr: Learning rate of the fake score.
        betas: Adam's; the published runs have no first moment.
        eps: Adam's.
        weight_decay: Decoupled weight decay.
        clip_value: Gradients are clipped to this magnitude, element by element; None does not clip.
        warmup_steps: Steps of linear learning-rate warm-up; with beta1 = 0 the first step is lr * sign(gradient).
        ema_decay: Of the generator's running average, which is what is sampled and saved; None keeps none, and the
            weights are sampled and saved as they are.
        sid_alpha: alpha of the SiD loss.
        t_init: Timestep at which the one-step generator starts.
        t_min: Smallest timestep of the score losses.
        t_max: Timesteps of the score losses are below this.
        retain_weight: Weight of the losses on retained classes.
        forget_weight: Weight of the losses on forgotten classes.
        seed: Of every draw: labels, noise, timesteps, random masks.
        guidance: Classifier-free guidance of the two score networks.
        share_frozen_weights: The networks have one storage for the weights that no mask touches, which so need memory
            once. Then neither these nor those of the true score may be written to from outside.
        fake_score_mask: Which weights of the fake score train, chosen as the generator's are; "same" has the settings
            of ``mask``, None trains all of them, as published. Saliency is of the fake score's own loss, on retained
            and forgotten classes; its ``lr_scale`` is of ``fake_score_lr``.
        merge_batches: Retained and forgotten samples go through the networks as one batch with weights of their own,
            not as two: the same gradient.
        closed_form_loss: SiD's loss and its gradient in one pass over the predictions, instead of autograd through
            the published expression: the same value and gradient.
        skip_frozen: No graph below the first active layer, and no gradient into the skips from frozen ones.
        reuse_generator_forward: The generator's samples of the fake score's update serve its own update too, with fresh
            timesteps and noise: two forwards less of 22. Same expectation, but both updates share starting noise and
            labels, and the generator's dropout is on in both.
        stop_gradient: The generator follows the difference of the scores as it is (Diff-Instruct, arXiv 2305.18455)
            instead of SiD's loss, whose gradient goes through both networks: four forwards less. Another estimator;
            ``sid_alpha`` and ``closed_form_loss`` have no say.
    """

    preset: Preset = "exact"
    forget: tuple[int, ...]
    num_classes: int
    sample_shape: tuple[int, int, int]
    override: tuple[int, ...] | None = None
    retain: tuple[int, ...] | None = None
    negative: tuple[int, ...] | None = None
    batch_size: int = 128
    forget_batch_size: int | None = None
    micro_batch_size: int | None = None
    mask: MaskConfig = field(default_factory=MaskConfig)
    generator_lr: float = 1e-5
    fake_score_lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = 1.0
    warmup_steps: int = 0
    ema_decay: float | None = 0.9999
    sid_alpha: float = 1.2
    t_init: int = 440
    t_min: int = 38
    t_max: int = 712
    retain_weight: float = 1.0
    forget_weight: float = 0.01
    seed: int = 0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    share_frozen_weights: bool = False
    fake_score_mask: MaskConfig | Literal["same"] | None = None
    merge_batches: bool | None = None
    closed_form_loss: bool | None = None
    skip_frozen: bool | None = None
    reuse_generator_forward: bool | None = None
    stop_gradient: bool | None = None

    def __post_init__(self) -> None:
        optional = ("override", "retain", "negative")
        for name in ("forget", "sample_shape", "betas", *optional):  # lists are welcome, and JSON has nothing else
            if name not in optional or getattr(self, name) is not None:
                object.__setattr__(self, name, to_tuple(f"DistillConfig.{name}", getattr(self, name)))
        if isinstance(self.mask, Mapping):
            object.__setattr__(self, "mask", MaskConfig.from_dict(self.mask))
        if isinstance(self.fake_score_mask, Mapping):
            object.__setattr__(self, "fake_score_mask", MaskConfig.from_dict(self.fake_score_mask))
        if isinstance(self.guidance, Mapping):
            object.__setattr__(self, "guidance", GuidanceConfig.from_dict(self.guidance))
        if not isinstance(self.guidance, GuidanceConfig):
            raise ValueError(f"DistillConfig.guidance: expected a GuidanceConfig, got {self.guidance!r}")
        if not isinstance(self.share_frozen_weights, bool):
            raise ValueError(
                f"DistillConfig.share_frozen_weights: expected True or False, got {self.share_frozen_weights!r}"
            )
        if not isinstance(self.mask, MaskConfig):
            raise ValueError(f"DistillConfig.mask: expected a MaskConfig, got {self.mask!r}")
        if not isinstance(self.fake_score_mask, MaskConfig | None) and self.fake_score_mask != "same":
            raise ValueError(
                f'DistillConfig.fake_score_mask: expected a MaskConfig, "same" or None, got {self.fake_score_mask!r}'
            )
        self._check_numbers()
        self._resolve_preset()
        self._check_classes()

    def _resolve_preset(self) -> None:
        """Afterwards no switch is None: what is in a config is what runs."""
        one_of("DistillConfig.preset", self.preset, get_args(Preset))
        for name, presets in SWITCHES.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, presets[self.preset])
            elif not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"DistillConfig.{name}: expected True or False, or None for what preset {self.preset!r} says, "
                    f"got {getattr(self, name)!r}"
                )
        if self.forget_batch_size is None and self.preset == "fast":
            object.__setattr__(self, "forget_batch_size", max(1, self.batch_size // FAST_FORGET_SHARE))
        if self.reuse_generator_forward and (self.guidance.dropout or self.micro_batch_size):
            raise ValueError(
                "DistillConfig.reuse_generator_forward: the generator's samples of one update serve the other, so they "
                "are kept with their graph, and none of their classes is dropped; leave out micro_batch_size and "
                "guidance.dropout, or the switch"
            )

    def _check_classes(self) -> None:
        if not self.forget and self.mask.looks and self.mask.saliency != "distillation":
            raise ValueError(
                f"DistillConfig.forget: nothing is to be forgotten, so MaskConfig.saliency={self.mask.saliency!r} has "
                f"nothing to look at; name classes, or take kind='dense' or saliency='distillation'"
            )
        check_classes("DistillConfig", self.forget, self.override, self.num_classes)
        check_retained("DistillConfig", self.retain, self.forget, self.num_classes)
        check_substitutes("DistillConfig.negative", self.negative, self.forget, self.num_classes)

    def _check_numbers(self) -> None:
        check_numbers(self, _NUMBERS)
        if len(self.sample_shape) != 3 or not all(is_number(size, "a positive integer") for size in self.sample_shape):
            raise ValueError(f"DistillConfig.sample_shape: expected (channels, height, width), got {self.sample_shape}")
        if len(self.betas) != 2 or not all(is_number(beta, "a number in [0, 1)") for beta in self.betas):
            raise ValueError(f"DistillConfig.betas: expected two numbers in [0, 1), got {self.betas}")
        if not self.t_min < self.t_max:
            raise ValueError(f"DistillConfig: expected 0 <= t_min < t_max, got t_min={self.t_min}, t_max={self.t_max}")

    @property
    def mask_of_fake_score(self) -> MaskConfig:
        """What ``fake_score_mask`` stands for."""
        if self.fake_score_mask is None:
            return MaskConfig(kind="dense")
        return self.mask if self.fake_score_mask == "same" else self.fake_score_mask

    @property
    def forget_samples(self) -> int:
        """Samples of forgotten classes in each update."""
        return (self.forget_batch_size or self.batch_size) if self.forget else 0

    @property
    def retained(self) -> tuple[int, ...]:
        """Classes that are kept."""
        return retained_classes(self.retain, self.forget, self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """From ``to_dict``; unknown keys are refused."""
        known_keys(cls, values)
        return cls(**values)
