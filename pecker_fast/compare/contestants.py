"""A method, a task and a job, made into something that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.baselines import Baseline, BaselineConfig
from pecker_fast.compare.methods import Method
from pecker_fast.compare.plan import Job
from pecker_fast.compare.task import Task
from pecker_fast.config import DistillConfig
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.mask import BlockMask
from pecker_fast.mask_config import MaskConfig


class Runner(Protocol):
    """What one run asks of whatever forgets."""

    device: torch.device

    def build_mask(self) -> BlockMask:
        """Choose the active weights, and get everything ready to train."""
        ...

    def run(self, steps: int, *, progress: bool = True, label: str = ...) -> Iterator[Mapping[str, float]]:
        """Steps, one after the other, each with its number as "step"."""
        ...

    def sample(self, condition: Tensor, *, seed: int | None = None) -> Tensor:
        """Images."""
        ...

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The network with the weights that are sampled from."""
        ...

    @property
    def lr_scale(self) -> float:
        """What the mask multiplies the learning rate by."""
        ...

    @property
    def generation(self) -> dict[str, Any]:
        """How it is sampled from."""
        ...


class Contestant(Runner, Protocol):
    """What timing asks besides, of a ``MaskedDistiller`` or a ``Baseline``."""

    def step(self) -> dict[str, Tensor]:
        """One step."""
        ...

    def flops(self) -> dict[str, Any]:
        """Of a step, of the mask, and of what else comes before the first step."""
        ...


def make(method: Method, task: Task, job: Job) -> Contestant:
    """Ready for ``build_mask()``; the task's networks stay as they are."""
    classes = {"override": task.overrides(job.forget), "retain": task.retained(job.forget)}
    common: dict[str, Any] = {"forget": job.forget, "num_classes": task.num_classes}
    common |= {"sample_shape": task.sample_shape, "seed": job.seed, "mask": _mask(method, task, job)}
    if method.family == "distillation":
        rates = dict.fromkeys(("generator_lr", "fake_score_lr"), task.distillation_lr * job.factor)
        config = DistillConfig(**{**common, **task.distillation, **classes, **rates, **method.settings})
        return MaskedDistiller(task.true_score, task.schedule, config)
    rate = {"learning_rate": task.diffusion_lr * job.factor}
    own = task.rules.get(method.settings["method"], {})
    settings = BaselineConfig(**{**common, **task.diffusion, **classes, **rate, **own, **method.settings})
    return Baseline(task.true_score, task.schedule, settings, data=task.train)


def _mask(method: Method, task: Task, job: Job) -> MaskConfig:
    """The method's mask; one by chance is as dense as the saliency mask that it stands against comes out."""
    if method.as_dense_as is None:
        return method.mask
    other = make(replace(method, mask=method.as_dense_as, as_dense_as=None), task, job)
    return replace(method.mask, density=other.build_mask().density)


def get_ready(contestant: Runner) -> BlockMask:
    """All that comes before the first step: the mask, and what Selective Amnesia remembers."""
    mask = contestant.build_mask()
    if isinstance(contestant, Baseline):
        contestant.prepare()
    return mask


def trained(contestant: Runner) -> nn.Module:
    """The network that trains, with its current weights."""
    own: nn.Module = vars(contestant)["generator" if isinstance(contestant, MaskedDistiller) else "network"]
    return own


def networks(contestant: Contestant) -> Iterable[nn.Module]:
    """The modules that it holds, each once."""
    found = {id(value): value for value in vars(contestant).values() if isinstance(value, nn.Module)}
    return found.values()


def held_tensors(contestant: Contestant) -> Iterator[Tensor]:
    """Weights, buffers, gradients, the flat store and optimizer state."""
    for network in networks(contestant):
        for tensor in (*network.parameters(), *network.buffers()):
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad
    if isinstance(contestant, Baseline):
        yield from _remembered(contestant)
    for value in vars(contestant).values():
        if isinstance(value, ActiveParameters):
            yield from (tensor for tensor in (value.values, value.grads, value.ema) if tensor is not None)
        elif isinstance(value, torch.optim.Optimizer):
            for state in value.state.values():
                yield from (tensor for tensor in state.values() if isinstance(tensor, Tensor))


def _remembered(baseline: Baseline) -> Iterator[Tensor]:
    """Selective Amnesia's Fisher information, where it came from, and what it rehearses; the others' real images."""
    if baseline.work.memory is not None:
        yield from (tensor for values in vars(baseline.work.memory).values() for tensor in values)
    for images in baseline.work.images.values():
        yield images.images
