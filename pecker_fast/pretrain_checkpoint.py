"""Checkpoints of `train_denoiser`: all that its next step depends on, as safetensors and JSON, complete or not at all.

``checkpoint-{step}/`` holds ``state.safetensors`` (weights, their average, Adam's state, random states), ``state.json``
(step, settings, learning rates) and ``manifest.json`` (size and SHA-256 of each file).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pecker_fast import checkpoint_folders
from pecker_fast.checkpoint import StrPath, atomic_folder, read_json, read_safetensors, write_json, write_safetensors
from pecker_fast.data.images import ImageData
from pecker_fast.errors import FileFormatError, OutOfTimeError
from pecker_fast.manifest import check_manifest, write_manifest

KIND, VERSION = "pecker_fast.pretrain_checkpoint", 1
_TENSORS, _RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True, eq=False)
class State:
    """A training between two steps.

    Attributes:
        model: What trains.
        average: Of its weights, an ``AveragedModel``.
        optimizer: Adam.
        rates: Its learning-rate schedules.
        draw: Generator of batches and noise.
        settings: What a checkpoint must agree on, JSON values.
        steps: Of the whole training.
    """

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    rates: tuple[LRScheduler, ...]
    draw: torch.Generator
    settings: Mapping[str, Any]
    steps: int


@dataclass
class Checkpoints:
    """When a training is saved, where it continues, and when it ends early.

    Attributes:
        root: The folder that gets ``checkpoint-{step}``.
        every: Steps between two of them; None writes one only when the training ends early.
        total_limit: The oldest are removed beyond so many; None keeps all.
        resume_from: A checkpoint's folder, or "latest" of ``root``; None starts anew.
        max_seconds: After so many, a checkpoint is written and `OutOfTimeError` raised.
        interrupted: Asked after every step; if it says so, a checkpoint is written and ``KeyboardInterrupt`` raised.
        extra: JSON values to save along; replaced by those of the checkpoint that is resumed.
        seconds: That the whole training took so far.
    """

    root: StrPath
    every: int | None = None
    total_limit: int | None = None
    resume_from: StrPath | None = None
    max_seconds: float | None = None
    interrupted: Callable[[], bool] = lambda: False
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("every", "total_limit", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Checkpoints.{name}: expected a positive number or None, got {value!r}")

    def begin(self, state: State) -> int:
        """Get ready, and resume if that is asked for; the steps that are done, 0 if it is not.

        Raises:
            FileFormatError: The checkpoint is missing, unfinished or damaged, or ``root`` has some of another training.
            ValueError: The checkpoint was saved with other settings.
        """
        self._started, self._earlier = time.monotonic(), self.seconds
        if self.resume_from is None:
            if older := checkpoint_folders.finished(self.root, KIND):
                raise FileFormatError(
                    f"{self.root}: has checkpoints of an earlier training, the last of step {max(older)}; resume from "
                    f'"latest", or choose another folder'
                )
            return 0
        latest = self.resume_from == checkpoint_folders.LATEST
        record = load(state, checkpoint_folders.resolve(self.resume_from, self.root if latest else None, KIND))
        self.extra, self._earlier = record["extra"], record["seconds"]
        return int(record["step"])

    def after(self, step: int, state: State) -> None:
        """Write what is due after a step, and end the training if its time is up.

        Raises:
            KeyboardInterrupt: It was interrupted.
            OutOfTimeError: Its time is up, and steps are left.
        """
        passed = time.monotonic() - self._started
        self.seconds = self._earlier + passed
        leave = self.interrupted()
        late = self.max_seconds is not None and passed >= self.max_seconds and step < state.steps
        if not (leave or late or (self.every is not None and step % self.every == 0)):
            return
        folder = checkpoint_folders.folder_of(self.root, step)
        save(state, folder, step, self.seconds, self.extra)
        if self.total_limit is not None:
            checkpoint_folders.remove_oldest(self.root, KIND, folder, self.total_limit)
        left = f"{step} of {state.steps} steps done, {state.steps - step} left; {folder} is complete, resume from it"
        if leave:
            raise KeyboardInterrupt(left)
        if late:
            raise OutOfTimeError(f"time is up: {left}", step, state.average.eval().module)


def described(data: ImageData, device: torch.device) -> dict[str, Any]:
    """What is trained on, as settings: the SHA-256 of images and labels, and the kind of device."""
    digest = hashlib.sha256(str(tuple(data.images.shape)).encode())
    for tensor in (data.images, data.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return {"data": digest.hexdigest(), "device": device.type}


def save(state: State, folder: Path, step: int, seconds: float, extra: Mapping[str, Any]) -> None:
    """Write one checkpoint.

    Raises:
        FileFormatError: It cannot be written.
    """
    tensors = {**_modules(state), **_random_states(state)}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    record = {
        "step": step,
        "seconds": seconds,
        "settings": state.settings,
        "learning_rates": [group["lr"] for group in state.optimizer.param_groups],
        "rates": [_numbers(rate) for rate in state.rates],
        "extra": extra,
    }
    checkpoint_folders.check_replaced(folder, KIND)
    with atomic_folder(folder) as unfinished:
        write_safetensors(unfinished / _TENSORS, tensors)
        write_json(unfinished / _RECORD, record)
        write_manifest(unfinished, KIND, VERSION)


def load(state: State, folder: Path) -> dict[str, Any]:
    """Read a checkpoint into ``state``, once all of it is checked; its record.

    Raises:
        FileFormatError: It is missing, unfinished or damaged.
        ValueError: It was saved with other settings, networks or images, or on another kind of device.
    """
    check_manifest(folder, KIND, VERSION)
    record, (tensors, _) = read_json(folder / _RECORD), read_safetensors(folder / _TENSORS)
    try:
        _check_settings(record["settings"], state.settings, folder)
        _check_tensors(tensors, state, folder)
        _restore(record, tensors, state)
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{folder}: incomplete: {error!r}; use another checkpoint") from error
    return record


def _modules(state: State) -> dict[str, Tensor]:
    """Live weights and buffers by the names they are saved under."""
    networks = {"model": state.model, "average": state.average}
    return {f"{which}.{name}": t for which, network in networks.items() for name, t in network.state_dict().items()}


def _random_states(state: State) -> dict[str, Tensor]:
    found = {"random.draw": state.draw.get_state(), "random.cpu": torch.get_rng_state()}
    if state.draw.device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(state.draw.device)
    return found


def _numbers(rate: LRScheduler) -> dict[str, Any]:
    """What steps change in a schedule."""
    return {"last_epoch": rate.last_epoch, "_step_count": rate._step_count, "_last_lr": list(rate.get_last_lr())}


def _check_settings(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    for name in dict.fromkeys((*own, *saved)):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"{folder}: was saved with {name} = {saved.get(name)!r:.200}, this training has "
                f"{own.get(name)!r:.200}; resume with the settings it was saved with"
            )


def _check_tensors(tensors: Mapping[str, Tensor], state: State, folder: Path) -> None:
    for name, own in {**_modules(state), **_random_states(state)}.items():
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
            got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(
                f"{folder}: {name} is {got}, this training has {own.dtype} {tuple(own.shape)}; resume with the network "
                f"and the kind of device it was saved with"
            )


@torch.no_grad()
def _restore(record: Mapping[str, Any], tensors: Mapping[str, Tensor], state: State) -> None:
    adam = _adam(tensors, state.optimizer)
    rates = list(zip(state.rates, record["rates"], strict=True))
    groups = state.optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, record["learning_rates"], strict=True):
        group["lr"] = float(rate)
    for name, own in _modules(state).items():
        own.copy_(tensors[name])
    state.optimizer.load_state_dict({"state": adam, "param_groups": groups})
    for schedule, numbers in rates:
        schedule.__dict__.update({name: numbers[name] for name in _numbers(schedule)})
    state.draw.set_state(tensors["random.draw"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], state.draw.device)


def _adam(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Its state by the numbers of the weights, in their memory layout: fused Adam reads both side by side."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, parameter in enumerate(parameters):
        moments = {
            name: torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(
                tensors[f"optimizer.{index}.{name}"]
            )
            for name in ("exp_avg", "exp_avg_sq")
        }
        state[index] = {"step": tensors[f"optimizer.{index}.step"], **moments}
    return state
