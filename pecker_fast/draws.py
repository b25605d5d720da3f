"""Everything random in an iteration of the distiller: labels, timesteps, noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pecker_fast.config import DistillConfig
from pecker_fast.schedule import NoiseSchedule


def check_timesteps(config: DistillConfig, schedule: NoiseSchedule) -> None:
    """Refuse settings with timesteps that a schedule does not have.

    Raises:
        ValueError: ``t_init`` or the last one below ``t_max`` is beyond it.
    """
    last = max(config.t_init, config.t_max - 1)
    if last >= schedule.num_train_timesteps:
        raise ValueError(
            f"DistillConfig: t_init={config.t_init} and t_max={config.t_max} reach timestep {last}, but the "
            f"schedule has {schedule.num_train_timesteps}"
        )


@dataclass(frozen=True)
class Batch:
    """What one update draws: retained classes first, then forgotten ones.

    Attributes:
        labels: Classes that generator and fake score are asked for, (n,).
        targets: Classes that the true score is asked for, (n,).
        nulls: What stands for no class in guidance, (n,): label ``num_classes``, or a negative one.
        weights: Weights of the samples in the loss, (n,).
        noise: Where the generator starts, (n, *sample_shape).
        t: Timesteps of the score losses, (n,).
        epsilon: Noise that is added at ``t``, (n, *sample_shape).
    """

    labels: Tensor
    targets: Tensor
    nulls: Tensor
    weights: Tensor
    noise: Tensor
    t: Tensor
    epsilon: Tensor

    def __getitem__(self, samples: slice) -> Batch:
        """Some of the samples, with their weights."""
        return Batch(*(tensor[samples] for tensor in vars(self).values()))


class Draws:
    """A seeded source of batches.

    Args:
        config: Classes, batch sizes, timesteps, seed.
        device: Where the draws are made.
        dtype: Of noise and weights; the draws are the same whatever it is.
        seed: Where they begin; None takes ``config.seed``.
    """

    def __init__(
        self, config: DistillConfig, device: torch.device, dtype: torch.dtype, seed: int | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.rng = torch.Generator(device).manual_seed(config.seed if seed is None else seed)
        # On the device once, so that no step waits for a copy.
        self._tables = {labels: torch.tensor(labels, device=device) for labels in (config.retained, config.forget)}
        self._override = _table(config, config.override, device)
        self._negative = _table(config, config.negative, device)

    def batch(self, *, dropout: float = 0.0) -> Batch:
        """Retained and forgotten classes in one batch: with the weights of the two means, the published two in one.

        Two batches one after the other have the same gradient (no layer of these networks looks across samples).

        Args:
            dropout: Share of the samples whose class is dropped: label ``num_classes``.
        """
        config = self.config
        retained = self.retained()
        retain = self._samples(retained, retained, self._none(retained), config.retain_weight)
        if not config.forget:
            return self._dropped(Batch(*retain), dropout)
        forgotten = self.forgotten()
        nulls = self._none(forgotten) if self._negative is None else self._negative[forgotten]
        forget = self._samples(forgotten, self.override(forgotten), nulls, config.forget_weight)
        return self._dropped(Batch(*(torch.cat(pair) for pair in zip(retain, forget, strict=True))), dropout)

    def _dropped(self, batch: Batch, share: float) -> Batch:
        if not share:
            return batch
        dropped = torch.rand(len(batch.t), generator=self.rng, device=self.device) < share
        keys = ("labels", "targets", "nulls")
        return replace(
            batch, **{key: getattr(batch, key).masked_fill(dropped, self.config.num_classes) for key in keys}
        )

    def _none(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.config.num_classes)

    def again(self, parts: Sequence[Batch]) -> list[Batch]:
        """The same samples at fresh timesteps, with fresh noise, drawn for all parts of a batch at once."""
        sizes = [len(part.t) for part in parts]
        t = self.timesteps(sum(sizes), self.config.t_min, self.config.t_max).split(sizes)
        epsilon = self.noise(sum(sizes)).split(sizes)
        return [replace(part, t=t[i], epsilon=epsilon[i]) for i, part in enumerate(parts)]

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Within the block draws are as always; where it fails they were never made."""
        state = self.rng.get_state()
        try:
            yield
        except BaseException:
            self.rng.set_state(state)
            raise

    def forgotten(self, count: int | None = None) -> Tensor:
        """Forgotten classes, (count,); as many as an update takes if not told."""
        return self._labels(self.config.forget, count or self.config.forget_samples)

    def retained(self, count: int | None = None) -> Tensor:
        """Retained classes, (count,); as many as an update takes if not told."""
        return self._labels(self.config.retained, count or self.config.batch_size)

    def override(self, labels: Tensor) -> Tensor:
        """What the true score is asked for in place of forgotten ``labels``."""
        if self._override is None:
            return self._labels(self.config.retained, len(labels))
        return self._override[labels]

    def noise(self, count: int) -> Tensor:
        """Standard normal noise, (count, *sample_shape)."""
        shape = (count, *self.config.sample_shape)
        return torch.randn(shape, generator=self.rng, device=self.device).to(self.dtype)

    def timesteps(self, count: int, low: int, high: int) -> Tensor:
        """Uniform timesteps from ``low`` to below ``high``, int64 (count,)."""
        return torch.randint(low, high, (count,), generator=self.rng, device=self.device)

    def _samples(self, labels: Tensor, targets: Tensor, nulls: Tensor, weight: float) -> tuple[Tensor, ...]:
        count = len(labels)
        noise = self.noise(count)
        t = self.timesteps(count, self.config.t_min, self.config.t_max)
        weights = torch.full((count,), weight / count, device=self.device, dtype=self.dtype)
        return labels, targets, nulls, weights, noise, t, self.noise(count)

    def _labels(self, labels: tuple[int, ...], count: int) -> Tensor:
        index = torch.randint(len(labels), (count,), generator=self.rng, device=self.device)
        return self._tables[labels][index]


def _table(config: DistillConfig, substitutes: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    """Class -> what takes its place, (num_classes,): one for each forgotten one, or one for all; None is none."""
    if substitutes is None or not config.forget:
        return None
    table = torch.arange(config.num_classes, device="cpu")
    each = substitutes if len(substitutes) > 1 else substitutes * len(config.forget)
    table[list(config.forget)] = torch.tensor(each, device="cpu")
    return table.to(device)
