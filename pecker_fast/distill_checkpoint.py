"""Checkpoints of a distiller: all that its next step depends on, as safetensors and JSON, complete or not at all.

``checkpoint-{step}/`` holds ``state.safetensors`` (of both networks the active weights, buffers, optimizer state and
running average; random states), a mask of each network, ``state.json`` (step, settings, fingerprints of what is not
saved, and how each rank's GPU computes weight gradients, which is measured) and ``manifest.json`` (size and SHA-256 of
each file). Weights outside the masks are those of the true score, or of the generator that was given, and are not
saved again: their fingerprint is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import checkpoint_folders
from pecker_fast.checkpoint import (
    StrPath,
    atomic_folder,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from pecker_fast.delta.fingerprint import layout
from pecker_fast.distill_parts import (
    NETWORKS,
    Distiller,
    base_of,
    layout_of,
    measured_ways,
    network_of,
    optimizer_of,
    own_base,
    random_states,
    restore_random_states,
    settings_of,
)
from pecker_fast.errors import FileFormatError
from pecker_fast.manifest import NAME as MANIFEST
from pecker_fast.manifest import check_manifest, write_manifest
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import survey
from pecker_fast.ops.weight_grad_ways import check_choices, restore_choices
from pecker_fast.optim import MaskedAdamW

KIND, VERSION = "pecker_fast.distill_checkpoint", 1
_TENSORS, _RECORD, _MASK = "state.safetensors", "state.json", "{}_mask.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was loaded.

    Attributes:
        folder: Where it lies.
        step: Steps done when it was saved.
        extra: What the caller saved along with it.
    """

    folder: Path
    step: int
    extra: Mapping[str, Any]


# -- save ------------------------------------------------------------------------------------------


def save(distiller: Distiller, root: StrPath, *, total_limit: int | None, extra: Mapping[str, Any] | None) -> Path:
    """Write ``root/checkpoint-{step}``; see ``MaskedDistiller.save_checkpoint``."""
    if distiller.mask is None:
        raise RuntimeError("nothing to save: call build_mask() or step() first")
    if total_limit is not None and total_limit < 1:
        raise ValueError(f"total_limit: expected a positive number of checkpoints to keep, got {total_limit}")
    tensors = {name: distiller.ranks.gather(state) for name, state in random_states(distiller).items()}
    ways = [json.loads(own) for own in distiller.ranks.gather_texts(json.dumps(measured_ways(distiller)))]
    folder = checkpoint_folders.folder_of(root, distiller.steps_done)
    with distiller.ranks.first_writes() as mine:
        if mine:
            _write(distiller, folder, tensors, {"ways": ways, "extra": dict(extra or {})})
            if total_limit is not None:
                checkpoint_folders.remove_oldest(root, KIND, folder, total_limit)
    return folder


