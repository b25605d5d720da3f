"""What methods are compared on: a diffusion model, a judge, real images, and settings that suit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from pecker_fast.classes import Classes
from pecker_fast.data import ImageData
from pecker_fast.delta.fingerprint import fingerprint_all
from pecker_fast.distilled import fingerprint_of
from pecker_fast.schedule import NoiseSchedule


@dataclass(frozen=True)
class Task:
    """One piece of work, the same for every method.

    Attributes:
        name: What it is called.
        true_score: The diffusion model that is to forget, trained on ``train``.
        schedule: Its noise schedule.
        judge: Classifier with ``features``, trained on ``train``.
        train: Real images that the model knows.
        held_out: Real images that nothing was trained on.
        distillation: Fields of ``DistillConfig``.
        diffusion: Fields of ``BaselineConfig``.
        rules: Update rule -> fields of ``BaselineConfig`` that it has instead, where published ones do nothing here.
        distillation_lr: Learning rate that factors multiply.
        diffusion_lr: The same for diffusion models.
        retrain_steps: Steps of training from scratch.
        retraining: Arguments of ``train_denoiser`` that the model itself was trained with.
        relearning_lr: Learning rate of the attacker who wants the class back.
    """

    name: str
    true_score: nn.Module
    schedule: NoiseSchedule
    judge: nn.Module
    train: ImageData
    held_out: ImageData
    distillation: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    rules: Mapping[str, Mapping[str, Any]]
    distillation_lr: float
    diffusion_lr: float
    retrain_steps: int
    retraining: Mapping[str, Any]
    relearning_lr: float = 1e-4

    @property
    def num_classes(self) -> int:
        """Classes in all."""
        return len(self.train.class_names)

    @property
    def classes(self) -> Classes:
        """Their names; classes that model or judge never saw, or that have no image to compare with, are unseen."""
        known = (Classes.of_module(network) for network in (self.true_score, self.judge))
        found = [Classes.of_images(self.train), *(classes for classes in known if classes is not None)]
        unseen = {label for classes in found for label in classes.unseen}
        return replace(found[0], unseen=tuple(sorted(unseen)))

    def retained(self, forget: Sequence[int]) -> tuple[int, ...]:
        """Classes that are kept, where ``forget`` are forgotten: what ``distillation`` retains, or all others."""
        kept = self.distillation.get("retain", range(self.num_classes))
        return tuple(label for label in self.classes.retained(forget) if label in kept)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return cast(tuple[int, int, int], tuple(self.train.images.shape[1:]))

    def overrides(self, forget: Sequence[int]) -> tuple[int, ...]:
        """What is drawn instead of each forgotten class: the next retained one."""
        kept, count = self.retained(forget), self.num_classes
        return tuple(min(kept, key=lambda other: (other - label) % count) for label in forget)

    def description(self) -> dict[str, Any]:
        """What runs of it depend on, JSON values."""
        settings = ("distillation", "diffusion", "rules", "retraining")
        numbers = ("distillation_lr", "diffusion_lr", "retrain_steps", "relearning_lr")
        networks = {name: fingerprint_of(getattr(self, name)) for name in ("true_score", "judge")}
        images = {name: _marks(getattr(self, name)) for name in ("train", "held_out")}
        schedule = self.schedule.to_dict()
        own = {name: getattr(self, name) for name in (*settings, *numbers)}
        return {"task": self.name, **networks, "schedule": schedule, "images": images, **own}


def _marks(data: ImageData) -> dict[str, Any]:
    """How many images, and a fingerprint of them and of their labels."""
    tensors = {"images": data.images, "labels": data.labels}
    return {"images": len(data), "fingerprint": f"{fingerprint_all(tensors, progress=False):016x}"}


def digits(cache_dir: Path | None = None, progress: bool = True, short: bool = False) -> Task:
    """The real 8 x 8 digits: model and judge are trained on four fifths of them, or come from the cache.

    ``short`` shows that everything works, not what it can do.
    """
    from pecker_fast import digits_task

    train, held_out = digits_task.load_data().split()
    settings = digits_task.DISTILLED
    names = ("t_init", "t_min", "t_max", "sid_alpha", "clip_value", "warmup_steps")
    return Task(
        name="digits",
        true_score=digits_task.load_teacher(cache_dir, progress, short, held_out=True),
        schedule=digits_task.SCHEDULE,
        judge=digits_task.load_judge(cache_dir, progress, short),
        train=train,
        held_out=held_out,
        distillation={name: getattr(settings, name) for name in names}
        | {"batch_size": 32, "forget_batch_size": 8, "forget_weight": 0.05, "ema_decay": 0.95},
        diffusion={"batch_size": 32, "forget_batch_size": 32, "ema_decay": 0.95, "warmup_steps": 10}
        | {"sampling_steps": 4 if short else 20, "fisher_timesteps": 2 if short else 10}
        | {"fisher_samples": 2, "replay_samples": 4 if short else 100},
        rules={
            # Published, lambda is 10 and holds everything, and ascent is a thousand times what it is held by.
            "selective_amnesia": {"ewc_weight": 1e-3},
            "gradient_ascent": {"forget_weight": 0.05, "retain_weight": 1.0},
        },
        distillation_lr=1e-3,
        diffusion_lr=5e-4,
        retrain_steps=20 if short else 1000,
        retraining={"batch_size": 128, "learning_rate": 5e-3, "ema_decay": 0.998},
    )
