"""What is compared: methods by name, each with its mask and its update rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pecker_fast.baselines import Baseline, salun_mask_config
from pecker_fast.blocks import Block
from pecker_fast.mask_config import MaskConfig

Family = Literal["distillation", "diffusion"]
"""One-step generators by Score Forgetting Distillation, or diffusion models that are trained further."""

DENSE = MaskConfig(kind="dense")
REFERENCE = "sfd"
"""Whose seconds are everybody's budget, and what the others are compared with."""
DEFAULT = ("sfd", "pecker", "random")
"""The falsification test: does saliency beat chance, and does either beat training every weight?"""


@dataclass(frozen=True)
class Method:
    """One way to make a model forget.

    Attributes:
        name: What it is called.
        family: What comes out.
        about: What it does, in a few words.
        mask: Which weights train.
        settings: Fields of ``DistillConfig`` or ``BaselineConfig`` beside the task's.
        tuned_as: The method whose learning rate it takes; None is tuned by itself.
        own_length: It runs for as long as the task says that training from scratch takes, and is not tuned.
        as_dense_as: The mask whose density it takes: ranked by layer, blocks rarely use up what is asked for.
    """

    name: str
    family: Family
    about: str
    mask: MaskConfig = DENSE
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None
    own_length: bool = False
    as_dense_as: MaskConfig | None = None

    @property
    def needs(self) -> str:
        """What data it trains on."""
        if self.family == "distillation":
            return "none: class labels"
        needed: str = Baseline.NEEDS[self.settings["method"]][0]
        return needed


def methods(density: float = 0.25, block: Block = "row") -> Mapping[str, Method]:
    """Everything that can be compared, with masks of this density and these blocks.

    Raises:
        ValueError: A density or block out of range.
    """
    found = (*_distillation(density, block), *_diffusion(density, block))
    return MappingProxyType({method.name: method for method in found})


def _distillation(density: float, block: Block) -> tuple[Method, ...]:
    def masked(kind: str, **changes: Any) -> MaskConfig:
        return MaskConfig(kind=kind, density=density, block=block, **changes)  # type: ignore[arg-type]

    def distilled(name: str, about: str, mask: MaskConfig, tuned_as: str | None = None, **more: Any) -> Method:
        return Method(name, "distillation", about, mask, tuned_as=tuned_as, **more)

    shared: dict[str, Any] = {"lr_scale": "none"}
    own_loss: dict[str, Any] = {"saliency": "distillation", "accumulate": "square"}
    return (
        distilled("sfd", "every weight", DENSE),
        distilled("pecker", "saliency of noise prediction, ranked by layer", masked("saliency")),
        distilled("pecker_global", "the same, ranked over the network", masked("saliency", scope="global")),
        distilled("pecker_distillation", "saliency of the generator's own loss", masked("saliency", **own_loss)),
        distilled("random", "as many weights by chance", masked("random"), as_dense_as=masked("saliency")),
        distilled("complement", "as many, by chance, of those that saliency left", masked("complement")),
        distilled("layer_random", "as many of each layer as saliency chose, by chance", masked("layer_random")),
        distilled("pecker_shared_lr", "pecker at sfd's learning rate", masked("saliency", **shared), REFERENCE),
        distilled(
            "random_shared_lr",
            "random at sfd's learning rate",
            masked("random", **shared),
            REFERENCE,
            as_dense_as=masked("saliency"),
        ),
    )


def _diffusion(density: float, block: Block) -> tuple[Method, ...]:
    def trained(name: str, about: str, rule: str, mask: MaskConfig = DENSE, **settings: Any) -> Method:
        like = salient if mask is chance else None
        own = {"method": rule, **settings}
        return Method(name, "diffusion", about, mask, own, own_length=rule == "retrain", as_dense_as=like)

    salun = salun_mask_config(batches=8)
    salient, chance = (MaskConfig(kind=kind, density=density, block=block) for kind in ("saliency", "random"))
    return (
        trained("salun", "random label on SalUn's half of the weights", "random_label", salun),
        trained("salun_ga", "gradient ascent on SalUn's half of the weights", "gradient_ascent", salun),
        trained("random_label", "predict another class's noise", "random_label"),
        trained("random_label_masked", "the same, salient blocks", "random_label", salient),
        trained("random_label_random", "the same, blocks by chance", "random_label", chance),
        trained("gradient_ascent", "away from the forgotten images", "gradient_ascent"),
        trained("fine_tune", "retained images only", "fine_tune"),
        trained("fine_tune_masked", "the same, salient blocks", "fine_tune", salient),
        trained("esd", "away from the class's direction, no images", "esd"),
        trained("esd_retain", "the same, retained classes held", "esd", retain_weight=1.0),
        trained("selective_amnesia", "Fisher-weighted, on generated replay", "selective_amnesia"),
        trained("retrain", "from scratch, without the class", "retrain"),
    )
