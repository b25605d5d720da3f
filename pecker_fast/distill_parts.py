"""What a distiller consists of, as its checkpoints see it: what changes, what never does, and where chance stands."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pecker_fast.config import DistillConfig
from pecker_fast.delta.fingerprint import MODULUS, fingerprint_all, fingerprint_blocks, layout
from pecker_fast.distill_ranks import Ranks
from pecker_fast.draws import Draws
from pecker_fast.mask import BlockMask
from pecker_fast.ops.layout import is_channels_last
from pecker_fast.optim import MaskedAdamW
from pecker_fast.schedule import NoiseSchedule

NETWORKS = ("generator", "fake_score")
"""Those that train."""


class Distiller(Protocol):
    """What a checkpoint asks of a ``MaskedDistiller``."""

    config: DistillConfig
    schedule: NoiseSchedule
    true_score: nn.Module
    generator: nn.Module
    fake_score: nn.Module
    generator_optimizer: MaskedAdamW
    fake_score_optimizer: MaskedAdamW
    draws: Draws
    device: torch.device
    ranks: Ranks
    mask: BlockMask | None
    steps_done: int

    def use_mask(self, mask: BlockMask, fake_score_mask: BlockMask | None = None) -> BlockMask:
        """Get ready to train with ``mask``."""
        ...


def network_of(distiller: Distiller, name: str) -> nn.Module:
    """One of ``NETWORKS``."""
    return distiller.generator if name == "generator" else distiller.fake_score


def optimizer_of(distiller: Distiller, name: str) -> MaskedAdamW:
    """Its optimizer, which knows its store."""
    return distiller.generator_optimizer if name == "generator" else distiller.fake_score_optimizer


def settings_of(distiller: Distiller) -> dict[str, Any]:
    """Config and schedule, as JSON gives them back."""
    settings = {"config": distiller.config.to_dict(), "schedule": distiller.schedule.to_dict()}
    return dict(json.loads(json.dumps(settings)))


def layout_of(network: nn.Module) -> dict[str, str]:
    """Name -> dtype, shape and memory order of every dense weight: what the order of a flat buffer depends on."""
    return {
        name: layout(weight) + (" channels-last" if is_channels_last(weight) else "")
        for name, weight in _weights(network).items()
    }


# -- what never changes ----------------------------------------------------------------------------

_bases: weakref.WeakKeyDictionary[Distiller, dict[str, str]] = weakref.WeakKeyDictionary()


def own_base(distiller: Distiller) -> dict[str, str]:
    """``base_of`` a distiller with its mask, computed once for it."""
    if distiller not in _bases:
        _bases[distiller] = base_of(distiller, {name: optimizer_of(distiller, name).active.mask for name in NETWORKS})
    return _bases[distiller]


def base_of(distiller: Distiller, masks: Mapping[str, BlockMask]) -> dict[str, str]:
    """Fingerprints of what is not saved: the true score, and the weights of the others outside their masks."""
    true_score = fingerprint_all(_tensors(distiller.true_score), progress=False)
    rest = {name: _outside(network_of(distiller, name), mask) for name, mask in masks.items()}
    return {name: f"{value:016x}" for name, value in {"true_score": true_score, **rest}.items()}


def _outside(network: nn.Module, mask: BlockMask) -> int:
    """Of the weights outside a mask; where all of it trains, what cannot be masked does so too, and nothing is left."""
    if all(parameter.is_full for parameter in mask.parameters.values()):
        return 0
    weights = _weights(network)
    active = {name: parameter for name, parameter in mask.parameters.items() if parameter.numel}
    return (fingerprint_all(weights, progress=False) - fingerprint_blocks(weights, active)) % MODULUS


def agreed_parts(distiller: Distiller, mask: BlockMask | None = None) -> dict[str, bytes]:
    """What all ranks must have the same before they train together, in order; without a mask, before one is made."""
    parts = {
        "config or schedule": json.dumps(settings_of(distiller)).encode(),
        "true score": _fingerprint(distiller.true_score),
        "generator": _fingerprint(distiller.generator),
        "fake score": _fingerprint(distiller.fake_score),
    }
    if mask is not None:
        tensors, header = mask.to_tensors()
        bits = b"".join(bits.numpy().tobytes() for bits in tensors.values())
        parts["mask"] = f"{header['grids']} {header['mass']}".encode() + bits
    return parts


def _fingerprint(network: nn.Module) -> bytes:
    memory = json.dumps(layout_of(network))
    return f"{fingerprint_all(_tensors(network), progress=False)} {memory}".encode()


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Dense weights; buffers may change, and are saved."""
    buffers = dict(network.named_buffers())
    return {name: weight for name, weight in _tensors(network).items() if name not in buffers}


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}


# -- chance ----------------------------------------------------------------------------------------


def random_states(distiller: Distiller) -> dict[str, Tensor]:
    """Where this rank's draws stand, and torch's own generators, from which dropout draws: uint8 (n,) each."""
    states = {"random.draws": distiller.draws.rng.get_state(), "random.cpu": torch.get_rng_state()}
    if distiller.device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(distiller.device)
    return states


def restore_random_states(distiller: Distiller, states: dict[str, Tensor]) -> None:
    """Go on drawing where ``random_states`` was taken."""
    distiller.draws.rng.set_state(states["random.draws"])
    torch.set_rng_state(states["random.cpu"])
    if distiller.device.type == "cuda":
        torch.cuda.set_rng_state(states["random.cuda"], distiller.device)


# -- what was measured -----------------------------------------------------------------------------


def measured_ways(distiller: Distiller) -> dict[str, str]:
    """How this rank computes weight gradients on a GPU: measured anew, it could do so otherwise, with other bits."""
    generator, fake_score = (optimizer_of(distiller, name).active.measured_ways() for name in NETWORKS)
    return {**generator, **fake_score}
