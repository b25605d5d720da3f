"""Settings of a mask: which weights train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pecker_fast.blocks import Block, check_block
from pecker_fast.regions import Region, check_region
from pecker_fast.settings import check_density, check_numbers, known_keys, one_of

MaskKind = Literal["saliency", "random", "dense", "complement", "layer_random"]
Scope = Literal["global", "layer"]
Budget = Literal["parameters", "flops"]
Rank = Literal["weight", "flop"]
AccumulateKind = Literal["signed_sum", "abs", "square"]
LrScale = Literal["none", "density", "mass"]
SaliencyLoss = Literal["noise_prediction", "distillation", "forget_specific"]

_NUMBERS = {
    "saliency_warmup": "an integer >= 0",
    "batches": "a positive integer",
    "batch_size": "a positive integer or None",
    "lr_scale_max": "a positive number or None",
}


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which weights of the generator train.

    What has no say is ignored, so that one config serves every ``kind``: a dense run and a random control differ from
    the saliency run in that field alone (and "dense" wants ``norms`` True).

    Attributes:
        kind: "saliency" (PECKER; everything below has a say), "random" (the control: same density, no information;
            what ranks or looks has no say: ``scope``, ``rank``, ``accumulate``, ``batches``, ``batch_size``,
            ``saliency``, ``saliency_warmup``) or "dense" (every weight of ``region``; but for that only ``lr_scale``
            and ``lr_scale_max`` have a say). With a mask that is given to ``MaskedDistiller.use_mask`` those two alone
            do. Two more controls begin with the saliency mask: "complement" draws as many weights by chance from those
            that it left (all of them, where they are fewer), "layer_random" as many of each weight as it has there.
        density: Share of all weights that train, in (0, 1].
        block: (out, in), "row", "element" or "auto"; see ``BlockMask``.
        scope: Rank blocks over the whole network ("global") or within each layer ("layer"). Random blocks are of the
            whole network.
        region: Where active weights may lie: "all", "encoder", "middle", "decoder", or prefixes of their names. With
            "decoder" no graph is recorded, and nothing differentiated, below it. ``density`` stays a share of all.
        norms: Whether weights of norms may be active. One that is needs the gradient of every channel it sees, those of
            a skip from frozen layers too, which are left out otherwise. Not with kind "dense".
        budget: What ``density`` is a share of: "parameters", or "flops" of the weight gradients.
        rank: By saliency per "weight", or per "flop" of a weight's gradient. Nothing is ranked in a random mask.
        saliency: Whose gradient is looked at: "noise_prediction" (published: the noise-prediction loss on the classes
            to forget), "distillation" (the generator's own loss, on retained and forgotten classes), or
            "forget_specific" (its part on forgotten classes, relative to its part on retained ones). For the fake
            score's own mask it has no say, as ``saliency_warmup`` and ``batch_size`` have none: that one is by the fake
            score's own loss, on batches as it trains on.
        saliency_warmup: Updates of a copy of the fake score before the last two: until it has left the true score, the
            generator's loss on retained classes has no gradient at all. Not needed for "noise_prediction".
        accumulate: How gradients add up to saliency: "signed_sum" (SalUn), "abs" or "square".
        batches: Batches of the saliency pass, when it draws its own samples. Too few make a noisy mask.
        batch_size: Samples in each of them, with saliency "noise_prediction"; None takes the distiller's
            ``forget_batch_size``. The other two look at batches as the distiller trains on, and want None.
        lr_scale: What multiplies the generator's learning rate, because fewer moving weights need larger steps to move
            the function as far: "none" 1, "density" 1 / density, "mass" 1 / sqrt(mass * density), mass being the
            share of the summed gradient magnitude that falls on active weights. For a random mask the last two agree.
        lr_scale_max: At most this; None has no limit.
    """

    kind: MaskKind = "saliency"
    density: float = 0.1
    block: Block = "auto"
    scope: Scope = "layer"
    region: Region = "all"
    norms: bool = True
    budget: Budget = "parameters"
    rank: Rank = "weight"
    saliency: SaliencyLoss = "noise_prediction"
    saliency_warmup: int = 20
    accumulate: AccumulateKind = "signed_sum"
    batches: int = 8
    batch_size: int | None = None
    lr_scale: LrScale = "mass"
    lr_scale_max: float | None = None

    def __post_init__(self) -> None:
        one_of("MaskConfig.kind", self.kind, get_args(MaskKind))
        one_of("MaskConfig.scope", self.scope, get_args(Scope))
        one_of("MaskConfig.budget", self.budget, get_args(Budget))
        one_of("MaskConfig.rank", self.rank, get_args(Rank))
        one_of("MaskConfig.accumulate", self.accumulate, get_args(AccumulateKind))
        one_of("MaskConfig.lr_scale", self.lr_scale, get_args(LrScale))
        one_of("MaskConfig.saliency", self.saliency, get_args(SaliencyLoss))
        check_density(self.density, "MaskConfig.density")
        check_numbers(self, _NUMBERS)
        for name in ("block", "region"):
            if isinstance(value := getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        check_region(self.region)
        if not isinstance(self.norms, bool) or (self.kind == "dense" and not self.norms):
            raise ValueError(
                f"MaskConfig.norms: expected True or False, and True with kind 'dense', which trains every weight; got "
                f"{self.norms!r} with kind {self.kind!r}"
            )
        check_block(self.block)
        if self.batch_size is not None and self.saliency != "noise_prediction":
            raise ValueError(
                f"MaskConfig.batch_size: expected None with saliency {self.saliency!r}, which looks at batches as the "
                f"distiller trains on, got {self.batch_size}; set DistillConfig.batch_size and forget_batch_size"
            )

    @property
    def looks(self) -> bool:
        """Whether gradients are looked at to choose it."""
        return self.kind in ("saliency", "complement", "layer_random")

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskConfig:
        """From ``to_dict``; unknown keys are refused."""
        known_keys(cls, values)
        return cls(**values)
