"""What is compared: arms by name, each a change of one common setting, and the studies that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pecker_fast import DistillConfig, MaskConfig
from pecker_fast.config import SWITCHES
from pecker_fast.demo import DemoConfig

LR = 5e-4
"""Learning rate of both networks before an arm's factor and its mask's scale."""
REFERENCE = "dense"
"""What the masks of "density" are compared with, and whose learning rate all arms of "switches" take."""
PUBLISHED = "published"
"""What switches and the masks of the speed table are compared with; tuned too, to say what its own rate would be."""
EMA = 0.95
"""Of the generator: these runs are too short for more."""
BATCH = 32
"""Retained samples of an update."""
REPORTED, BOTH = ((7,), (5,)), (2, 6)
"""Classes that the reported runs forget, one and two at once; no setting was chosen on them."""
REPORTED_SEEDS = (0, 1, 2)
TUNED_ON, TUNING_SEED = (0,), 100
"""What learning rates are tuned on."""
DENSITIES = (0.5, 0.25, 0.1, 0.05)
SALIENCIES = (("noise_prediction", "global"), ("noise_prediction", "layer"), ("distillation", "layer"))
"""Whose gradients, and ranked over what; the first is the published one."""
WARMUP = 30
"""Steps of learning-rate warm-up that are tried with concentrated masks; all other arms have 10."""
FACTORS = (1.0, 2.0, 4.0)
"""Learning rates that are tried for each arm, times ``LR`` and the mask's scale: the same budget for all."""


@dataclass(frozen=True)
class Arm:
    """One way to distil.

    Attributes:
        name: What tables call it.
        settings: Of ``DistillConfig``, beside those of the demonstration.
        factor: Multiplies the learning rates of both networks.
    """

    name: str
    settings: Mapping[str, Any]
    factor: float = 1.0

    @property
    def tuned_as(self) -> str:
        """The arm whose learning rate it takes: whatever the preset and the switches, so that nothing else differs."""
        if self.settings.get("mask", DENSE).kind == "dense":
            return REFERENCE
        return self.name.replace("fast, ", "exact, ")

    def config(self, forget: tuple[int, ...], seed: int) -> DistillConfig:
        """The arm's run that forgets these classes."""
        common = DemoConfig(forget=forget, seed=seed).distill_config("dense").to_dict()
        for name in (*SWITCHES, "preset", "forget_batch_size", "fake_score_mask", "mask", "batch_size"):
            common.pop(name, None)
        rates = dict.fromkeys(("generator_lr", "fake_score_lr"), LR * self.factor)
        return DistillConfig(
            **(common | {"mask": DENSE, "batch_size": BATCH, "ema_decay": EMA} | rates | dict(self.settings))
        )

    def tuned(self, factor: float) -> Arm:
        """The same with another learning rate."""
        return replace(self, factor=factor)


DENSE = MaskConfig(kind="dense")


def random_rows(density: float, **changes: Any) -> MaskConfig:
    """The control: rows by chance."""
    return MaskConfig(kind="random", density=density, block="row", lr_scale="mass", **changes)


def salient_rows(density: float, saliency: str, **changes: Any) -> MaskConfig:
    """Rows by saliency: "published" is SalUn's signed sum of noise-prediction gradients, the others sums of squares."""
    published = saliency == "noise_prediction"
    look: dict[str, Any] = {"saliency": saliency, "accumulate": "signed_sum" if published else "square"}
    look |= {"batches": 8, "batch_size": 64 if published else None}
    return MaskConfig(kind="saliency", density=density, block="row", lr_scale="mass", **(look | changes))


def _switches() -> Iterator[Arm]:
    yield Arm(PUBLISHED, {"preset": "published"})
    yield Arm("exact", {})
    yield Arm("exact, generator forward reused", {"reuse_generator_forward": True})
    yield Arm("exact, a quarter forgotten", {"forget_batch_size": BATCH // 4})
    both = {"reuse_generator_forward": True, "forget_batch_size": BATCH // 4}
    yield Arm("exact, generator forward reused, a quarter forgotten", both)
    yield Arm("exact, stop-gradient", {"stop_gradient": True})
    yield Arm("fast", {"preset": "fast"})


def _masked() -> Iterator[Arm]:
    """The speed table's masks: a tenth of the weights, in the decoder of both networks, or anywhere."""
    for preset in ("exact", "fast"):
        for mask in (random_rows(0.1), salient_rows(0.1, "noise_prediction", scope="layer")):
            both = {"preset": preset, "mask": replace(mask, region="decoder", norms=False), "fake_score_mask": "same"}
            yield Arm(f"{preset}, {mask.kind} rows 0.1 of the decoder", both)
    yield Arm("exact, random rows 0.1 of the generator", {"mask": random_rows(0.1)})


def _densities() -> Iterator[Arm]:
    quarter = {"forget_batch_size": BATCH // 4}
    yield Arm(REFERENCE, quarter)
    for density in DENSITIES:
        yield Arm(f"random {density:g}", {**quarter, "mask": random_rows(density)})
        for saliency, scope in SALIENCIES:
            name = f"{saliency}{', by layer' if scope == 'layer' else ''}"
            mask = salient_rows(density, saliency, scope=scope)
            yield Arm(f"{name} {density:g}", {**quarter, "mask": mask})
            if name == "noise_prediction, by layer" and density <= 0.1:
                yield Arm(f"{name}, warm-up {WARMUP} {density:g}", {**quarter, "mask": mask, "warmup_steps": WARMUP})


STUDIES: Mapping[str, tuple[Arm, ...]] = {
    "switches": tuple(_switches()),
    "masked": tuple(_masked()),
    "density": tuple(_densities()),
}
