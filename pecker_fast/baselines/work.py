"""What the update rules work with: networks, draws, images, and the few expressions that they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast.baselines.config import BaselineConfig
from pecker_fast.baselines.data import Images
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.draws import Draws
from pecker_fast.pretrain import antithetic_timesteps
from pecker_fast.sampling import EpsilonModel, ddim_partial


@dataclass(frozen=True)
class Memory:
    """What Selective Amnesia holds on to.

    Attributes:
        parameters: Those that train.
        fisher: Their diagonal Fisher information, at where they began.
        anchors: Where they began.
    """

    parameters: Sequence[Tensor]
    fisher: Sequence[Tensor]
    anchors: Sequence[Tensor]

    def drift(self) -> Tensor:
        """``sum_i F_i (theta_i - theta*_i)^2``."""
        each = zip(self.parameters, self.fisher, self.anchors, strict=True)
        return torch.stack([(fisher * (now - then).square()).sum() for now, fisher, then in each]).sum()


@dataclass
class Work:
    """One baseline as its update rule sees it.

    Attributes:
        config: Settings.
        losses: How networks are called, and the schedule.
        draws: Everything random but dropout.
        network: The one that trains.
        frozen: The original.
        images: Of retained ("retain") and forgotten ("forget") classes, as far as the method looks at them.
        memory: Of Selective Amnesia.
        stop: Where "esd" stops sampling; None draws it. Counting FLOPs sets it.
    """

    config: BaselineConfig
    losses: DistillLosses
    draws: Draws
    network: nn.Module
    frozen: nn.Module
    images: dict[str, Images] = field(default_factory=dict)
    memory: Memory | None = None
    stop: int | None = None

    # -- what is drawn -----------------------------------------------------------------------------

    def retained(self) -> tuple[Tensor, Tensor]:
        """Images of retained classes and their labels."""
        return self.images["retain"].draw(self.config.batch_size)

    def forgotten(self) -> tuple[Tensor, Tensor]:
        """Images of forgotten classes and their labels."""
        return self.images["forget"].draw(self.config.forget_samples)

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t``, antithetic timesteps t, and the noise that was added."""
        schedule = self.losses.schedule
        t = antithetic_timesteps(len(x0), schedule.num_train_timesteps, self.draws.rng)
        epsilon = self.draws.noise(len(x0))
        return schedule.add_noise(x0, epsilon, t), t, epsilon

    def uniform_noise(self, count: int) -> Tensor:
        """Images without any content, uniform in [-1, 1]."""
        shape = (count, *self.config.sample_shape)
        return torch.rand(shape, generator=self.draws.rng, device=self.draws.device).to(self.draws.dtype) * 2 - 1

    def on_the_way(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``x_t`` of the frozen network for ``labels``, after a random number of its DDIM steps, and t."""
        steps, rng, device = self.config.sampling_steps, self.draws.rng, self.draws.device
        stop = int(torch.randint(steps, (), generator=rng, device=device)) if self.stop is None else self.stop
        guidance = self.config.sampling_guidance if self.config.null_class else 1.0
        model, noise = self.guided(self.frozen, guidance), self.draws.noise(len(labels))
        return ddim_partial(
            model, self.losses.schedule, noise, labels, steps=steps, stop=stop, clip=self.config.clip_samples
        )

    def dropped(self, labels: Tensor) -> Tensor:
        """Labels, some of them replaced by the null class."""
        if not self.config.class_dropout:
            return labels
        chance = torch.rand(len(labels), generator=self.draws.rng, device=self.draws.device)
        return labels.masked_fill(chance < self.config.class_dropout, self.config.num_classes)

    def null(self, labels: Tensor) -> Tensor:
        """The null class, as often as there are labels."""
        return torch.full_like(labels, self.config.num_classes)

    # -- what is computed --------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise that a network sees in ``x_t``."""
        return self.losses.predict(network, x_t, t, labels)

    @torch.no_grad()
    def fixed(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The same as a target: no gradient, no dropout."""
        training = network.training
        try:
            return self.losses.predict(network.eval(), x_t, t, labels)
        finally:
            network.train(training)

    def guided(self, network: nn.Module, guidance: float) -> EpsilonModel:
        """``eps_null + guidance (eps_c - eps_null)``; with guidance 1 the null class is not asked."""
        predict = functools.partial(self.losses.predict, network)
        if guidance == 1.0:
            return predict

        def model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            null = predict(x_t, t, self.null(labels))
            return null + guidance * (predict(x_t, t, labels) - null)

        return model

    def denoising(self, x0: Tensor, labels: Tensor) -> Tensor:
        """``<(eps - eps_theta(x_t, t, c))^2>`` of the network that trains."""
        x_t, t, epsilon = self.noised(x0)
        return F.mse_loss(self.predict(self.network, x_t, t, self.dropped(labels)), epsilon)

    def drift(self) -> Tensor:
        """How far the network has moved, in Fisher information; see ``Memory``."""
        if self.memory is None:
            raise RuntimeError("nothing to hold on to yet; Baseline.prepare() computes it")
        return self.memory.drift()
