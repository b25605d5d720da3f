"""The demonstration: erase handwritten digits from a small diffusion model, masked, with a random mask, and dense."""

from __future__ import annotations

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import report
from pecker_fast.blocks import Block
from pecker_fast.checkpoint import write_json
from pecker_fast.config import DistillConfig
from pecker_fast.digits_task import (
    NUM_CLASSES,
    SAMPLE_SHAPE,
    SCHEDULE,
    Evaluator,
    load_data,
    load_judge,
    load_teacher,
)
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.flops import count_flops
from pecker_fast.mask import BlockMask
from pecker_fast.mask_config import MaskConfig
from pecker_fast.models import DDPMUNet
from pecker_fast.output_folder import claim

TARGET = 0.95
"""Unlearning accuracy and retain accuracy at which a run has reached its target."""
KINDS = {"masked": "saliency", "random": "random", "dense": "dense"}
"""Name of a run -> kind of its mask."""
EVALUATED = {*range(5, 41, 5), *range(50, 101, 10)}
"""Steps after which a run is evaluated, besides every 25th and the last."""


WRITES = (
    *("report.html", "before_after.png", "curves.png", "saliency.png", "metrics.json"),
    *("model/", "delta/", "mask.safetensors", "distill_config.json"),
)
"""What it puts into its folder."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration does.

    Attributes:
        forget: Digits to erase.
        override: What the model is to draw instead, one for each or one for all; None takes the next retained digit.
        seed: Of the unlearning runs; teacher and judge are the same for every seed.
        density: Share of the generator's weights that train in the masked and the random run.
        block: Blocks of their masks.
        steps: Iterations of each run.
        short: A tiny run that shows that everything works, not what it can do.
        cache_dir: Where teacher and judge are kept; None takes ``default_cache_dir()``.
        progress: Show progress bars.
    """

    forget: tuple[int, ...] = (3,)
    override: tuple[int, ...] | None = None
    seed: int = 0
    density: float = 0.25
    block: Block = "row"
    steps: int = 150
    short: bool = False
    cache_dir: Path | None = None
    progress: bool = True

    def distill_config(self, kind: str) -> DistillConfig:
        """Settings of one run; they were found on the digits 0 and 1 (docs/design.md).

        Raises:
            ValueError: An unknown class, or a density out of range.
        """
        override = self.override
        if override is None and all(0 <= label < NUM_CLASSES for label in self.forget):
            override = tuple(_next_retained(label, self.forget) for label in self.forget)
        return DistillConfig(
            forget=self.forget,
            override=override,
            num_classes=NUM_CLASSES,
            sample_shape=SAMPLE_SHAPE,
            batch_size=64,
            forget_batch_size=16,
            mask=MaskConfig(
                kind=kind,  # type: ignore[arg-type]
                density=self.density,
                block=self.block,
                scope="layer",
                accumulate="signed_sum",
                batches=8,
                batch_size=64,
                lr_scale="density",
            ),
            generator_lr=5e-4,
            fake_score_lr=5e-4,
            clip_value=None,
            warmup_steps=10,
            ema_decay=0.98,
            sid_alpha=1.0,
            t_init=500,
            t_min=20,
            t_max=700,
            forget_weight=0.05,
            seed=self.seed,
        )


# -- one run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """One finished run: its figures, what they were on the way, its distiller."""

    figures: dict[str, Any]
    curve: list[dict[str, Any]]
    distiller: MaskedDistiller


def run_one(teacher: nn.Module, config: DistillConfig, steps: int, evaluator: Evaluator, progress: bool = True) -> Run:
    """Distil once; times and FLOPs include the mask, and leave out the evaluation."""
    distiller = MaskedDistiller(teacher, SCHEDULE, config)
    before = {name: weight.clone() for name, weight in distiller.generator.state_dict().items()}
    started = time.perf_counter()
    with count_flops() as mask_flops:
        mask = distiller.build_mask()
    mask_seconds = seconds = time.perf_counter() - started

    step_flops = _step_flops(teacher, config, mask)
    curve: list[dict[str, Any]] = []
    started = time.perf_counter()
    for step, _ in enumerate(distiller.run(steps, progress=progress, label=config.mask.kind), 1):
        seconds += time.perf_counter() - started
        if step in EVALUATED or step % 25 == 0 or step == steps:
            curve.append({"step": step, "seconds": seconds, **evaluator(distiller)})
        started = time.perf_counter()
    after = distiller.generator.state_dict()
    final = dataclasses.replace(evaluator, samples=3 * evaluator.samples)(distiller)
    figures = {
        "density": mask.density,
        "steps": steps,
        "images_seen": steps * 2 * (config.batch_size + config.forget_samples),
        "seconds": seconds,
        "mask_seconds": mask_seconds,
        "flops": mask_flops.total + steps * step_flops,
        **final,
        **_target(curve),
        "trainable_parameters": distiller.active.numel,
        "changed_parameters": sum(int((after[name] != weight).sum()) for name, weight in before.items()),
        "learning_rate": config.generator_lr * distiller.lr_scale,
    }
    return Run(figures, curve, distiller)


