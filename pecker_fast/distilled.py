"""The folder of a dense distillation, which every request for erasure starts from: generator, fake score, record.

``model/`` is the averaged one-step generator, ``fake_score/`` the fake score that follows it, both model folders;
``distill_config.json`` has the settings, and ``distilled.json`` the steps and the fingerprints of the three networks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pecker_fast import models
from pecker_fast.checkpoint import StrPath, read_json, write_json
from pecker_fast.config import DistillConfig
from pecker_fast.delta.fingerprint import fingerprint_all
from pecker_fast.errors import FileFormatError
from pecker_fast.schedule import NoiseSchedule

RECORD, CONFIG = "distilled.json", "distill_config.json"
FORMAT, VERSION = "pecker_fast.distilled", 1


class Trained(Protocol):
    """What is asked of a ``MaskedDistiller``."""

    config: DistillConfig
    schedule: NoiseSchedule
    true_score: nn.Module
    fake_score: nn.Module

    @property
    def generation(self) -> dict[str, Any]:
        """How to sample from the generator."""
        ...

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The generator with its averaged weights."""
        ...


@dataclass(frozen=True)
class Distilled:
    """What a dense distillation left.

    Attributes:
        generator: One-step generator, in eval mode.
        fake_score: The fake score that follows it, in eval mode.
        config: What it was distilled with.
        record: ``distilled.json``.
    """

    generator: nn.Module
    fake_score: nn.Module
    config: DistillConfig
    record: Mapping[str, Any]


def wanted(config: DistillConfig, schedule: NoiseSchedule, true_score: nn.Module, steps: int) -> dict[str, Any]:
    """What tells one distillation from another, as JSON gives it back."""
    settings = {
        "max_train_steps": steps,
        "true_score": fingerprint_of(true_score),
        "config": config.to_dict(),
        "schedule": schedule.to_dict(),
    }
    return dict(json.loads(json.dumps(settings)))


def write(distiller: Trained, folder: Path, steps: int, seconds: float) -> None:
    """Write the files of a distillation into an existing folder.

    Raises:
        FileFormatError: They cannot be written.
    """
    generation = distiller.generation
    many_steps = {"kind": "ddim", "steps": min(20, distiller.schedule.num_train_timesteps)}
    many_steps |= {name: generation[name] for name in ("schedule", "sample_shape")}
    for name in ("model", "fake_score"):
        (folder / name).mkdir()
    with distiller.averaged() as generator:
        models.storage.write_model(generator, folder / "model", generation)
        marks = {"generator": fingerprint_of(generator), "fake_score": fingerprint_of(distiller.fake_score)}
    models.storage.write_model(distiller.fake_score, folder / "fake_score", many_steps)
    write_json(folder / CONFIG, distiller.config.to_dict())
    settings = wanted(distiller.config, distiller.schedule, distiller.true_score, steps)
    del settings["config"]
    write_json(folder / RECORD, {"format": FORMAT, "version": VERSION, **settings, **marks, "seconds": seconds})


def read_record(folder: Path) -> dict[str, Any]:
    """``distilled.json`` with "config" from beside it.

    Raises:
        FileFormatError: It is missing, damaged, or of another version.
    """
    if not (folder / RECORD).is_file():
        raise FileFormatError(f"{folder}: has no {RECORD}; expected a folder that pecker-fast distill wrote")
    record = read_json(folder / RECORD)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        got = f"{record.get('format')!r} version {record.get('version')!r}"
        raise FileFormatError(f"{folder / RECORD}: expected {FORMAT!r} version {VERSION}, got {got}")
    return record | {"config": read_json(folder / CONFIG)}


def check_same(record: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse a distillation that is not the one ``settings`` (``wanted``) ask for, naming the first difference.

    Raises:
        ValueError: It is another one.
    """
    saved, own = ({key: value for key, value in _flattened(part)} for part in (record, settings))
    for key, value in own.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{folder}: was distilled with {key} = {saved.get(key)!r}, asked for is {value!r}; choose another "
                f"folder"
            )


def load(folder: StrPath) -> Distilled:
    """Read what ``write`` wrote, and check it against its fingerprints; the networks are on the CPU.

    Raises:
        FileFormatError: A file is missing, damaged, or of another version.
    """
    folder = Path(folder)
    record = read_record(folder)
    try:
        config = DistillConfig.from_dict(record["config"])
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{folder / CONFIG}: damaged: {error}") from error
    networks = {"generator": models.load(folder / "model"), "fake_score": models.load(folder / "fake_score")}
    for name, network in networks.items():
        if record.get(name) != fingerprint_of(network):
            raise FileFormatError(
                f"{folder}: the weights of its {name.replace('_', ' ')} are not those that were distilled: fingerprint "
                f"{fingerprint_of(network)}, {RECORD} has {record.get(name)}; distil again"
            )
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Distilled(**networks, config=config, record=record)


def fingerprint_of(network: nn.Module) -> str:
    """Of all its tensors, whatever their memory layout."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    return f"{fingerprint_all(tensors, progress=False):016x}"


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
