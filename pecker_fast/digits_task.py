"""The demonstration's task: real digits, a diffusion model of them, and a judge of what is drawn."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pecker_fast import distilled, evaluation, models, pretrain
from pecker_fast.checkpoint import atomic_folder
from pecker_fast.classes import Classes
from pecker_fast.config import DistillConfig
from pecker_fast.data import ImageData, load_digits
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.mask_config import MaskConfig
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.schedule import NoiseSchedule

NUM_CLASSES = 10
CLASSES = Classes(NUM_CLASSES, tuple(map(str, range(NUM_CLASSES))))
SAMPLE_SHAPE = (1, 8, 8)
SCHEDULE = NoiseSchedule.linear()
DISTILLED = DistillConfig(
    forget=(),
    num_classes=NUM_CLASSES,
    sample_shape=SAMPLE_SHAPE,
    batch_size=64,
    mask=MaskConfig(kind="dense"),
    generator_lr=5e-4,
    fake_score_lr=5e-4,
    clip_value=None,
    warmup_steps=10,
    ema_decay=0.98,
    sid_alpha=1.0,
    t_init=500,
    t_min=20,
    t_max=700,
)
"""How ``load_distilled`` distils: as the demonstration does, without forgetting."""


def default_cache_dir() -> Path:
    """``$PECKER_FAST_CACHE``, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PECKER_FAST_CACHE") or Path(base) / "pecker_fast")


def load_data() -> ImageData:
    """The real digits."""
    return load_digits()


def load_teacher(
    cache_dir: Path | None = None, progress: bool = True, short: bool = False, *, held_out: bool = False
) -> nn.Module:
    """The pretrained diffusion model of digits, from the cache or trained now (about a minute).

    With ``held_out`` it has seen four fifths of them, those that the judge is trained on, and the rest is new to it.
    """
    settings = {"steps": 20 if short else 1000, "batch_size": 128, "learning_rate": 5e-3, "ema_decay": 0.998, "seed": 0}
    model = DDPMUNet.digits()

    def train() -> nn.Module:
        data = load_data().split()[0] if held_out else load_data()
        return pretrain.train_denoiser(model, data, SCHEDULE, progress=progress, **settings)  # type: ignore[arg-type]

    generation = {"kind": "ddim", "steps": 20, "schedule": SCHEDULE.to_dict(), "sample_shape": list(SAMPLE_SHAPE)}
    name = "teacher-split" if held_out else "teacher"
    return _cached(name, {**settings, **model.config}, cache_dir, train, generation)


def load_judge(cache_dir: Path | None = None, progress: bool = True, short: bool = False) -> DigitsClassifier:
    """The classifier that judges images, trained on four fifths of the real digits, from the cache or trained now."""
    settings = {"steps": 20 if short else 300, "batch_size": 128, "learning_rate": 3e-3, "seed": 0}
    model = DigitsClassifier()

    def train() -> nn.Module:
        return pretrain.train_classifier(model, load_data().split()[0], progress=progress, **settings)  # type: ignore[arg-type]

    judge = _cached("judge", {**settings, **model.config}, cache_dir, train, None)
    return cast(DigitsClassifier, judge)


def load_distilled(
    cache_dir: Path | None = None, progress: bool = True, short: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The one-step generator of the digits and the fake score that follows it: where requests for erasure start.

    From the cache, or distilled now from ``load_teacher``, 400 dense steps (about a minute).

    Returns:
        Generator and fake score, in eval mode on the CPU.
    """
    settings = {"steps": 8 if short else 400, "short": short, **DISTILLED.to_dict()}
    with torch.device("meta"):
        architecture = DDPMUNet.digits().config
    folder = _folder("distilled", {**settings, **architecture}, cache_dir)
    if not folder.exists():
        distiller = MaskedDistiller(load_teacher(cache_dir, progress, short), SCHEDULE, DISTILLED)
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # dropout's draws, the same each time and none of the caller's
            torch.manual_seed(DISTILLED.seed)
            for _ in distiller.run(settings["steps"], progress=progress, label="distil"):
                pass
        with atomic_folder(folder) as unfinished:
            distilled.write(distiller, unfinished, settings["steps"], time.perf_counter() - started)
    found = distilled.load(folder)
    for network in (found.generator, found.fake_score):
        CLASSES.put_on(network)
    return found.generator, found.fake_score


def _cached(
    name: str,
    settings: dict[str, Any],
    cache_dir: Path | None,
    train: Callable[[], nn.Module],
    generation: dict[str, Any] | None,
) -> nn.Module:
    """A trained network by its settings: loaded if it is there, trained and kept if not."""
    folder = _folder(name, settings, cache_dir)
    if not folder.exists():
        network = train()
        with atomic_folder(folder) as unfinished:
            models.storage.write_model(network, unfinished, generation)
    model = models.load(folder)
    CLASSES.put_on(model)  # which a cache of an older version does not name
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _folder(name: str, settings: dict[str, Any], cache_dir: Path | None) -> Path:
    key = hashlib.sha256(json.dumps([settings, torch.__version__], sort_keys=True).encode()).hexdigest()[:12]
    return (cache_dir or default_cache_dir()) / f"digits-{name}-{key}"


def evaluate_images(
    images: Tensor, labels: Tensor, judge: DigitsClassifier, data: ImageData, forget: tuple[int, ...]
) -> dict[str, Any]:
    """Judge generated digits, (N, 1, 8, 8); see `pecker_fast.evaluation.evaluate_images`."""
    return evaluation.evaluate_images(images, labels, judge, data, forget)


@dataclass(frozen=True)
class Evaluator:
    """Judges a distiller's samples from one fixed noise."""

    judge: DigitsClassifier
    data: ImageData
    forget: tuple[int, ...]
    samples: int

    def images(self, distiller: MaskedDistiller) -> tuple[Tensor, Tensor]:
        """``samples`` images of every digit, and their labels."""
        labels = torch.arange(NUM_CLASSES, device="cpu").repeat_interleave(self.samples)
        return distiller.sample(labels, seed=1234), labels

    def __call__(self, distiller: MaskedDistiller) -> dict[str, Any]:
        """See ``evaluate_images``."""
        return evaluate_images(*self.images(distiller), self.judge, self.data, self.forget)
