"""Settings of a mask and of a distillation run: every default once, validated where it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pecker_fast.blocks import Block, check_block

MaskKind = Literal["saliency", "random", "dense"]
Scope = Literal["global", "layer"]
AccumulateKind = Literal["signed_sum", "abs", "square"]
LrScale = Literal["none", "density", "mass"]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which weights of the generator train.

    Attributes:
        kind: "saliency" (PECKER), "random" (the control: same density, no information) or "dense" (every weight).
        density: Share of all weights that train, in (0, 1].
        block: (out, in), "row", "element" or "auto"; see ``BlockMask``.
        scope: Rank blocks over the whole network ("global") or within each layer ("layer").
        accumulate: How gradients add up to saliency: "signed_sum" (SalUn), "abs" or "square".
        batches: Batches of the saliency pass, when it draws its own samples. Too few make a noisy mask.
        batch_size: Samples in each of them; None takes the distiller's ``forget_batch_size``.
        lr_scale: What multiplies the generator's learning rate, because fewer moving weights need larger steps to move
            the function as far: "none" 1, "density" 1 / density, "mass" 1 / sqrt(mass * density), mass being the
            share of the summed gradient magnitude that falls on active weights. For a random mask the last two agree.
    """

    kind: MaskKind = "saliency"
    density: float = 0.1
    block: Block = "auto"
    scope: Scope = "global"
    accumulate: AccumulateKind = "signed_sum"
    batches: int = 8
    batch_size: int | None = None
    lr_scale: LrScale = "none"

    def __post_init__(self) -> None:
        _one_of("MaskConfig.kind", self.kind, get_args(MaskKind))
        _one_of("MaskConfig.scope", self.scope, get_args(Scope))
        _one_of("MaskConfig.accumulate", self.accumulate, get_args(AccumulateKind))
        _one_of("MaskConfig.lr_scale", self.lr_scale, get_args(LrScale))
        check_density(self.density)
        if isinstance(self.block, list):  # JSON has no tuples
            object.__setattr__(self, "block", tuple(self.block))
        check_block(self.block)
        _positive_int("MaskConfig.batches", self.batches)
        if self.batch_size is not None:
            _positive_int("MaskConfig.batch_size", self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskConfig:
        """From ``to_dict``; unknown keys are refused."""
        _known_keys(cls, values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One erasure: what to forget, what to put in its place, and how to train. Defaults are SFD's for CIFAR-10.

    Attributes:
        forget: Classes to forget.
        override: What the true score is asked for in their place: one class for each forgotten one, one for all, or
            None for a random retained class at every draw.
        num_classes: Classes in all.
        sample_shape: (channels, height, width).
        batch_size: Samples of retained classes in each update.
        forget_batch_size: Samples of forgotten classes in each update; None takes ``batch_size``.
        mask: Which weights of the generator train.
        generator_lr: Learning rate of the generator, before ``mask.lr_scale``.
        fake_score_lr: Learning rate of the fake score.
        betas: Adam's; the published runs have no first moment.
        eps: Adam's.
        weight_decay: Decoupled weight decay.
        clip_value: Gradients are clipped to this magnitude, element by element; None does not clip.
        warmup_steps: Steps of linear learning-rate warm-up; with beta1 = 0 the first step is lr * sign(gradient).
        ema_decay: Of the generator's running average, which is what is sampled and saved.
        sid_alpha: alpha of the SiD loss.
        t_init: Timestep at which the one-step generator starts.
        t_min: Smallest timestep of the score losses.
        t_max: Timesteps of the score losses are below this.
        retain_weight: Weight of the losses on retained classes.
        forget_weight: Weight of the losses on forgotten classes.
        seed: Of every draw: labels, noise, timesteps, random masks.
        fake_score_mask: Which weights of the fake score train, chosen as the generator's are; None trains all of them,
            as published. Saliency is of the fake score's own loss, on retained and forgotten classes.
        reuse_generator_forward: The generator's samples of the fake score's update serve its own update too, with fresh
            timesteps and noise: two forwards less of 22. Same expectation, but both updates share starting noise and
            labels, and the generator's dropout is on in both.
        stop_gradient: The generator follows the difference of the scores as it is (Diff-Instruct, arXiv 2305.18455)
            instead of SiD's loss, whose gradient goes through both networks: four forwards less. Another estimator;
            ``sid_alpha`` has no say.
    """

    forget: tuple[int, ...]
    num_classes: int
    sample_shape: tuple[int, int, int]
    override: tuple[int, ...] | None = None
    batch_size: int = 128
    forget_batch_size: int | None = None
    mask: MaskConfig = field(default_factory=MaskConfig)
    generator_lr: float = 1e-5
    fake_score_lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = 1.0
    warmup_steps: int = 0
    ema_decay: float = 0.9999
    sid_alpha: float = 1.2
    t_init: int = 440
    t_min: int = 38
    t_max: int = 712
    retain_weight: float = 1.0
    forget_weight: float = 0.01
    seed: int = 0
    fake_score_mask: MaskConfig | None = None
    reuse_generator_forward: bool = False
    stop_gradient: bool = False

    def __post_init__(self) -> None:
        for name in ("forget", "override", "sample_shape", "betas"):  # lists are welcome, and JSON has nothing else
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if isinstance(self.mask, Mapping):
            object.__setattr__(self, "mask", MaskConfig.from_dict(self.mask))
        if isinstance(self.fake_score_mask, Mapping):
            object.__setattr__(self, "fake_score_mask", MaskConfig.from_dict(self.fake_score_mask))
        for name in ("reuse_generator_forward", "stop_gradient"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"DistillConfig.{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("num_classes", "batch_size"):
            _positive_int(f"DistillConfig.{name}", getattr(self, name))
        if self.forget_batch_size is not None:
            _positive_int("DistillConfig.forget_batch_size", self.forget_batch_size)
        if len(self.sample_shape) != 3 or min(self.sample_shape) < 1:
            raise ValueError(f"DistillConfig.sample_shape: expected (channels, height, width), got {self.sample_shape}")
        self._check_classes()
        self._check_numbers()

    def _check_classes(self) -> None:
        if not self.forget:
            raise ValueError("DistillConfig.forget: expected at least one class to forget, got none")
        for name in ("forget", "override"):
            for label in getattr(self, name) or ():
                if not isinstance(label, int) or not 0 <= label < self.num_classes:
                    raise ValueError(
                        f"DistillConfig.{name}: unknown class {label!r}; "
                        f"the model has classes 0 to {self.num_classes - 1}"
                    )
        if len(set(self.forget)) != len(self.forget):
            raise ValueError(f"DistillConfig.forget: a class is named twice in {self.forget}")
        if not self.retained:
            raise ValueError("DistillConfig.forget: every class is forgotten; at least one must be retained")
        if self.override is not None:
            if both := set(self.override) & set(self.forget):
                raise ValueError(f"DistillConfig.override: class {min(both)} is to be forgotten; name a retained class")
            if len(self.override) not in (1, len(self.forget)):
                raise ValueError(
                    f"DistillConfig.override: expected one class, or one for each of the {len(self.forget)} forgotten, "
                    f"got {len(self.override)}"
                )

    def _check_numbers(self) -> None:
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"DistillConfig: expected 0 <= t_min < t_max, got t_min={self.t_min}, t_max={self.t_max}")
        if self.t_init < 0:
            raise ValueError(f"DistillConfig.t_init: expected a timestep, got {self.t_init}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"DistillConfig.betas: expected two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"DistillConfig.ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        for name in ("generator_lr", "fake_score_lr", "clip_value"):
            value = getattr(self, name)
            if not (value is None and name == "clip_value") and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"DistillConfig.{name}: expected a positive number, got {value}")
        for name in ("retain_weight", "forget_weight", "weight_decay", "eps", "warmup_steps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"DistillConfig.{name}: expected a number >= 0, got {value}")

    @property
    def retained(self) -> tuple[int, ...]:
        """Classes that are kept."""
        return tuple(label for label in range(self.num_classes) if label not in self.forget)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """From ``to_dict``; unknown keys are refused."""
        _known_keys(cls, values)
        return cls(**values)


def check_density(density: float) -> None:
    """Refuse a density outside (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density: expected the share of weights that train, in (0, 1], got {density!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _known_keys(cls: type, values: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
