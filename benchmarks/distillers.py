"""Distillers that race: their settings by name, how they are made, and what must be true of them first."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machines import REHEARSAL, here, sized
from measure import Row, Seconds
from torch import nn

from pecker_fast import (
    ActiveParameters,
    BlockMask,
    DistillConfig,
    MaskConfig,
    MaskedDistiller,
    NoiseSchedule,
)
from pecker_fast.memory_meter import bytes_by_claim, tensors_of
from pecker_fast.models import DDPMUNet

WIDTH, DENSITY = 128, 0.1
TOLERANCE = 1e-3
"""Of all gradients of a network together, relative: float32 sums in another order."""
QUALITY = Path(__file__).resolve().parent / "results" / "cpu" / "quality.json"
"""{"verdicts": {name of a setting: true or false}}: whether its quality on digits holds (quality/tables.py)."""


PLACES: Mapping[str, Mapping[str, Any]] = {
    "the decoder": {"region": "decoder", "norms": False},
    "the decoder with norms": {"region": "decoder"},
    "both networks": {},
    "the generator": {},
}
"""Where active weights lie -> settings of the mask; with the last one every weight of the fake score trains."""


@dataclass(frozen=True)
class Setting:
    """One way to distil.

    Attributes:
        preset: Of ``DistillConfig``.
        mask: "dense", "random" or "saliency".
        where: A key of ``PLACES``; a dense run trains every weight of both networks.
        switches: Switches that are on beyond the preset's.
        dtype: Of the networks; losses, masters and optimizer state are float32.
        compiled: Whether the networks are.
    """

    preset: str
    mask: str
    where: str = "the decoder"
    switches: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def name(self) -> str:
        """What the table of quality calls it: all that has a say in what is learned, but for the batch."""
        trained = "dense" if self.mask == "dense" else f"{self.mask} rows {DENSITY:g} of {self.where}"
        return ", ".join([self.preset, *self.switches, trained])

    @property
    def whole(self) -> str:
        """What a row calls it."""
        sizes = self.config(batch_size())
        how = [str(self.dtype).removeprefix("torch."), *(["compiled"] if self.compiled else [])]
        return ", ".join([self.name, f"batch {sizes.batch_size} + {sizes.forget_samples}", *how])

    def config(self, batch_size: int, **more: Any) -> DistillConfig:
        return DistillConfig(
            preset=self.preset,  # type: ignore[arg-type]
            forget=(0,),
            override=(1,),
            num_classes=10,
            sample_shape=sized((3, 32, 32), (1, 8, 8)),
            batch_size=batch_size,
            mask=MaskConfig(kind="dense"),  # what is used instead is given
            **dict.fromkeys(self.switches, True) | more,
        )


PUBLISHED = Setting("published", "dense")
EXACT = Setting("exact", "random")
REUSED = Setting("exact", "random", switches=("reuse_generator_forward",))
EXACT_BOTH = Setting("exact", "random", "both networks")
EXACT_GENERATOR = Setting("exact", "random", "the generator")
FAST = Setting("fast", "random")
EXACT_DENSE, FAST_DENSE = Setting("exact", "dense"), Setting("fast", "dense")
EXACT_NORMS = Setting("exact", "random", "the decoder with norms")
EXACT_SALIENCY = Setting("exact", "saliency")


def make_network(device: torch.device) -> nn.Module:
    """The DDPM UNet of CIFAR-10."""
    torch.manual_seed(0)
    made = sized(lambda: DDPMUNet(width=WIDTH), DDPMUNet.digits)()
    return made.to(device, memory_format=torch.channels_last)


def batch_size() -> int:
    """Retained samples of an update, and forgotten ones but with preset "fast"."""
    return sized(128 if here().device.type == "cuda" else 8, 2)


def make_mask(network: nn.Module, kind: str, where: str) -> BlockMask:
    """What a distiller chooses for its generator: rows, by chance or by the published saliency of one small batch."""
    if kind == "dense":
        return BlockMask.dense(network)
    own = MaskConfig(
        kind=kind,  # type: ignore[arg-type]
        density=DENSITY,
        block="row",
        scope="layer",
        batches=1,
        batch_size=4,
        **PLACES[where],
    )
    config = dataclasses.replace(Setting("exact", kind).config(1), mask=own)
    return MaskedDistiller(copy.deepcopy(network), NoiseSchedule.linear(), config).build_mask()


class Masks:
    """Masks of one network, each made once."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self._made = network, dict[tuple[str, str], BlockMask]()

    def without_dropout(self) -> Masks:
        """The same masks, of a copy that draws nothing."""
        still = copy.deepcopy(self.network)
        for module in still.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        copied = Masks(still)
        copied._made = self._made
        return copied

    def __getitem__(self, setting: Setting) -> BlockMask:
        """The generator's."""
        key = (setting.mask, setting.where)
        if key not in self._made:
            self._made[key] = make_mask(self.network, *key)
        return self._made[key]

    def of_fake_score(self, setting: Setting) -> BlockMask:
        """The fake score's: the same rows, or everything."""
        return self[PUBLISHED if setting.where == "the generator" else setting]


