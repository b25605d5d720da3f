"""One iteration of a distiller: an update of its fake score, then one of its generator."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.apply import apply_mask
from pecker_fast.config import DistillConfig
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.distill_ranks import Ranks
from pecker_fast.draws import Batch, Draws
from pecker_fast.mask import BlockMask
from pecker_fast.optim import MaskedAdamW

Sampled: TypeAlias = tuple[Batch, Tensor]
"""What was drawn, and the generator's samples of it."""


@dataclass(frozen=True)
class Learner:
    """A network that trains.

    Attributes:
        network: Masked.
        optimizer: Of its active weights.
        lr: Learning rate of this step.
    """

    network: nn.Module
    optimizer: MaskedAdamW
    lr: float


@dataclass(frozen=True)
class Updates:
    """The iterations of one distiller.

    Attributes:
        losses: What the networks are trained on.
        draws: Where batches come from.
        ranks: The processes whose gradients are averaged.
        true_score: Frozen.
        generator: The network of the generator's learner, which is there before it learns.
    """

    losses: DistillLosses
    draws: Draws
    ranks: Ranks
    true_score: nn.Module
    generator: nn.Module

    def iteration(self, generator: Learner, fake_score: Learner) -> dict[str, Tensor]:
        """Both updates; see ``MaskedDistiller.step``."""
        reuse = self.losses.config.reuse_generator_forward
        with self.losses.frozen_parts():
            samples = self._samples_to_learn_from(generator) if reuse else None
            fake_score_loss = self._of_fake_score(fake_score, samples)
            generator_loss = self._of_generator(generator, fake_score, samples)
        return {"fake_score_loss": fake_score_loss, "generator_loss": generator_loss}

    def ahead(self, fake_score: nn.Module) -> nn.Module:
        """The fake score; where the mask is to look at the generator's own loss, a copy that has trained a little."""
        config = self.losses.config
        steps = config.mask.saliency_warmup
        if not config.mask.looks or config.mask.saliency == "noise_prediction" or not steps:
            return fake_score
        network = copy.deepcopy(fake_score)
        active = apply_mask(network, BlockMask.dense(network), unmaskable="dense")
        optimizer = make_optimizer(config, active, config.fake_score_lr)
        for step in range(steps):
            self._of_fake_score(Learner(network, optimizer, config.fake_score_lr * warmup(config, step)))
        active.requires_grad_(False)
        return network.eval()

    def _of_fake_score(self, fake_score: Learner, samples: list[Sampled] | None = None) -> Tensor:
        """The fake score learns the generator's samples: noise prediction on x0 = G(z, c), the generator fixed."""
        network = fake_score.network.train()
        fake_score.optimizer.active.requires_grad_(True)
        fake_score.optimizer.zero_grad()
        if samples is None:
            self.generator.eval()
            with torch.no_grad():
                samples = list(self._samples(self.losses.config.guidance.dropout))
        losses = (
            (batch.weights * self.losses.of_fake_score(network, batch, x0.detach())).sum() for batch, x0 in samples
        )
        return self._follow(losses, fake_score)

    def _of_generator(self, generator: Learner, fake_score: Learner, samples: list[Sampled] | None) -> Tensor:
        """The generator moves its samples to where the true score, asked for the target class, wants them."""
        fake_score.network.eval()
        fake_score.optimizer.active.requires_grad_(False)
        if samples is None:
            generator.network.train()
            generator.optimizer.zero_grad()
        else:
            fresh = self.draws.again([batch for batch, _ in samples])
            samples = [(batch, x0) for batch, (_, x0) in zip(fresh, samples, strict=True)]
        losses = (
            (batch.weights * self.losses.of_generator(self.true_score, fake_score.network, batch, x0)).sum()
            for batch, x0 in (self._samples() if samples is None else samples)
        )
        return self._follow(losses, generator)

    def _samples_to_learn_from(self, generator: Learner) -> list[Sampled]:
        """Samples with their graph, for both updates."""
        generator.network.train()
        generator.optimizer.zero_grad()
        return list(self._samples())

    def _samples(self, dropout: float = 0.0) -> Iterator[Sampled]:
        """A batch and the generator's samples of it, a part at a time: as many as go through the networks at once."""
        batch = self.draws.batch(dropout=dropout)
        for part in self._parts(batch):
            yield part, self.losses.generate(self.generator, part.noise, part.labels)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Retained and forgotten samples apart if they are not merged, at most ``micro_batch_size`` of them."""
        config, count = self.losses.config, len(batch.t)
        halves = [slice(0, count)]
        if not config.merge_batches and config.forget:
            halves = [slice(0, config.batch_size), slice(config.batch_size, count)]
        for half in halves:
            size = config.micro_batch_size or count
            for start in range(half.start, half.stop, size):
                yield batch[start : min(start + size, half.stop)]

    def _follow(self, losses: Iterable[Tensor], learner: Learner) -> Tensor:
        """Follow the gradient of the sum of ``losses``, which are computed and dropped one after the other."""
        optimizer = learner.optimizer
        optimizer.param_groups[0]["lr"] = learner.lr
        total: Tensor | None = None
        for loss in losses:
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self.ranks.group is not None:
            optimizer.active.all_reduce_(self.ranks.group)
        optimizer.step()
        return cast(Tensor, total)


def make_optimizer(
    config: DistillConfig, active: ActiveParameters, lr: float, ema_decay: float | None = None
) -> MaskedAdamW:
    """What ``config`` trains a network with."""
    return MaskedAdamW(
        active,
        lr,
        config.betas,
        config.eps,
        config.weight_decay,
        clip_value=config.clip_value,
        ema_decay=ema_decay,
    )


def warmup(config: DistillConfig, steps_done: int) -> float:
    """Share of the learning rates in the step after so many."""
    return min(1.0, (steps_done + 1) / config.warmup_steps) if config.warmup_steps else 1.0
