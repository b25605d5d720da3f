"""What a step of a baseline computes, counted without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pecker_fast.baselines.data import Images
from pecker_fast.baselines.fisher import part_of_sample, timesteps_of
from pecker_fast.baselines.work import Memory, Work

if TYPE_CHECKING:
    from pecker_fast.baselines.trainer import Baseline

NETWORKS = ("network", "true_score")


def flops(baseline: Baseline, steps: int | None = None) -> dict[str, Any]:
    """See ``Baseline.flops``."""
    from pecker_fast.iteration_flops import check_countable  # torch's counter imports triton if it is there

    check_countable(baseline.mask, steps)
    counted = _step(baseline, 0)
    if baseline.config.method == "esd":
        further, share = _step(baseline, 1), (baseline.config.sampling_steps - 1) / 2
        counted = {
            name: {kind: round(own + share * (further[name][kind] - own)) for kind, own in kinds.items()}
            for name, kinds in counted.items()
        }
    total = sum(sum(kinds.values()) for kinds in counted.values())
    once = {"mask": {"total": _mask(baseline)}, "setup": {"total": _setup(baseline)}}
    result: dict[str, Any] = {**counted, "total": total, **once}
    if steps is not None:
        shared = sum(part["total"] for part in once.values())
        result |= {"steps": steps, "total_with_mask": total + round(shared / steps)}
    return result


def _step(baseline: Baseline, stop: int) -> dict[str, dict[str, int]]:
    """Of one step, by network and kind, where "esd" samples for ``stop`` evaluations."""
    from pecker_fast.flop_table import count_by_network

    rehearsal = ready_to_step(baseline, stop)
    with count_by_network({name: getattr(rehearsal, name) for name in NETWORKS}) as table:
        rehearsal.step()
    return {name: dict(table.counts[name]) for name in NETWORKS}


def ready_to_step(baseline: Baseline, stop: int) -> Baseline:
    """A copy whose weights have no data, where "esd" samples for ``stop`` evaluations."""
    rehearsal = _rehearsal(baseline)
    rehearsal.work.stop = stop
    if rehearsal.config.method == "selective_amnesia":
        rehearsal.work.memory = _nothing_learnt(rehearsal)
        rehearsal.work.images["retain"] = _blank(rehearsal.work, rehearsal.config.retained[0])
    return rehearsal


def _mask(baseline: Baseline) -> int:
    """All batches of the saliency pass, and drawing their images where there are none."""
    from pecker_fast.iteration_flops import unmasked_weights

    config = baseline.config
    if config.mask.kind != "saliency":
        return 0
    rehearsal = _rehearsal(baseline)
    weights = unmasked_weights(rehearsal.network, rehearsal.mask)
    for weight in weights:
        weight.requires_grad_(True)
    batch = _blank(rehearsal.work, config.forget[0]).draw(1)

    def look() -> None:
        loss = rehearsal.masks.noise_prediction(rehearsal.network, batch)
        torch.autograd.grad(loss, weights, allow_unused=True)

    samples = config.mask.batches * (config.mask.batch_size or config.forget_samples)
    drawn = 0 if "forget" in baseline.work.images else config.sampling_steps * _forward(baseline)
    return samples * (_count(look) + drawn)


def _setup(baseline: Baseline) -> int:
    """What ``prepare`` computes: images to rehearse, and the Fisher information of further ones."""
    config = baseline.config
    if config.method != "selective_amnesia":
        return 0
    rehearsal = _rehearsal(baseline)
    x0, label = _blank(rehearsal.work, config.forget[0]).draw(1)
    parameters, t = rehearsal.active.parameters(), timesteps_of(rehearsal.work)

    def look() -> None:
        loss = part_of_sample(rehearsal.work, x0[0], label[0], t[:1], rehearsal.draws.rng)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    replayed, looked_at = len(config.retained) * config.replay_samples, config.num_classes * config.fisher_samples
    drawn = (replayed + looked_at) * config.sampling_steps * _forward(baseline)
    return drawn + looked_at * len(t) * _count(look)


def _forward(baseline: Baseline) -> int:
    """One forward of the frozen network, of one sample."""
    rehearsal = _rehearsal(baseline)
    x0, label = _blank(rehearsal.work, 0).draw(1)
    t = torch.zeros(1, dtype=torch.int64, device=x0.device)
    return _count(lambda: rehearsal.work.fixed(rehearsal.true_score, x0, t, label))


def _count(run: Callable[[], object]) -> int:
    from pecker_fast.flops import count_flops

    with count_flops() as count:
        run()
    return count.total


def _rehearsal(baseline: Baseline) -> Baseline:
    from pecker_fast.iteration_flops import without_data

    return without_data(baseline, NETWORKS)


def _nothing_learnt(rehearsal: Baseline) -> Memory:
    parameters = rehearsal.active.parameters()
    zeros: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
    return Memory(parameters, zeros, zeros)


def _blank(work: Work, label: int) -> Images:
    """One image with nothing on it."""
    draws = work.draws
    image = torch.zeros((1, *work.config.sample_shape), dtype=draws.dtype, device=draws.device)
    return Images(image, torch.full((1,), label, device=draws.device), draws.rng)