def _step_flops(teacher: nn.Module, config: DistillConfig, mask: BlockMask) -> int:
    """FLOPs of one step, counted in a rehearsal, which also takes what only a first step costs out of the times."""
    rehearsal = MaskedDistiller(teacher, SCHEDULE, config)
    rehearsal.use_mask(mask)
    with count_flops() as counted:
        rehearsal.step()
    return counted.total


def _target(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """When both accuracies were reached first, and the worst state from there on."""
    names = ("unlearning_accuracy", "retain_accuracy")
    reached = next((i for i, point in enumerate(curve) if min(point[name] for name in names) >= TARGET), None)
    if reached is None:
        return {"steps_to_target": None, "worst_after_target": None}
    rest = curve[reached:]
    worst = {name: min(point[name] for point in rest) for name in names}
    worst["frechet_distance"] = max(point["frechet_distance"] for point in rest)
    return {"steps_to_target": curve[reached]["step"], "worst_after_target": worst}


# -- the whole -------------------------------------------------------------------------------------


def plan(config: DemoConfig) -> dict[str, Any]:
    """What ``run_demo`` would do; nothing is trained or written."""
    settings = {name: config.distill_config(kind).to_dict() for name, kind in KINDS.items()}
    parameters = sum(p.numel() for p in DDPMUNet.digits().parameters())
    return {"steps": config.steps, "model_parameters": parameters, "runs": settings, "short": config.short}


def run_demo(config: DemoConfig, output_dir: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Train or load teacher and judge, erase the digits three times with the same budget, and write what came out.

    Args:
        config: What to erase, and how.
        output_dir: Gets report.html, three pictures, metrics.json, model/ and mask.safetensors of the masked run.
        overwrite: Whether an older result of the demo there may go.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: An unknown class, or a density out of range.
        FileFormatError: ``output_dir`` cannot be written, or has an older result or files of yours in the way; nothing
            has changed then.
    """
    settings = {name: config.distill_config(kind) for name, kind in KINDS.items()}
    # Before the minutes of training, so that an unwritable place is known at once.
    with claim(output_dir, "demo", WRITES, replace=overwrite) as folder:
        data = load_data()
        judge = load_judge(config.cache_dir, config.progress, config.short)
        teacher = load_teacher(config.cache_dir, config.progress, config.short)
        steps = 4 if config.short else config.steps
        evaluator = Evaluator(judge, data, config.forget, 20 if config.short else 100)
        start = MaskedDistiller(teacher, SCHEDULE, settings["dense"])
        before = dataclasses.replace(evaluator, samples=3 * evaluator.samples)(start)
        runs = {name: run_one(teacher, c, steps, evaluator, config.progress) for name, c in settings.items()}
        metrics = {
            "forget_class": list(config.forget),
            "override_class": list(settings["masked"].override or ()),
            "seed": config.seed,
            "runs": {name: run.figures for name, run in runs.items()},
            "before": before,
            "settings": {name: c.to_dict() for name, c in settings.items()},
            "versions": versions(),
        }
        runs["masked"].distiller.save(folder)
        write_json(folder / "metrics.json", metrics)
        report.write_report(
            folder,
            metrics,
            _picture(evaluator, start),
            _picture(evaluator, runs["masked"].distiller),
            {name: run.curve for name, run in runs.items()},
            {name: dict(_mask(runs[name]).layer_densities) for name in ("masked", "random")},
            data.class_names,
        )
    return metrics


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    import pecker_fast

    return {
        "pecker_fast": pecker_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _picture(evaluator: Evaluator, distiller: MaskedDistiller) -> Tensor:
    images, _ = dataclasses.replace(evaluator, samples=8).images(distiller)
    return images.clamp(-1, 1).view(NUM_CLASSES, 8, *SAMPLE_SHAPE)


def _mask(run: Run) -> Any:
    return run.distiller.mask


def _next_retained(label: int, forget: tuple[int, ...]) -> int:
    following = [(label + i) % NUM_CLASSES for i in range(1, NUM_CLASSES)]
    return next((other for other in following if other not in forget), label)
