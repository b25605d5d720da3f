"""What one iteration of a distiller computes, counted without computing it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from pecker_fast import step_hooks
from pecker_fast.config import DistillConfig
from pecker_fast.distill_masks import MaskMaker
from pecker_fast.draws import Draws
from pecker_fast.flop_table import KINDS, count_by_network
from pecker_fast.layers import MaskedLayer, unmask_layer
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE
from pecker_fast.schedule import NoiseSchedule

NETWORKS = ("generator", "true_score", "fake_score")

IterationFlops: TypeAlias = dict[str, Any]
"""What ``iteration_flops`` returns: plain JSON values."""


class Distiller(Protocol):
    """What is asked of a ``MaskedDistiller``."""

    config: DistillConfig
    schedule: NoiseSchedule
    draws: Draws
    mask: BlockMask | None
    generator: nn.Module
    true_score: nn.Module
    fake_score: nn.Module
    masks: MaskMaker

    def step(self) -> dict[str, Tensor]:
        """One iteration."""
        ...


def iteration_flops(distiller: Distiller, steps: int | None = None) -> IterationFlops:
    """FLOPs of ``distiller.step()``; see ``MaskedDistiller.flops``.

    The very step is run, on a copy whose weights are fake tensors: shapes, strides and a device, but no data.
    """
    check_countable(distiller.mask, steps)
    rehearsal = without_data(distiller)
    with count_by_network({name: getattr(rehearsal, name) for name in NETWORKS}) as table:
        rehearsal.step()
    mask = _mask_flops(rehearsal)
    counted: IterationFlops = {**table.counts, "total": table.total, "mask": mask}
    if steps is not None:
        mask |= {"steps": steps, "per_step": round(mask["total"] / steps)}
        counted["total_with_mask"] = table.total + mask["per_step"]
    return counted


def check_countable(mask: BlockMask | None, steps: int | None) -> None:
    """Refuse to count before there is a mask, or by a number of steps that is none."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"flops: steps: expected a positive integer or None, got {steps!r}")
    if mask is None:
        raise RuntimeError("no mask yet, and the count depends on it: call build_mask() first")


def _mask_flops(rehearsal: Distiller) -> dict[str, int]:
    """One of the mask's passes of each sort, times their number; a mask that looks at nothing is free."""
    counts = dict.fromkeys(KINDS, 0)
    weights = {name: unmasked_weights(getattr(rehearsal, name), rehearsal.mask) for name in ("generator", "fake_score")}
    for work in rehearsal.masks.passes(rehearsal.fake_score):
        for name, own in weights.items():
            for weight in own:
                weight.requires_grad_(name == work.of)
        with count_by_network({name: getattr(rehearsal, name) for name in NETWORKS}) as table:
            torch.autograd.grad(work.loss(), weights[work.of], allow_unused=True)
        for kind in KINDS:
            counts[kind] += work.count * sum(table.counts[network][kind] for network in NETWORKS)
    return {**counts, "total": sum(counts.values())}


def unmasked_weights(network: nn.Module, mask: BlockMask | None) -> list[nn.Parameter]:
    """Make a copy what it was before the mask, in eval mode; its weights that can be masked."""
    del vars(network)[STORE]
    for module in network.eval().modules():
        if isinstance(module, MaskedLayer):
            unmask_layer(module)
    maskable = () if mask is None else mask.parameters
    return [weight for name, weight in network.named_parameters() if name in maskable]


class Drawing(Protocol):
    """What has draws of its own."""

    draws: Draws
    schedule: NoiseSchedule


T = TypeVar("T", bound=Drawing)


def without_data(trainer: T, networks: Sequence[str] = NETWORKS) -> T:
    """A copy with fake weights, draws of its own, and optimizers that do nothing: they have no matrix products."""
    draws = copy.copy(trainer.draws)
    draws.rng = torch.Generator(trainer.draws.device)
    real = {id(trainer.draws): draws, id(trainer.draws.rng): draws.rng, id(trainer.schedule): trainer.schedule}
    with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
        copied = copy.deepcopy(trainer, real)
    for value in vars(copied).values():
        if isinstance(value, torch.optim.Optimizer):
            vars(value)["step"] = _no_step
    for name in networks:
        if (store := vars(getattr(copied, name)).get(STORE)) is not None:
            step_hooks.forget(store)
    return copied


def _no_step(closure: Any = None) -> None:
    """An optimizer's step on weights that have no data."""


def describe(flops: IterationFlops) -> str:
    """The table for people."""
    unit, name = next((u, n) for u, n in _UNITS if flops["total"] >= u or u == 1)
    header = "".join(f"{title:>18}" for title in (*(kind.replace("_", " ") for kind in KINDS), "total"))
    lines = [f"one iteration, {name}", f"{'':<12}{header}"]
    rows = {network: [flops[network][kind] for kind in KINDS] for network in NETWORKS}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for row, numbers in rows.items():
        total = flops["total"] if row == "all" else sum(numbers)
        lines.append(f"{row:<12}" + "".join(f"{number / unit:>18.4g}" for number in (*numbers, total)))
    return "\n".join([*lines, _mask_line(flops, unit, name)])


def _mask_line(flops: IterationFlops, unit: int, name: str) -> str:
    mask = flops["mask"]
    if not mask["total"]:
        return "choosing the mask computes nothing"
    line = f"choosing the mask once: {mask['total'] / unit:.4g} {name}, {mask['total'] / flops['total']:.3g} iterations"
    if "steps" in mask:
        share = mask["per_step"] / flops["total"]
        line += f"; over {mask['steps']} steps {flops['total_with_mask'] / unit:.4g} {name} each ({share:+.2%})"
    return line


_UNITS = ((10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP"), (1, "FLOP"))
