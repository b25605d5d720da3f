"""What training will need of a device's memory, found out without computing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.baselines import Baseline
from pecker_fast.baselines.counting import ready_to_step
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.iteration_flops import unmasked_weights, without_data
from pecker_fast.mask_config import MaskConfig
from pecker_fast.maskable import survey
from pecker_fast.memory_meter import TensorMeter, bytes_by_claim, tensors_of
from pecker_fast.memory_parts import Trainer, held_parts, keep_gradients_bound, networks_of
from pecker_fast.time_estimate import TimeEstimate

CUDA_BLOCK = 512
"""Bytes that torch's allocator rounds up to on a GPU."""
STREAMED, WHOLE, NO_ATTENTION = "scores never whole", "scores whole in memory", "none"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on its device.

    Attributes:
        device: Kind of device that it was estimated for.
        parts: What is there between two steps, by part: "weights_shared" (by several networks), "weights_of_..." each
            network alone, "active_weights" (float32 masters), "gradients", "running_average", "optimizer_state",
            "prompt_embeddings", "everything_else" (tables of the masks, draws).
        activations: What a step holds on top of that at its height: what autograd saved, and temporaries.
        choosing_mask: Most that choosing the mask by saliency takes, weights included; 0 where it looks at nothing.
        attention: How attention was taken to be computed: "scores never whole" (fused kernels), "scores whole in
            memory", or "none".
    """

    device: str
    parts: dict[str, int]
    activations: int
    choosing_mask: int
    attention: str

    @property
    def held(self) -> int:
        """Between two steps."""
        return sum(self.parts.values())

    @property
    def step(self) -> int:
        """At the height of a step."""
        return self.held + self.activations

    @property
    def peak(self) -> int:
        """At the height of the run."""
        return max(self.step, self.choosing_mask)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self) | {"held": self.held, "step": self.step, "peak": self.peak}


def estimate_memory(trainer: Trainer, device: str | None = None) -> MemoryEstimate:
    """What ``trainer.step()`` takes of its device's memory, by part, and choosing its mask before.

    The very step runs on a copy whose weights have no data, under a meter that follows its tensors: nothing is computed
    and nothing of the run changes. Scratch memory within an operator does not show: workspaces of cuDNN and cuBLAS are
    to be added on a GPU, reordered operands of oneDNN on a CPU.

    Args:
        trainer: A ``MaskedDistiller`` or ``Baseline`` that has a mask.
        device: "cpu" or "cuda", where it will run; None is where its weights are. What depends on more than the size of
            tensors, such as how attention is computed, is taken as it is here.

    Returns:
        The estimate.

    Raises:
        RuntimeError: There is no mask yet.
        ValueError: An unknown ``device``.
    """
    device = trainer.device.type if device is None else device
    if device not in ("cpu", "cuda"):
        raise ValueError(f'estimate_memory: device: expected "cpu", "cuda" or None, got {device!r}')
    if trainer.mask is None:
        raise RuntimeError(
            "no mask yet, and memory depends on it: call build_mask() or use_mask() first, or "
            "use_stand_in_mask() for an estimate alone"
        )
    block = CUDA_BLOCK if device == "cuda" else 1
    copy = ready_to_step(trainer, 1) if isinstance(trainer, Baseline) else with_few_micro_batches(without_data(trainer))
    keep_gradients_bound(copy)
    above, operators = _above(copy, copy.step, block)
    return MemoryEstimate(device, held_parts(trainer), above, _choosing_mask(trainer, block), _attention(operators))


def use_stand_in_mask(trainer: Trainer) -> None:
    """Give a trainer without a mask one by chance where its config asks for saliency, of the same size and region.

    For estimates: memory and FLOPs go by how many blocks are active, hardly by which, and nothing has to be looked at.
    Do not train with it.

    Raises:
        RuntimeError: There is a mask already.
    """
    losses = trainer.masks.losses
    fake_score_mask = losses.config.fake_score_mask
    chance = dataclasses.replace(
        losses.config,
        mask=_by_chance(losses.config.mask),
        fake_score_mask=None if fake_score_mask is None else _by_chance(losses.config.mask_of_fake_score),
    )
    masks = dataclasses.replace(trainer.masks, losses=dataclasses.replace(losses, config=chance))
    mask = masks.of_generator(lambda: trainer.true_score)
    if isinstance(trainer, Baseline):
        trainer.use_mask(mask)
    else:
        trainer.use_mask(mask, masks.of_fake_score(trainer.fake_score))


def _by_chance(config: MaskConfig) -> MaskConfig:
    return dataclasses.replace(config, kind="random") if config.looks else config


def with_few_micro_batches(copy: MaskedDistiller) -> MaskedDistiller:
    """A copy without data that steps on two or three micro-batches, which are as high as all of them."""
    config = copy.config
    size = config.micro_batch_size
    if size is None:
        return copy
    forget = min(config.forget_samples, size) if config.forget else None
    config = dataclasses.replace(config, batch_size=min(config.batch_size, 2 * size), forget_batch_size=forget)
    copy.config = copy.draws.config = config
    copy.losses = dataclasses.replace(copy.losses, config=config)
    return copy


def _above(trainer: Trainer, run: Callable[[], object], block: int) -> tuple[int, set[str]]:
    """Most that ``run`` takes above what is there, and the operators that it calls."""
    meter = TensorMeter(tensors_of(trainer), block)
    with meter:
        run()
    return meter.peak - meter.held_bytes, meter.operators


def _attention(operators: set[str]) -> str:
    if any("attention" in name for name in operators):
        return STREAMED
    return WHOLE if operators & {"aten::_softmax", "aten::_safe_softmax"} else NO_ATTENTION


# -- choosing the mask -----------------------------------------------------------------------------


def _choosing_mask(trainer: Trainer, block: int) -> int:
    """The most of its passes: the weights, as they are before any is masked, sums for all of them, and a gradient."""
    looks = _looks_of_baseline(trainer, block) if isinstance(trainer, Baseline) else _looks(trainer, block)
    if not looks:
        return 0
    networks = list(networks_of(trainer).values())
    if trainer.config.share_frozen_weights:  # all of them share, until there is a mask
        networks = [trainer.true_score, trainer.base]
    dense = [weight for network in networks for weight in _before_the_mask(network)]
    held = sum(bytes_by_claim({"weights": dense}).values())
    return held + max(looks)


def _looks(trainer: MaskedDistiller, block: int) -> list[int]:
    if not (trainer.config.mask.looks or trainer.config.mask_of_fake_score.looks):
        return []
    copy = without_data(trainer)
    weights = {name: unmasked_weights(getattr(copy, name), copy.mask) for name in ("generator", "fake_score")}
    ahead = _trained_ahead(trainer)
    found = []
    for work in copy.masks.passes(copy.fake_score):
        for name, own in weights.items():
            for weight in own:
                weight.requires_grad_(name == work.of)
        found.append(ahead + _gradient(copy, work.loss, weights[work.of], block))
    return found


def _looks_of_baseline(trainer: Baseline, block: int) -> list[int]:
    config = trainer.config
    if not config.mask.looks:
        return []
    copy = without_data(trainer, ("network", "true_score"))
    weights = unmasked_weights(copy.network, copy.mask)
    for weight in weights:
        weight.requires_grad_(True)
    count = config.mask.batch_size or config.forget_samples
    x0 = torch.zeros((count, *config.sample_shape), device=copy.device, dtype=copy.dtype)
    labels = torch.full((count,), config.forget[0], device=copy.device)
    return [_gradient(copy, lambda: copy.masks.noise_prediction(copy.network, (x0, labels)), weights, block)]


def _gradient(copy: Trainer, loss: Callable[[], Tensor], weights: list[nn.Parameter], block: int) -> int:
    """Of the gradient of ``loss``, and of the sums that it is added to."""

    def look() -> list[Tensor]:
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        torch.autograd.grad(loss(), weights, allow_unused=True)
        return sums

    return _above(copy, look, block)[0]


def _before_the_mask(network: nn.Module) -> list[Tensor]:
    found = survey(network)
    names = {*found.maskable, *found.refused}
    return [*(weight for name, weight in network.named_parameters() if name in names), *network.buffers()]


def _trained_ahead(trainer: MaskedDistiller) -> int:
    """The copy of the fake score that trains a little first, where the mask is to look at the generator's own loss."""
    config = trainer.config.mask
    if config.saliency == "noise_prediction" or not config.saliency_warmup:
        return 0
    weights = _before_the_mask(trainer.fake_score)
    masters = sum(4 * weight.numel() for weight in weights if weight.dtype != torch.float32)
    return masters + sum(weight.nbytes + 4 * 2 * weight.numel() for weight in weights)


# -- for people ------------------------------------------------------------------------------------


def describe(memory: MemoryEstimate, time: TimeEstimate | None = None) -> str:
    """The table for people."""
    unit, name = next((u, n) for u, n in _UNITS if memory.peak >= u or u == 1)
    rows = {part.replace("_", " "): size for part, size in memory.parts.items() if size}
    rows |= {"activations, temporaries": memory.activations, "step, at its height": memory.step}
    if memory.choosing_mask:
        rows["choosing the mask"] = memory.choosing_mask
    lines = [f"estimated memory on {memory.device}, {name}"]
    lines += [f"  {part:<28}{size / unit:>10.3g}" for part, size in rows.items()]
    if memory.attention != NO_ATTENTION:
        lines.append(f"  attention: {memory.attention}")
    if memory.device == "cuda":
        lines.append("  workspaces of cuDNN and cuBLAS come on top")
    return "\n".join([*lines, *([] if time is None else [time.describe()])])


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