def _write(distiller: Distiller, folder: Path, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    record: dict[str, Any] = {"step": distiller.steps_done, **settings_of(distiller), "base": own_base(distiller)}
    for name in NETWORKS:
        flat, numbers = _state(network_of(distiller, name), optimizer_of(distiller, name))
        record[name] = {"optimizer": numbers, "weights": layout_of(network_of(distiller, name))}
        tensors |= {f"{name}.{key}": tensor for key, tensor in flat.items()}
    checkpoint_folders.check_replaced(folder, KIND)
    with atomic_folder(folder) as unfinished:
        write_safetensors(unfinished / _TENSORS, tensors)
        for name in NETWORKS:
            optimizer_of(distiller, name).active.mask.save(unfinished / _MASK.format(name))
        write_json(unfinished / _RECORD, record | more)
        write_manifest(unfinished, KIND, VERSION)


def _state(network: nn.Module, optimizer: MaskedAdamW) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of one network all tensors that change, and the numbers of its optimizer."""
    active = optimizer.active
    active.sync_()
    state = optimizer.state_dict()["state"].get(0, {})
    flat = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {"values": active.values} | {f"optimizer.{name}": tensor for name, tensor in flat.items()}
    tensors |= {f"buffers.{name}": buffer for name, buffer in network.named_buffers()}
    return tensors, {name: value for name, value in state.items() if name not in flat}


# -- load ------------------------------------------------------------------------------------------


def load(distiller: Distiller, checkpoint: StrPath, root: StrPath | None) -> Checkpoint:
    """Read a checkpoint, check all of it, and only then change anything; see ``MaskedDistiller.load_checkpoint``."""
    folder = checkpoint_folders.resolve(checkpoint, root, KIND)
    check_manifest(folder, KIND, VERSION)
    record, (tensors, _) = read_json(folder / _RECORD), read_safetensors(folder / _TENSORS)
    masks = {name: BlockMask.load(folder / _MASK.format(name)) for name in NETWORKS}
    parts = {name: _part(tensors, name) for name in NETWORKS}
    try:
        _check_settings(distiller, record, folder)
        _check_base(distiller, record, masks, folder)
        for name in NETWORKS:
            _check_layout(network_of(distiller, name), record[name]["weights"], f"{folder}: {name}")
            _check_tensors(distiller, name, parts[name], masks[name], f"{folder}: {name}")
        states = _random_states(distiller, tensors, folder)
        numbers = {name: dict(record[name]["optimizer"]) for name in NETWORKS}
        step, extra = int(record["step"]), dict(record["extra"])
        ways = record["ways"][distiller.ranks.rank] if "ways" in record else {}  # none in older ones
        check_choices(ways, f"{folder}: ways")
    except (KeyError, IndexError, TypeError) as error:
        raise FileFormatError(f"{folder}: incomplete: {error!r}; use another checkpoint") from error
    distiller.ranks.check_same({"checkpoint": (folder / MANIFEST).read_bytes()})
    if distiller.mask is None:
        distiller.use_mask(masks["generator"], masks["fake_score"])
    for name in NETWORKS:
        _restore(network_of(distiller, name), optimizer_of(distiller, name), numbers[name], parts[name])
    restore_random_states(distiller, states)
    restore_choices(ways)
    distiller.steps_done = step
    return Checkpoint(folder, step, extra)


def _check_settings(distiller: Distiller, record: Mapping[str, Any], folder: Path) -> None:
    for name, settings in settings_of(distiller).items():
        saved, own = dict(_flattened(record[name])), dict(_flattened(settings))
        for key in dict.fromkeys((*own, *saved)):
            if key not in saved or key not in own or saved[key] != own[key]:
                raise ValueError(
                    f"{folder}: was saved with {name}.{key} = {_shown(saved, key)}, this distiller has "
                    f"{_shown(own, key)}; resume with the settings it was saved with"
                )


def _check_base(distiller: Distiller, record: Mapping[str, Any], masks: Mapping[str, BlockMask], folder: Path) -> None:
    for name, mask in masks.items() if distiller.mask is not None else ():
        if optimizer_of(distiller, name).active.mask != mask:
            raise ValueError(f"{folder}: was saved with another mask than the one in use; load it into a new distiller")
    for name, own in base_of(distiller, masks).items():
        saved = record["base"][name]
        if saved != own:
            raise ValueError(
                f"{folder}: was saved with another {name.replace('_', ' ')}: its weights have fingerprint {saved}, "
                f"here {own}; make the distiller from the model it was saved with"
            )


def _check_layout(network: nn.Module, saved: Mapping[str, str], where: str) -> None:
    own = layout_of(network)
    for name in dict.fromkeys((*own, *saved)):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"{where}: {name} was {saved.get(name, 'missing')}, here it is {own.get(name, 'missing')}; convert the "
                f"true score as it was then, before the distiller is made"
            )


def _check_tensors(distiller: Distiller, name: str, tensors: Mapping[str, Tensor], mask: BlockMask, where: str) -> None:
    network, true_score = network_of(distiller, name), distiller.true_score
    whole = name == "fake_score" and all(parameter.is_full for parameter in mask.parameters.values())
    dense = survey(true_score).refused if whole else {}  # cannot be masked, and trains all the same
    numel = mask.numel + sum(true_score.get_parameter(weight).numel() for weight in dense)
    expected = {f"buffers.{key}": layout(buffer) for key, buffer in network.named_buffers()}
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in network.parameters()) else torch.float32
    flat = layout(torch.empty((numel,), dtype=dtype, device="meta"))
    expected |= {key: flat for key in ("values", *tensors) if not key.startswith("buffers.") and key != _STEP}
    for key, what in expected.items():
        if layout(tensors[key]) != what:
            raise FileFormatError(f"{where}: {key} is {layout(tensors[key])}, expected {what}; use another checkpoint")


_STEP = "optimizer.step"  # a tensor () where the optimizer is capturable


def _random_states(distiller: Distiller, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """This rank's."""
    saved = {name: states for name, states in tensors.items() if name.startswith("random.")}
    ranks, found = distiller.ranks, {name: layout(states) for name, states in saved.items()}
    own = {name: f"uint8 {(ranks.world_size, len(state))}" for name, state in random_states(distiller).items()}
    if own != found:
        raise ValueError(
            f"{folder}: has the random states {found}, but {ranks.world_size} processes on device "
            f"{distiller.device.type} take {own}; resume with as many processes as it was saved with, on the same "
            f"kind of device"
        )
    return {name: states[ranks.rank].clone() for name, states in saved.items()}


@torch.no_grad()
def _restore(
    network: nn.Module, optimizer: MaskedAdamW, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    active = optimizer.active
    active.bind_()
    active.values.copy_(tensors["values"])
    active.scatter_()
    for name, buffer in network.named_buffers():
        buffer.copy_(tensors[f"buffers.{name}"])
    state = {**numbers, **_part(tensors, "optimizer")}
    active.ema = None  # before the first step there is none
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state} if state else {}})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]!r:.80}" if key in values else "nothing"