def make(setting: Setting, masks: Masks, **config: Any) -> MaskedDistiller:
    """A distiller, ready to step."""
    network = masks.network if setting.dtype == torch.float32 else copy.deepcopy(masks.network).to(setting.dtype)
    settings = setting.config(**{"batch_size": batch_size(), **config})
    distiller = MaskedDistiller(network, NoiseSchedule.linear(), settings)
    distiller.use_mask(masks[setting], masks.of_fake_score(setting))
    if setting.compiled:
        distiller.compile(**sized({}, {"backend": "eager", "disable": True}))
    return distiller


def check(masked: Setting, dense: Setting, masks: Masks) -> None:
    """The gradients of one small iteration are those of the dense one at the active blocks, in both networks."""
    found = {}
    own = masks.without_dropout()
    for setting in (masked, dense):
        # So small a step that both generators meet the same fake score.
        distiller = make(setting, own, batch_size=1, forget_batch_size=1, fake_score_lr=1e-30)
        distiller.step()
        found[setting] = [distiller.fake_score_optimizer.active, distiller.active]
    for ours, theirs in zip(found[masked], found[dense], strict=True):
        error = relative_error(ours, theirs)
        assert error <= TOLERANCE, f"{masked.name}: relative error {error:.2g}"


def iteration_flops(distiller: MaskedDistiller, known: Mapping[Any, int]) -> int:
    """Of ``distiller``; a rehearsal counts the first one alone, because to count takes longer there than to run."""
    return next(iter(known.values())) if REHEARSAL and known else distiller.flops()["total"]


def relative_error(ours: ActiveParameters, theirs: ActiveParameters) -> float:
    """Of all gradients of a network together, at our active blocks."""
    ours.bind_()
    theirs.bind_()
    wrong = total = 0.0
    for name in ours.names:
        active = ours.mask.to_dense(name).to(ours.values.device)
        expected = theirs.to_dense(theirs.grads, name) * active
        wrong += float((ours.to_dense(ours.grads, name) - expected).double().square().sum())
        total += float(expected.double().square().sum())
    assert total > 0
    return math.sqrt(wrong / total)


# -- memory ----------------------------------------------------------------------------------------


def bytes_of(thing: object) -> int:
    """Bytes of every tensor that is reachable from ``thing``, memory that several share once."""
    return sum(bytes_by_claim({"all": tensors_of(thing)}).values())


# -- quality ---------------------------------------------------------------------------------------


def quality(setting: Setting, path: Path = QUALITY) -> bool | None:
    """Whether the quality of a setting holds; None where nobody has measured it."""
    if not path.exists():
        return None
    verdict = json.loads(path.read_text(encoding="utf-8"))["verdicts"].get(setting.name)
    return None if verdict is None else bool(verdict)


def speed_row(
    ours: Setting,
    theirs: Setting,
    density: float,
    seconds: Mapping[Setting, Seconds],
    flops: Mapping[Setting, int],
    matmul_rate: float,
    target: str,
    path: Path = QUALITY,
) -> Row:
    """A line of the closing table; one whose quality does not hold is printed as failed and is no headline."""
    held = quality(ours, path)
    verdict = {None: "quality not measured", True: "quality holds", False: "quality does not hold"}[held]
    share = f"{flops[ours] / seconds[ours] / matmul_rate:.0%} of matmul"
    return Row(
        f"{'FAILED, ' if held is False else ''}distill: {ours.whole}",
        theirs.whole,
        density,
        1e3 * seconds[ours],
        1e3 * seconds[theirs],
        f"{flops[ours] / 1e12:.3g} : {flops[theirs] / 1e12:.3g} TFLOP ({flops[ours] / flops[theirs]:.3f})",
        ", ".join(filter(None, (share, target, verdict))),
        headline=held is not False,
        ours_spread=seconds[ours].spread,
        theirs_spread=seconds[theirs].spread,
    )
