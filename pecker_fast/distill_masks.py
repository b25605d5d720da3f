"""Which weights of a distiller's networks train: its config, made into masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from pecker_fast.blocks import ParameterMask
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.draws import Batch, Draws
from pecker_fast.mask import BlockMask
from pecker_fast.mask_config import MaskConfig
from pecker_fast.mask_controls import random_outside, random_within_layers
from pecker_fast.maskable import NORMS, survey
from pecker_fast.saliency import Saliency, compute_saliency
from pecker_fast.terms import Terms
from pecker_fast.weight_costs import weight_gradient_flops

Images = Iterable[tuple[Tensor, Tensor]]
"""(x0, labels) each."""
Part = Literal["all", "retain", "forget"]


@dataclass(frozen=True)
class Pass:
    """``count`` gradients of a loss with respect to all weights of one network; for the count of FLOPs.

    Attributes:
        count: How many.
        of: "generator" or "fake_score".
        loss: One of them.
    """

    count: int
    of: str
    loss: Callable[[], Tensor]


@dataclass(frozen=True)
class MaskMaker:
    """Chooses the masks of one distiller.

    Attributes:
        losses: The losses whose gradients are looked at.
        draws: Where samples come from.
        true_score: Frozen.
        generator: As it is before it is masked.
    """

    losses: DistillLosses
    draws: Draws
    true_score: nn.Module
    generator: nn.Module

    def of_generator(
        self,
        fake_score: Callable[[], nn.Module],
        images: Images | None = None,
        exclude: Sequence[BlockMask] = (),
    ) -> BlockMask:
        """The generator's mask by ``config.mask``.

        Args:
            fake_score: Gives the fake score to look with, which has left the true score; asked only where needed.
            images: Of classes to forget; None takes samples of the generator.
            exclude: Masks whose weights are left alone.
        """
        config = self.losses.config.mask
        if not config.looks:
            return self._without_saliency(self.generator, config, exclude)
        return self._ranked(self._saliency(config, fake_score, images), self.generator, config, exclude)

    def check(self, images: Images | None, exclude: Sequence[BlockMask]) -> None:
        """Refuse what ``of_generator`` could not use, before anything is computed.

        Raises:
            ValueError: Images, and a saliency that looks at samples of its own; masks to leave alone, and a dense run.
        """
        config = self.losses.config.mask
        if images is not None and config.saliency != "noise_prediction":
            raise ValueError(
                f"MaskConfig.saliency={config.saliency!r} looks at the generator's own samples; leave the images out, "
                f"or take saliency='noise_prediction'"
            )
        if exclude and config.kind == "dense":
            raise ValueError("exclude: a dense run trains every weight; take another kind of mask to leave some alone")

    def of_fake_score(self, fake_score: nn.Module) -> BlockMask:
        """The fake score's mask by ``config.fake_score_mask``: saliency of its own loss, on all classes."""
        config = self.losses.config.mask_of_fake_score
        if not config.looks:
            return self._without_saliency(fake_score, config)
        batches = (self._samples(self.draws.batch().labels) for _ in range(config.batches))
        saliency = compute_saliency(fake_score, self.noise_prediction, batches, config.accumulate)
        return self._ranked(saliency, fake_score, config)

    def passes(self, fake_score: nn.Module) -> list[Pass]:
        """What both masks compute, as far as it has products."""
        config, own = self.losses.config.mask, self.losses.config.mask_of_fake_score
        passes = []
        if config.looks and config.saliency == "noise_prediction":
            passes.append(Pass(config.batches, "generator", lambda: self._published(config)))
        elif config.looks:
            parts: tuple[Part, ...] = ("all",) if config.saliency == "distillation" else ("forget", "retain")
            passes.append(Pass(config.saliency_warmup, "fake_score", lambda: self.fake_score_loss(fake_score)))
            passes += [Pass(config.batches, "generator", self._distillation(fake_score, part)) for part in parts]
        if own.looks:
            look = lambda: self.noise_prediction(fake_score, self._samples(self.draws.batch().labels))  # noqa: E731
            passes.append(Pass(own.batches, "fake_score", look))
        return passes

    # -- losses ------------------------------------------------------------------------------------

    def noise_prediction(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean noise-prediction loss at timesteps over the whole schedule: PECKER's saliency loss."""
        x0, labels = (tensor.to(self.draws.device) for tensor in batch)
        t = self.draws.timesteps(len(x0), 0, self.losses.schedule.num_train_timesteps)
        return self.losses.noise_prediction(network, x0, labels, t, self.draws.noise(len(x0))).mean()

    def _published(self, config: MaskConfig) -> Tensor:
        return self.noise_prediction(self.generator, self._forgotten(config))

    def fake_score_loss(self, fake_score: nn.Module) -> Tensor:
        """What the fake score is trained on, of a fresh batch."""
        batch = self.draws.batch()
        with torch.no_grad():
            x0 = self.losses.generate(self.generator, batch.noise, batch.labels)
        return (batch.weights * self.losses.of_fake_score(fake_score, batch, x0)).sum()

    def _distillation(self, fake_score: nn.Module, part: Part) -> Callable[[], Tensor]:
        """The generator's own loss of a fresh batch, or of a part of it."""

        def loss() -> Tensor:
            batch = self._part(self.draws.batch(), part)
            x0 = self.losses.generate(self.generator, batch.noise, batch.labels)
            return (batch.weights * self.losses.of_generator(self.true_score, fake_score, batch, x0)).sum()

        return loss

    def _part(self, batch: Batch, part: Part) -> Batch:
        retained = self.losses.config.batch_size
        return batch if part == "all" else batch[:retained] if part == "retain" else batch[retained:]

    # -- saliency ----------------------------------------------------------------------------------

    def _saliency(self, config: MaskConfig, fake_score: Callable[[], nn.Module], images: Images | None) -> Saliency:
        if config.saliency == "noise_prediction":
            batches = (self._forgotten(config) for _ in range(config.batches)) if images is None else images
            return compute_saliency(self.generator, self.noise_prediction, batches, config.accumulate)
        other = fake_score()
        if config.saliency == "distillation":
            return self._of_loss(config, self._distillation(other, "all"))
        forget, retain = (self._of_loss(config, self._distillation(other, part)) for part in ("forget", "retain"))
        return _relative(forget, retain)

    def _of_loss(self, config: MaskConfig, loss: Callable[[], Tensor]) -> Saliency:
        return compute_saliency(self.generator, lambda _, __: loss(), range(config.batches), config.accumulate)

    def _forgotten(self, config: MaskConfig) -> tuple[Tensor, Tensor]:
        return self._samples(self.draws.forgotten(config.batch_size))

    @torch.no_grad()
    def _samples(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses.generate(self.generator, self.draws.noise(len(labels)), labels), labels

    # -- selection ---------------------------------------------------------------------------------

    def _ranked(
        self, saliency: Saliency, network: nn.Module, config: MaskConfig, exclude: Sequence[BlockMask] = ()
    ) -> BlockMask:
        terms = self._terms(network, config, per_cost=config.rank == "flop")
        exclude = [*exclude, *_frozen_norms(network, config)]
        mask = BlockMask.from_saliency(saliency, config.density, config.block, config.scope, exclude, **terms)
        if config.kind == "saliency":
            return mask
        return self._control(mask, saliency, config, exclude, terms)

    def _control(
        self, mask: BlockMask, saliency: Saliency, config: MaskConfig, exclude: list[BlockMask], terms: dict[str, Any]
    ) -> BlockMask:
        """What a saliency mask is compared with, of the same terms."""
        seed, grids = self.losses.config.seed, saliency.grids(config.block)
        barred = [m.parameters for m in (*exclude, *([mask] if config.kind == "complement" else []))]
        costs = terms["costs"] if terms["budget"] == "costs" else None  # chance does not rank by what a weight costs
        asked = Terms.of(grids, saliency.total, barred, terms["region"], costs, terms["budget"])
        if config.kind == "complement":
            share = mask.density if config.budget == "parameters" else config.density
            parameters = random_outside(mask.parameters, asked, share, seed)
        else:
            parameters = random_within_layers(mask.parameters, asked, seed)
        return BlockMask(parameters, mask.total, config.density, saliency.mass(parameters))

    def _without_saliency(self, network: nn.Module, config: MaskConfig, exclude: Sequence[BlockMask] = ()) -> BlockMask:
        if config.kind == "random":
            terms, seed = self._terms(network, config), self.losses.config.seed
            exclude = [*exclude, *_frozen_norms(network, config)]
            return BlockMask.random(network, config.density, config.block, seed, exclude, **terms)
        return BlockMask.dense(network, config.region)

    def _terms(self, network: nn.Module, config: MaskConfig, **terms: Any) -> dict[str, Any]:
        """Where weights may lie and what they cost, for ``BlockMask``."""
        by_cost = config.budget == "flops" or terms.get("per_cost", False)
        costs = self._costs(network) if by_cost else None
        budget = "costs" if config.budget == "flops" else "parameters"
        return {"region": config.region, "costs": costs, "budget": budget, **terms}

    def _costs(self, network: nn.Module) -> dict[str, float]:
        """FLOPs of the gradient of one weight, for one sample; what is never reached is as cheap as the cheapest."""
        with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
            empty = copy.deepcopy(network)
        draws = self.draws
        noise = torch.zeros((1, *self.losses.config.sample_shape), device=draws.device, dtype=draws.dtype)
        label = torch.zeros(1, dtype=torch.int64, device=draws.device)
        costs = weight_gradient_flops(empty, lambda model: self.losses.generate(model, noise, label))
        return {name: costs.get(name, min(costs.values())) for name in survey(network).maskable}


def _frozen_norms(network: nn.Module, config: MaskConfig) -> list[BlockMask]:
    """A mask of the norms, to be excluded, where they are not to train."""
    if config.norms:
        return []
    modules = {name: module for name, module in network.named_modules() if isinstance(module, NORMS)}
    every, nothing = BlockMask.dense(network), torch.zeros(0, dtype=torch.int64, device="cpu")
    parameters = {
        name: parameter if name.rpartition(".")[0] in modules else ParameterMask(parameter.grid, nothing)
        for name, parameter in every.parameters.items()
    }
    return [BlockMask(parameters, every.total, 1.0)]


def lr_scale(mask: BlockMask, config: MaskConfig) -> float:
    """What ``config.lr_scale`` multiplies the learning rate of a network with ``mask`` by.

    A mask without mass, made by chance or put together from others, counts as chance: its mass is its density.

    Raises:
        ValueError: No gradient at all lies on the mask.
    """
    if config.lr_scale == "none":
        return 1.0
    mass = mask.density if config.lr_scale == "density" or mask.mass is None else mask.mass
    if not mass > 0:
        raise ValueError(
            "MaskConfig.lr_scale='mass': no gradient lies on the active weights, so no learning rate makes up for it; "
            "choose other weights, or lr_scale='density'"
        )
    scale = 1 / math.sqrt(mass * mask.density)
    return scale if config.lr_scale_max is None else min(scale, config.lr_scale_max)


def _relative(forget: Saliency, retain: Saliency) -> Saliency:
    """Forget saliency over retain saliency, which its own mean keeps away from zero; the gradients' mass is of both."""
    for saliency in (forget, retain):
        saliency.check()
    count = sum(value.numel() for value in retain.values())
    floor = sum(float(value.double().sum()) for value in retain.values()) / count
    ratio = {name: forget[name] / (retain[name] + floor) for name in forget}
    both = {name: forget[name] + retain[name] for name in forget}
    return Saliency(ratio, forget.total, forget.embeddings, forget.squared, gradients=both)
