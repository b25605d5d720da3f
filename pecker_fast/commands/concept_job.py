"""One erasure from a pipeline, as ``pecker-fast unlearn`` is asked for it: checked before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.baseline_flags import DISTILL
from pecker_fast.baselines import BaselineConfig
from pecker_fast.commands.concept_settings import (
    baseline_config,
    distill_config,
    read_erasure,
    read_plan,
    training_dtype,
)
from pecker_fast.commands.source import torch_device
from pecker_fast.concept_flags import PECKER, is_one_step
from pecker_fast.concepts import recipe
from pecker_fast.concepts.generators import check_generator
from pecker_fast.concepts.pipeline import SETTINGS, PipelineFolder
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.concepts.record import EarlierErasure, apply_earlier, merged
from pecker_fast.concepts.request import Erasure
from pecker_fast.config import DistillConfig
from pecker_fast.delta import Ledger
from pecker_fast.delta.pack import overlaps
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.models.one_step_scheduler import T_INIT_MARK


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        options: The flags.
        base: The pipeline that is to forget, whose UNet is the true score.
        start: Where the UNet that trains starts, and what the delta is against: ``base``, or a one-step generator.
        erasure: What is erased.
        plan: All prompts.
        config: All settings.
        mask: A mask that was given.
        earlier: Erasures that this one adds to.
    """

    options: argparse.Namespace
    base: PipelineFolder
    start: PipelineFolder
    erasure: Erasure
    plan: PromptPlan
    config: DistillConfig | BaselineConfig
    mask: BlockMask | None
    earlier: tuple[EarlierErasure, ...]

    @classmethod
    def read(cls, options: argparse.Namespace) -> Job:
        """Check all of it; no weights are read but those of a mask, of earlier deltas, and of text encoders to compare.

        ``options.max_train_steps`` becomes the method's own where it is None, so that ``config.yaml`` says it.

        Raises:
            FileFormatError: A folder or file is missing, damaged, or not supported.
            ValueError: Flags, prompts or numbers that do not go together.
        """
        if options.max_train_steps is None:
            options.max_train_steps = recipe.STEPS[PECKER if options.method == DISTILL else options.method]
        base = PipelineFolder.read(options.pretrained_model_name_or_path)
        if base.t_init is not None:
            raise FileFormatError(
                f"{base.path}: is a one-step generator by its scheduler, whose betas end at timestep {base.t_init}; "
                f"name the diffusion model, and this with --init_generator (or, if it takes many steps, write "
                f'"{T_INIT_MARK}": null into {SETTINGS})'
            )
        start = base if options.init_generator is None else _generator(options, base)
        base.check_weights()
        erasure = read_erasure(options)
        plan = read_plan(options, erasure)
        earlier = tuple(EarlierErasure.read(folder) for folder in options.earlier or ())
        _check_earlier(options, earlier)
        if earlier and is_one_step(options):
            plan = merged(plan, erasure, earlier, plan.retained_texts)
        make = distill_config if is_one_step(options) else baseline_config
        mask = None if options.mask_path is None else BlockMask.load(options.mask_path)
        config = make(_with_found(options, _t_init(options, start, earlier), mask), base, plan)
        base.check_prompts([*plan.texts, *(options.validation_prompts or ())])
        plan.check_apart(base.token_ids(plan.texts))
        torch_device(options.device)
        job = cls(options, base, start, erasure, plan, config, mask, earlier)
        job.check_mask()
        return job

    @property
    def one_step(self) -> bool:
        """Whether a one-step generator comes out."""
        return is_one_step(self.options)

    @property
    def distils_too(self) -> bool:
        """Whether the UNet of many steps that it starts from has to become a one-step generator on the way."""
        return self.one_step and self.start is self.base and not self.earlier

    @property
    def settings_name(self) -> str:
        """What the file of settings is called."""
        return "distill_config" if self.one_step else "baseline_config"

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return torch_device(self.options.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return training_dtype(self.options, self.device)

    @property
    def active_at_most(self) -> int:
        """Weights that train."""
        if self.mask is not None:
            return self.mask.numel
        mask, held = self.config.mask, self.base.share_of(self.config.mask.region)
        return round((held if mask.kind == "dense" else min(held, mask.density)) * self.base.parameters)

    def start_weights(self) -> tuple[dict[str, Tensor], Ledger]:
        """The weights that the UNet starts from, with the deltas of earlier erasures, and all that they carry.

        Raises:
            FileFormatError: A file is damaged, or a delta is of another model.
        """
        tensors, ledger = self.start.tensors(), self.start.ledger
        apply_earlier(self.earlier, tensors, ledger, self.start.path)
        return tensors, ledger

    def network(self, tensors: dict[str, Tensor]) -> nn.Module:
        """A UNet of these weights as it trains: in its dtype, on its device, perhaps with gradient checkpointing."""
        return self.prepare(self.base.unet(tensors, self.dtype).to(self.device))

    def prepare(self, unet: Any) -> nn.Module:
        """Its memory format, and whether it computes activations again."""
        if self.options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        network: nn.Module = unet.to(memory_format=torch.channels_last)
        return network

    def check_mask(self) -> None:
        """Refuse a given mask of another network, or with weights that an earlier erasure changed.

        Raises:
            FileFormatError: It does not fit.
            ValueError: It has such weights.
        """
        if self.mask is None:
            return
        path, shapes = self.options.mask_path, self.base.shapes
        for name, parameter in self.mask.parameters.items():
            if shapes.get(name) != parameter.grid.shape:
                raise FileFormatError(
                    f"{path}: is for {name} of shape {parameter.grid.shape}, the UNet of {self.base.path} has "
                    f"{shapes.get(name, 'no such weight')}"
                )
        if self.mask.total != self.base.parameters:
            raise FileFormatError(
                f"{path}: is for {self.mask.total:,} weights, the UNet of {self.base.path} has {self.base.parameters:,}"
            )
        for erasure in self.earlier:
            if names := overlaps(self.mask.parameters, erasure.delta.mask.parameters):
                raise ValueError(f"{path}: has weights of {names[0]} that {erasure.folder} changed; make another one")


def _generator(options: argparse.Namespace, base: PipelineFolder) -> PipelineFolder:
    start = PipelineFolder.read(options.init_generator)
    check_generator(start, base)
    return start


def _t_init(options: argparse.Namespace, start: PipelineFolder, earlier: tuple[EarlierErasure, ...]) -> int | None:
    """Where the generator starts, as the folders say: one generator, or deltas of one, cannot start in two places."""
    said = {f"the generator of {start.path}": start.t_init}
    said |= {f"--earlier {erasure.folder}": erasure.t_init for erasure in earlier}
    known = [(who, t_init) for who, t_init in said.items() if t_init is not None]
    if not known:
        return None
    first, t_init = known[0]
    for who, other in known[1:]:
        if other != t_init:
            raise ValueError(f"{who} starts at {other}, and {first} at {t_init}; their deltas do not add up")
    if options.t_init not in (None, t_init):
        raise ValueError(f"--t_init {options.t_init}: {first} starts at {t_init}; leave it out")
    return t_init


def _with_found(options: argparse.Namespace, t_init: int | None, mask: BlockMask | None) -> argparse.Namespace:
    """The flags, and what the folders and files that they name say in place of some."""
    found: dict[str, Any] = {}
    if t_init is not None:
        found["t_init"] = t_init
    if mask is not None:
        found["mask_density"] = mask.density_asked
    return argparse.Namespace(**vars(options) | found)


def _check_earlier(options: argparse.Namespace, earlier: tuple[EarlierErasure, ...]) -> None:
    for erasure in earlier:
        if erasure.one_step != is_one_step(options):
            kinds = ("an ordinary UNet", "a one-step generator")
            raise ValueError(
                f"--earlier {erasure.folder}: is of {kinds[erasure.one_step]}, --method {options.method} makes "
                f"{kinds[is_one_step(options)]}; their deltas do not add up"
            )
    dense = options.mask == "dense" or options.method == "sfd" or (options.method == "esd" and not _masked(options))
    if earlier and dense:
        raise ValueError("--earlier: every weight would train, those of earlier erasures too; give --mask_density")


def _masked(options: argparse.Namespace) -> bool:
    return any(getattr(options, flag) is not None for flag in ("mask", "mask_density", "mask_path"))
