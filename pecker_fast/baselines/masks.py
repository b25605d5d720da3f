"""Which weights of a baseline train: the distiller's masks, by SalUn's saliency pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pecker_fast.baselines.data import generated
from pecker_fast.baselines.work import Work
from pecker_fast.distill_masks import Images, MaskMaker
from pecker_fast.mask_config import MaskConfig
from pecker_fast.saliency import Saliency, compute_saliency


@dataclass(frozen=True)
class SalUnMasks(MaskMaker):
    """As ``MaskMaker``; the saliency pass is SalUn's (Fan et al. 2024, arXiv 2310.12508).

    Attributes:
        work: The baseline that the mask is for.
    """

    work: Work

    def noise_prediction(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """``mean_batch sum_pixels (eps - ((1 + s) eps_c - s eps_null))^2`` at antithetic timesteps."""
        x0, labels = batch[0].to(self.draws.device, self.draws.dtype), batch[1].to(self.draws.device)
        x_t, t, epsilon = self.work.noised(x0)
        prediction = self.work.guided(network, 1 + self.work.config.saliency_guidance)(x_t, t, labels)
        return (epsilon - prediction).square().flatten(1).sum(1).mean()

    def _saliency(self, config: MaskConfig, fake_score: Callable[[], nn.Module], images: Images | None) -> Saliency:
        clip_norm = self.work.config.saliency_clip_norm
        batches = self._batches(config) if images is None else images
        return compute_saliency(self.generator, self.noise_prediction, batches, config.accumulate, clip_norm=clip_norm)

    def _batches(self, config: MaskConfig) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of classes to forget: each given one before any comes again; the model's own where none are given."""
        work, size = self.work, config.batch_size or self.work.config.forget_samples
        if "forget" in work.images:
            yield from work.images["forget"].epochs(config.batches, size)
        elif work.images:
            raise ValueError(f"data: the mask is chosen by images of class {work.config.forget}, there are none")
        else:
            model, schedule = work.guided(self.true_score, 1.0), self.losses.schedule
            for _ in range(config.batches):
                labels = self.draws.forgotten(size)
                own = generated(model, schedule, work.config, labels, self.draws.rng, self.draws.dtype)
                yield own.images, own.labels
