"""Baseline: one method of the literature for making a multi-step diffusion model forget classes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pecker_fast import distill_output
from pecker_fast.active import ActiveParameters
from pecker_fast.apply import apply_mask, dense_copy
from pecker_fast.baselines import counting, state
from pecker_fast.baselines.config import BaselineConfig, Method
from pecker_fast.baselines.data import Images, check_data, generated
from pecker_fast.baselines.fisher import remember
from pecker_fast.baselines.fresh import starting_network
from pecker_fast.baselines.masks import SalUnMasks
from pecker_fast.baselines.needs import NEEDS, PARTS
from pecker_fast.baselines.objectives import OBJECTIVES
from pecker_fast.baselines.work import Work
from pecker_fast.classes import Classes
from pecker_fast.data import ImageData
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.distill_masks import lr_scale
from pecker_fast.distill_samples import averaged, draw_start
from pecker_fast.distill_updates import make_optimizer, warmup
from pecker_fast.draws import Draws
from pecker_fast.mask import BlockMask
from pecker_fast.pretrain import seeded
from pecker_fast.sampling import ddim_sample
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import Predict, predictor
from pecker_fast.step_metrics import StepMetrics, checked
from pecker_fast.stopping import fresh_seed


class Baseline:
    """Make a class-conditional, noise-predicting diffusion model forget classes by a published update rule.

    The model stays a multi-step one. Which weights train is a mask, as with ``MaskedDistiller``: the published methods
    are "dense" but for SalUn (``salun``). docs/baselines.md has equations, settings and what was not copied.

    Args:
        model: The pretrained network; see ``score_model.predictor`` for what is understood without ``predict``. It is
            copied.
        schedule: The noise schedule it was trained with.
        config: The method, what to forget, and how.
        data: Labelled real images; None where the method needs none (see ``NEEDS``).
        fresh: Where "retrain" starts; it is copied. None initialises a ``DDPMUNet`` anew.
        predict: As for ``MaskedDistiller``.

    Attributes:
        NEEDS: Method -> what data it needs, and what a step costs in F, one forward of the network on a batch.
        network: The one that trains.
        true_score: The frozen original.

    Raises:
        ValueError: ``data`` is missing or does not fit; settings that the schedule has no timesteps for; "retrain" of
            a network that cannot be built again.
    """

    NEEDS: ClassVar[Mapping[Method, tuple[str, str]]] = NEEDS

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: BaselineConfig,
        *,
        data: ImageData | None = None,
        fresh: nn.Module | None = None,
        predict: Predict | None = None,
    ) -> None:
        check_data(data, config, PARTS[config.method], Classes.of_module(model))
        if config.sampling_steps > schedule.num_train_timesteps:
            raise ValueError(
                f"BaselineConfig.sampling_steps: expected at most the schedule's {schedule.num_train_timesteps}, got "
                f"{config.sampling_steps}"
            )
        self.config = config
        self.schedule = schedule
        self.settings = config.for_draws(schedule)
        self.losses = DistillLosses(predict or predictor(model), schedule, self.settings)
        self.base = self.true_score = dense_copy(model, share=config.share_frozen_weights).requires_grad_(False)
        self.network = starting_network(model, config, fresh)
        weight = next(self.true_score.parameters())
        self.device = weight.device
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # of samples and losses, whatever the networks'
        self.draws = Draws(self.settings, self.device, self.dtype)
        self.work = Work(config, self.losses, self.draws, self.network, self.true_score, self._images(data))
        self.masks = SalUnMasks(self.losses, self.draws, self.true_score, self.network, self.work)
        self.steps_done = 0
        self.mask: BlockMask | None = None

    def _images(self, data: ImageData | None) -> dict[str, Images]:
        """Of retained and forgotten classes; a method that trains on neither may choose its mask by them."""
        if data is None:
            return {}
        classes = {"retain": self.config.retained, "forget": self.config.forget}
        images = {name: Images.of(data, labels, self.draws.rng, self.dtype) for name, labels in classes.items()}
        return {name: some for name, some in images.items() if len(some.labels)}

    # -- the mask ----------------------------------------------------------------------------------

    def build_mask(
        self, batches: Iterable[tuple[Tensor, Tensor]] | None = None, *, exclude: Sequence[BlockMask] = ()
    ) -> BlockMask:
        """Choose the active weights as ``config.mask`` says, and get everything ready to train.

        Args:
            batches: Images of classes to forget, (x0, labels) each, for the saliency; None takes ``data``, each image
                once before any comes again, or without data the model's own.
            exclude: Masks whose weights are left alone.

        Returns:
            The mask.

        Raises:
            RuntimeError: There is a mask already.
            ValueError: Nothing is left to choose from.
        """
        self._check_no_mask()
        self.masks.check(batches, exclude)
        with self.draws.undone_on_failure():
            return self.use_mask(self.masks.of_generator(_no_fake_score, batches, exclude))

    def use_mask(self, mask: BlockMask) -> BlockMask:
        """Train with a given mask, for example one read from a file.

        Returns:
            ``mask``.

        Raises:
            RuntimeError: A mask is in use already.
            ValueError: It was made for another network. Nothing has changed then.
        """
        self._check_no_mask()
        lr_scale(mask, self.config.mask)
        all_of_it = all(parameter.is_full for parameter in mask.parameters.values())
        if self.config.method == "retrain" and not all_of_it:
            raise ValueError("mask: 'retrain' trains every weight, from scratch; give it a dense mask")
        unmaskable: Literal["dense", "frozen"] = "dense" if all_of_it else "frozen"
        shared = self.config.share_frozen_weights
        self.active: ActiveParameters = apply_mask(self.network, mask, unmaskable=unmaskable, shared=shared)
        rate = self.config.learning_rate
        self.optimizer = make_optimizer(self.settings, self.active, rate, self.config.ema_decay)
        self.mask = mask
        return mask

    def _check_no_mask(self) -> None:
        if self.mask is not None:
            raise RuntimeError("the baseline has a mask already; make a new Baseline for another one")

    @property
    def lr_scale(self) -> float:
        """What ``config.mask.lr_scale`` multiplies the learning rate by."""
        return 1.0 if self.mask is None else lr_scale(self.mask, self.config.mask)

    # -- one iteration -----------------------------------------------------------------------------

    def prepare(self, *, progress: bool = False) -> None:
        """What Selective Amnesia needs once: its replay and its Fisher information. ``step`` sees to it."""
        if self.mask is None:
            self.build_mask()
        config = self.config
        if config.method != "selective_amnesia" or self.work.memory is not None:
            return
        rng = torch.Generator(self.device).manual_seed(fresh_seed("replay", config.seed))
        labels = torch.tensor(config.retained, device=self.device).repeat_interleave(config.replay_samples)
        model = self.work.guided(self.true_score, 1.0)
        replay = generated(model, self.schedule, config, labels, rng, self.dtype, progress=progress)
        self.work.images["retain"] = Images(replay.images, replay.labels, self.draws.rng)
        self.work.memory = remember(self.work, self.active.parameters(), progress=progress)

    def step(self) -> dict[str, Tensor]:
        """One iteration: the gradients of the method's losses, clipped by norm, and a step of the active weights.

        Returns:
            Of "forget_loss", "retain_loss" and "ewc_loss" those that the method has, before their weights: detached
            0-d tensors; reading their values waits for the device.
        """
        self.prepare()
        config = self.config
        losses: dict[str, Tensor] = {}
        self.optimizer.param_groups[0]["lr"] = (
            config.learning_rate * self.lr_scale * warmup(self.settings, self.steps_done)
        )
        self.network.train()
        self.optimizer.zero_grad()
        with seeded(fresh_seed("dropout", config.seed, self.steps_done), self.device):
            for name, weight, loss in OBJECTIVES[config.method](self.work):
                (weight * loss).backward()
                losses[name] = loss.detach()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.active.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.steps_done += 1
        return losses

    def run(self, steps: int, *, progress: bool = True, label: str = "unlearn") -> Iterator[Mapping[str, float]]:
        """Iterate ``steps`` times, with a progress bar; see ``MaskedDistiller.run``.

        Raises:
            NonFiniteError: A loss is NaN or infinite; on a GPU that is known some steps later.
        """
        self.prepare(progress=progress)
        yield from checked(
            StepMetrics(self.steps_done, losses)
            for losses in (self.step() for _ in tqdm(range(steps), desc=label, unit="step", disable=not progress))
        )

    def flops(self, steps: int | None = None) -> dict[str, Any]:
        """What one ``step`` computes, 2 a multiply-add, as ``MaskedDistiller.flops`` counts; nothing is computed.

        Sampling on the way of "esd" counts as long as it is on average.

        Args:
            steps: Iterations that share the cost of the mask and of the setup; None leaves it apart.

        Returns:
            "network" and "true_score", each {"forward", "input_gradient", "weight_gradient"}; "total", of one step;
            "mask" and "setup" (``prepare``), each with "total", once. With ``steps`` also "steps" and
            "total_with_mask": a step and its share of both.

        Raises:
            RuntimeError: There is no mask yet.
            ValueError: ``steps`` is not a positive integer.
        """
        return counting.flops(self, steps)

    # -- what comes out ----------------------------------------------------------------------------

    def sample(
        self, condition: Tensor | list[int] | int, *, noise: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Samples by DDIM of the averaged weights (or the current ones), in eval mode; training is not disturbed.

        Args:
            condition: Classes, (batch,) or a single one.
            noise: Standard normal start, (batch, *sample_shape); None draws it.
            seed: Of that draw; None takes the global random state.

        Returns:
            (batch, *sample_shape) in [-1, 1], or whatever ``clip_samples`` says.
        """
        labels = torch.as_tensor(condition, device=self.device).reshape(-1)
        if noise is None:
            noise = draw_start((len(labels), *self.config.sample_shape), seed, self.device, self.dtype)
        with self.averaged() as network:
            model = functools.partial(self.losses.predict, network)
            steps, clip = self.config.sampling_steps, self.config.clip_samples
            return ddim_sample(model, self.schedule, noise, labels, steps=steps, clip=clip)

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Within the block the network has its running-average weights, if it keeps one, and is in eval mode."""
        return averaged(self.network, None if self.mask is None else self.active)

    @property
    def generation(self) -> dict[str, Any]:
        """How to sample from the saved network, for its ``config.json``."""
        return {
            "kind": "ddim",
            "steps": self.config.sampling_steps,
            "schedule": self.schedule.to_dict(),
            "sample_shape": list(self.config.sample_shape),
        }

    def save(self, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False) -> None:
        """Write ``model/``, ``mask.safetensors``, ``baseline_config.json`` and, where it can be, ``delta/``.

        Args:
            folder: Where to; what else is in it stays.
            name: Of the delta, for people; None names the classes.
            overwrite: Whether an older result there, of this function, may go.

        Raises:
            FileFormatError: The folder cannot be written, or has an older result or files of yours in the way.
            RuntimeError: There is no mask yet.
        """
        if self.mask is None:
            raise RuntimeError("nothing to save: call build_mask() and step() first")
        with self.averaged() as network:
            distill_output.write(
                self, network, self.mask, folder, settings="baseline_config", name=name, overwrite=overwrite
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers and strings only."""
        return state.state_of(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the next step is the same to the bit, dropout included.

        Raises:
            ValueError: The state has another mask or method than this baseline.
        """
        state.load_state(self, saved)


def _no_fake_score() -> NoReturn:
    raise RuntimeError("a baseline has no fake score to look with")
