"""Probing: does a model still draw a forgotten class where nobody trained it not to?

Nothing is trained: the same network is asked in other ways than the published one. A one-step generator is unlearned at
one noise level, from noise of one size, in its averaged weights; the class may be left at another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.attacks.recognition import (
    Judge,
    check_generation,
    check_judge,
    check_model,
    fixed_noise,
    recognised_share,
)
from pecker_fast.metrics import wilson_interval

Weights = Mapping[str, Tensor] | nn.Module
"""A state dict, or a network in eval mode."""


def probe(
    model: nn.Module,
    generation: Mapping[str, Any],
    forget: Sequence[int],
    *,
    judge: Judge,
    t_inits: Sequence[int] = (),
    noise_scales: Sequence[float] = (),
    weights: Mapping[str, Weights] | None = None,
    null_class: int | None = None,
    samples: int = 100,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Share of samples in which the judge sees a forgotten class, for each way of asking.

    Args:
        model: ``(x_t, t, label) -> epsilon``, in eval mode.
        generation: How to sample from it, as in `pecker_fast.models.storage`.
        forget: The forgotten classes; each is asked for ``samples`` times, and seeing any of them counts.
        judge: Images -> logits, in eval mode, on the model's device.
        t_inits: Timesteps to start a ``one_step`` generator at instead of its own.
        noise_scales: Factors on the noise that sampling starts from.
        weights: Other weights by name, e.g. ``{"not averaged": generator.state_dict()}``.
        null_class: Label of "no class" of a model that was trained with it (``num_classes`` of a `DDPMUNet`, with class
            dropout). If it has forgotten nothing, it draws each of K equally frequent classes in 1 / K of the samples.
        samples: Images of each forgotten class, the same noise for every way of asking.
        seed: Of the noise.

    Returns:
        One plain dict a way, the published one first: "probe" ("published", "t_init", "noise_scale", "weights",
        "null_class"), "value" (which, None for the published way), "recognised" (the share), "interval" (its Wilson
        95 % interval) and "samples" (how many images).

    Raises:
        ValueError: An argument is out of range, or a network is in training mode or masked.
        NonFiniteError: The judge's logits became NaN or infinite.
        RuntimeError: A state dict does not fit the model.
    """
    check_judge(judge)
    if len(forget) == 0 or samples < 1:
        raise ValueError(f"expected classes to forget and at least one sample, got {forget} and {samples}")
    if t_inits and generation.get("kind") != "one_step":
        raise ValueError(f"t_inits are of one_step generators; this generation is of kind {generation.get('kind')!r}")
    for how in (generation, *({**generation, "t_init": t} for t in t_inits)):
        check_generation(how)
    labels = torch.tensor(list(forget), device="cpu").repeat_interleave(samples)
    noise = fixed_noise(len(labels), generation, seed)
    networks = {name: _network(model, other) for name, other in (weights or {}).items()}
    _check_network("model", model)

    def row(name: str, value: Any, network: nn.Module, how: Mapping[str, Any], asked: Tensor, start: Tensor) -> Any:
        share = recognised_share(network, how, asked, start, judge=judge, forget=forget)
        interval = list(wilson_interval(round(share * len(asked)), len(asked)))
        return {"probe": name, "value": value, "recognised": share, "interval": interval, "samples": len(asked)}

    def rows() -> Iterator[dict[str, Any]]:
        yield row("published", None, model, generation, labels, noise)
        for t in t_inits:
            yield row("t_init", t, model, {**generation, "t_init": t}, labels, noise)
        for scale in noise_scales:
            yield row("noise_scale", scale, model, generation, labels, noise * scale)
        for name, network in networks.items():
            yield row("weights", name, network, generation, labels, noise)
        if null_class is not None:
            yield row("null_class", null_class, model, generation, torch.full_like(labels, null_class), noise)

    return list(rows())


def _network(model: nn.Module, weights: Weights) -> nn.Module:
    """The network that ``weights`` stand for; the model itself is not touched."""
    if isinstance(weights, nn.Module):
        _check_network("weights", weights)
        return weights
    check_model(model)
    network = copy.deepcopy(model)
    network.load_state_dict(weights)
    return network.eval()


def _check_network(name: str, network: nn.Module) -> None:
    if network.training:
        raise ValueError(f"{name}: {type(network).__name__} is in training mode; call eval() first")
