"""What a model looks like that never knew the class: trained from scratch as the model itself was, without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.compare.plan import Job
from pecker_fast.compare.task import Task
from pecker_fast.distill_samples import draw_start
from pecker_fast.mask import BlockMask
from pecker_fast.pretrain import seeded, train_denoiser
from pecker_fast.sampling import ddim_sample


class Retrained:
    """A contestant that trains in one go, with the learning rate's schedule and the average of ``pretrain``.

    Args:
        task: Its model is built again from its ``config``.
        job: Classes to leave out, and the seed.
    """

    def __init__(self, task: Task, job: Job) -> None:
        self.task, self.job = task, job
        model: Any = task.true_score
        self.device = next(model.parameters()).device
        with seeded(job.seed, torch.device("cpu")):
            fresh = type(model)(**model.config)
        self.network: nn.Module = fresh.to(self.device).eval()

    def build_mask(self) -> BlockMask:
        """Every weight."""
        return BlockMask.dense(self.network)

    def run(self, steps: int, *, progress: bool = True, label: str = "retrain") -> Iterator[Mapping[str, float]]:
        """All steps, and then one look."""
        data = self.task.train
        kept = data.subset(~torch.isin(data.labels, torch.tensor(self.job.forget, device="cpu")))
        settings = {"steps": steps, "seed": self.job.seed, **self.task.retraining}
        self.network = train_denoiser(self.network, kept, self.task.schedule, progress=progress, **settings)
        yield {"step": steps}

    def sample(self, condition: Tensor, *, seed: int | None = None) -> Tensor:
        """By DDIM."""
        shape = (len(condition), *self.task.sample_shape)
        noise = draw_start(shape, seed, self.device, torch.float32)
        steps = self.generation["steps"]
        return ddim_sample(self.network, self.task.schedule, noise, condition, steps=steps, clip=1.0)

    @property
    def lr_scale(self) -> float:
        """No mask, no scale."""
        return 1.0

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """It is averaged already."""
        return nullcontext(self.network)

    @property
    def generation(self) -> dict[str, Any]:
        """As the model itself is sampled from."""
        steps = self.task.diffusion["sampling_steps"]
        shape = list(self.task.sample_shape)
        return {"kind": "ddim", "steps": steps, "schedule": self.task.schedule.to_dict(), "sample_shape": shape}
