"""Selective Amnesia's memory: the diagonal Fisher information of a diffusion model, from its own samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.baselines.data import generated
from pecker_fast.baselines.work import Memory, Work
from pecker_fast.stopping import fresh_seed


def diagonal_fisher(parameters: Sequence[Tensor], samples: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """``mean over samples of (gradient of a sample's summed loss)^2``, for every parameter.

    Args:
        parameters: What to differentiate with respect to; all of them require gradients.
        samples: For each sample the parts of its loss, 0-d tensors, which are differentiated one after the other.

    Returns:
        One tensor of its shape for each parameter.

    Raises:
        ValueError: There are no samples.
    """
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0
    for parts in samples:
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in parts:
            for gradient, part in zip(gradients, _gradients(loss, parameters), strict=True):
                if part is not None:
                    gradient += part
        torch._foreach_addcmul_(totals, gradients, gradients)
        count += 1
    if not count:
        raise ValueError("diagonal_fisher: expected at least one sample, got none")
    return [total / count for total in totals]


def remember(work: Work, parameters: Sequence[Tensor], *, progress: bool = False) -> Memory:
    """Fisher information and place of ``parameters`` of ``work.network`` as it is now.

    The loss of a sample is published as a sum over pixels and all timesteps, with fresh noise at each.
    """
    training = work.network.training
    try:
        work.network.eval()
        fisher = diagonal_fisher(parameters, _losses(work, progress))
    finally:
        work.network.train(training)
    return Memory(parameters, fisher, [parameter.detach().clone() for parameter in parameters])


def timesteps_of(work: Work) -> Tensor:
    """Timesteps that a sample's loss is summed over."""
    total = work.losses.schedule.num_train_timesteps
    count = work.config.fisher_timesteps or total
    if count > total:
        raise ValueError(f"BaselineConfig.fisher_timesteps: expected at most the schedule's {total}, got {count}")
    return torch.arange(count, device=work.draws.device) * total // count


def part_of_sample(work: Work, x0: Tensor, label: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
    """A sample's loss at timesteps ``t``, as the sum over all would have it."""
    share = work.losses.schedule.num_train_timesteps / len(timesteps_of(work))
    shape = (len(t), *x0.shape)
    epsilon = torch.randn(shape, generator=rng, device=x0.device).to(x0.dtype)
    return share * work.losses.noise_prediction(work.network, x0.expand(shape), label.expand(len(t)), t, epsilon).sum()


def _losses(work: Work, progress: bool) -> Iterator[Iterator[Tensor]]:
    """Of every sample, in chunks of timesteps; samples are drawn as they are needed."""
    config, device = work.config, work.draws.device
    rng = torch.Generator(device).manual_seed(fresh_seed("fisher", config.seed))
    chunks = timesteps_of(work).split(config.batch_size)
    every = torch.arange(config.num_classes, device=device).repeat_interleave(config.fisher_samples)
    model = work.guided(work.frozen, 1.0)
    with tqdm(total=len(every), desc="Fisher information", unit="image", disable=not progress) as bar:
        for labels in every.split(config.batch_size):
            images = generated(model, work.losses.schedule, config, labels, rng, work.draws.dtype)
            for x0, label in zip(images.images, images.labels, strict=True):
                yield (part_of_sample(work, x0, label, t, rng) for t in chunks)
                bar.update()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)
