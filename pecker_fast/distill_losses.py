"""What the networks of a distiller are trained on: the published losses of a batch, one value a sample."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pecker_fast.config import DistillConfig, GuidedPart
from pecker_fast.draws import Batch
from pecker_fast.frozen_channels import every_channel
from pecker_fast.objectives import denoising_loss, score_difference_loss, sid_loss, sid_loss_of_samples
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import Predict


@dataclass(frozen=True)
class DistillLosses:
    """Losses by a config: which networks run on what, and which of them are differentiated.

    Attributes:
        model: How to call a network, ``score_model.predictor``.
        schedule: The noise schedule.
        config: Timesteps, alpha, switches.
    """

    model: Predict
    schedule: NoiseSchedule
    config: DistillConfig

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise that ``network`` sees in ``x_t``, in the dtype of ``x_t``, whatever the network's own."""
        return self.model(network, x_t, t, labels)

    def guided(
        self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, batch: Batch, part: GuidedPart
    ) -> Tensor:
        """Classifier-free guidance, ``eps_null + scale (eps_c - eps_null)``, both in one forward pass.

        With scale 1 nothing but the condition is asked. ``part`` says whose scale it is.
        """
        guidance = self.config.guidance
        scale = guidance.scale(part)
        if scale == 1.0:
            return self.predict(network, x_t, t, labels)
        null = batch.nulls if part in guidance.negative_in else torch.full_like(labels, self.config.num_classes)
        twice = (torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, labels]))
        epsilon_null, epsilon = self.predict(network, *twice).chunk(2)
        return epsilon_null + scale * (epsilon - epsilon_null)

    def generate(self, generator: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        """One-step samples: x0 = (b z - b eps(b z, t_init, c)) / a = sigma_init (z - eps)."""
        t_init = self.config.t_init
        x_init = self._tracked(self.schedule.std(t_init) * noise)
        t = torch.full((len(labels),), t_init, device=labels.device)
        return self.schedule.predict_x0(x_init, self.predict(generator, x_init, t, labels), t_init)

    def of_fake_score(self, fake_score: nn.Module, batch: Batch, x0: Tensor) -> Tensor:
        """Noise prediction on the generator's samples ``x0``, which are fixed, (n,)."""
        x_t = self._tracked(self.schedule.add_noise(x0, batch.epsilon, batch.t))
        prediction = self.guided(fake_score, x_t, batch.t, batch.labels, batch, "fake_score_update")
        return denoising_loss(batch.epsilon, prediction)

    def of_generator(self, true_score: nn.Module, fake_score: nn.Module, batch: Batch, x0: Tensor) -> Tensor:
        """How far samples ``x0`` are from where the true score, asked for the target class, wants them, (n,)."""
        config, schedule, epsilon = self.config, self.schedule, batch.epsilon
        x_t = schedule.add_noise(x0, epsilon, batch.t)
        with torch.no_grad() if config.stop_gradient else nullcontext():
            epsilon_true = self.guided(true_score, x_t, batch.t, batch.targets, batch, "true_score")
            epsilon_fake = self.guided(fake_score, x_t, batch.t, batch.labels, batch, "fake_score")
        sigma = schedule.sigma(batch.t, x_t).flatten()
        if config.stop_gradient:
            return score_difference_loss(x0, epsilon, epsilon_true, epsilon_fake, sigma)
        if config.closed_form_loss:
            return sid_loss(epsilon, epsilon_true, epsilon_fake, sigma, config.sid_alpha)
        x0_true, x0_fake = (schedule.predict_x0(x_t, noise, batch.t) for noise in (epsilon_true, epsilon_fake))
        return sid_loss_of_samples(x0, x0_true, x0_fake, config.sid_alpha)

    def noise_prediction(self, network: nn.Module, x0: Tensor, labels: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """The loss that diffusion models are trained on, (n,)."""
        prediction = self.predict(network, self.schedule.add_noise(x0, epsilon, t), t, labels)
        return denoising_loss(epsilon, prediction)

    def frozen_parts(self) -> AbstractContextManager[None]:
        """Within it, backward passes go where ``config.skip_frozen`` lets them."""
        return nullcontext() if self.config.skip_frozen else every_channel()

    def _tracked(self, x: Tensor) -> Tensor:
        """A network's input; with a graph of its own where even frozen layers are to have one."""
        graph = torch.is_grad_enabled() and not self.config.skip_frozen and not x.requires_grad
        return x.detach().requires_grad_() if graph else x
