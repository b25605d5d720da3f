"""What a trainer holds between two steps, part by part."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.baselines import Baseline
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.memory_meter import bytes_by_claim, tensors_of
from pecker_fast.optim import MaskedAdamW

Trainer: TypeAlias = MaskedDistiller | Baseline

TRAINED = ("active_weights", "gradients", "running_average", "optimizer_state")
"""Parts that go with the active weights."""


def networks_of(trainer: Trainer) -> dict[str, nn.Module]:
    """The networks that a step runs, by name."""
    names = ("true_score", "fake_score", "generator") if isinstance(trainer, MaskedDistiller) else TWO
    return {name: getattr(trainer, name) for name in names}


TWO = ("true_score", "network")


def optimizers_of(trainer: Trainer) -> list[MaskedAdamW]:
    """Those of the networks that train."""
    return [value for value in vars(trainer).values() if isinstance(value, MaskedAdamW)]


def held_parts(trainer: Trainer) -> dict[str, int]:
    """Bytes on the trainer's device after its first step, by part.

    Memory that several tensors share counts once. Weights that train in place (float32, every block active) are
    "active_weights" and not a network's. What the first step makes is counted whether there was one or not.
    """
    stores = [optimizer.active for optimizer in optimizers_of(trainer)]
    for store in stores:
        store.scatter_table()  # the first step would make it
    claims: dict[str, Iterable[Tensor]] = {
        "active_weights": [store.values for store in stores],
        "gradients": [store.grads for store in stores],
        "running_average": [store.ema for store in stores if store.ema is not None],
        "optimizer_state": [tensor for optimizer in optimizers_of(trainer) for tensor in _state(optimizer)],
        "prompt_embeddings": tensors_of(trainer.losses.model),
    }
    weights = {f"weights_of_{name}": _dense(network) for name, network in networks_of(trainer).items()}
    everything = {"everything_else": tensors_of(trainer)}
    claims = {
        who: [tensor for tensor in tensors if tensor.device == trainer.device]
        for who, tensors in (claims | weights | everything).items()
    }
    parts = dict.fromkeys(("weights_shared", *weights, *TRAINED, "prompt_embeddings", "everything_else"), 0)
    for claimants, size in bytes_by_claim(claims).items():
        parts[_owner(claimants, list(claims), weights)] += size
    for part, size in _made_by_the_first_step(trainer).items():
        parts[part] += size
    return parts


def _owner(claimants: frozenset[str], order: list[str], weights: Iterable[str]) -> str:
    first = next(who for who in order if who in claimants)
    return "weights_shared" if first in weights and len(claimants & set(weights)) > 1 else first


def _dense(network: nn.Module) -> Iterator[Tensor]:
    """Weights and buffers; of a masked network also the active parameters, which another part claims first."""
    yield from network.parameters()
    yield from network.buffers()


def _state(optimizer: MaskedAdamW) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _made_by_the_first_step(trainer: Trainer) -> dict[str, int]:
    parts = {"optimizer_state": 0, "running_average": 0}
    for optimizer in optimizers_of(trainer):
        if any(True for _ in _state(optimizer)):
            continue
        group, values = optimizer.param_groups[0], optimizer.active.values
        numel = len(values) if optimizer.shard is None else optimizer.shard.part_numel
        moments = 1 + bool(group["betas"][0]) + (group["saliency"] is not None)
        parts["optimizer_state"] += moments * numel * values.itemsize
        parts["running_average"] += (group["ema_decay"] is not None) * numel * values.itemsize
    return parts


def keep_gradients_bound(copy: Trainer) -> None:
    """Of a copy without data: gradients are views of the flat buffers, now and after each of the optimizers' steps.

    In between they are not: ``zero_grad`` drops the views, and autograd makes tensors of its own.
    """
    for optimizer in optimizers_of(copy):
        bind = functools.partial(_bind_gradients, optimizer.active)
        bind()
        vars(optimizer)["step"] = bind


def _bind_gradients(store: ActiveParameters) -> None:
    parameters = dict(store.named_parameters())
    with torch.no_grad():
        for entry in store.entries:
            parameters[entry.name].grad = entry.shaped(entry.stretch(store.grads))
