"""MaskedDistiller: Score Forgetting Distillation of a one-step generator whose active weights alone train."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pecker_fast import distill_checkpoint, distill_output, distill_state
from pecker_fast.active import ActiveParameters
from pecker_fast.apply import apply_mask, dense_copy
from pecker_fast.checkpoint import StrPath
from pecker_fast.classes import check_networks
from pecker_fast.config import DistillConfig
from pecker_fast.distill_checkpoint import Checkpoint
from pecker_fast.distill_losses import DistillLosses
from pecker_fast.distill_masks import MaskMaker, lr_scale
from pecker_fast.distill_parts import agreed_parts
from pecker_fast.distill_ranks import Ranks
from pecker_fast.distill_samples import averaged, draw_start, sample
from pecker_fast.distill_updates import Learner, Updates, make_optimizer, warmup
from pecker_fast.draws import Draws, check_timesteps
from pecker_fast.mask import BlockMask
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import Predict, predictor
from pecker_fast.step_metrics import StepMetrics, checked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MaskedDistiller:
    """Erase classes from a diffusion model by distilling it into a one-step generator that does not know them.

    Three copies of one network (Chen et al. 2024, arXiv 2409.11219): the frozen true score, a fake score that follows
    the generator's samples, and the generator, of which only the weights under the mask train (PECKER, arXiv
    2604.05634). It needs no images: labels are drawn, samples are the generator's own.

    One ``step`` is one published iteration: the fake score on a batch of retained and a batch of forgotten classes,
    then the generator on two fresh ones, where the true score is asked for the override class instead of the forgotten.

    Args:
        true_score: The pretrained network; see ``score_model.predictor`` for what is understood without ``predict``. It
            is frozen, put in eval mode, and otherwise unchanged.
        schedule: The noise schedule it was trained with.
        config: What to forget, and how.
        generator: Where the one-step generator starts, for example one that was distilled before; it is copied, and
            must stay as it is until ``save``, whose delta begins there. None starts from the true score itself.
        fake_score: Where the fake score starts, which is copied; None starts from the true score. Networks of another
            distiller are taken without their masks.
        process_group: Train together with these processes, one distiller in each, made of the same true score and
            config: every rank draws samples of its own (``config.batch_size`` of them), the gradients of either
            network are averaged in one all-reduce, the first rank makes the mask and writes the files. Every rank
            calls every method; losses are its own. None trains alone.
        predict: How the networks are asked for the noise; a text-to-image network by ``TextConditional(...)``, with
            which a class is a prompt. None asks ``score_model.predictor``.

    Raises:
        RuntimeError: This process is not in ``process_group``.
        ValueError: ``config`` names timesteps that the schedule does not have, or a network names other classes.
    """

    def __init__(
        self,
        true_score: nn.Module,
        schedule: NoiseSchedule,
        config: DistillConfig,
        *,
        generator: nn.Module | None = None,
        fake_score: nn.Module | None = None,
        process_group: ProcessGroup | None = None,
        predict: Predict | None = None,
    ) -> None:
        check_timesteps(config, schedule)
        check_networks({"true_score": true_score, "generator": generator, "fake_score": fake_score})
        self.schedule = schedule
        self.config = config
        self.losses = DistillLosses(predict or predictor(true_score), schedule, config)
        self.base = true_score if generator is None else generator
        share = config.share_frozen_weights
        self.generator = dense_copy(self.base, share=share)
        self.fake_score = dense_copy(true_score if fake_score is None else fake_score, share=share).requires_grad_(True)
        self.true_score = true_score.eval().requires_grad_(False)
        weight = next(true_score.parameters())
        self.device = weight.device
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # of samples and losses, whatever the networks'
        self.ranks = Ranks(process_group, self.device)
        self.draws = Draws(config, self.device, self.dtype, self.ranks.seed(config.seed))
        self.masks = MaskMaker(self.losses, self.draws, self.true_score, self.generator)
        self.steps_done = 0
        self.mask: BlockMask | None = None

    # -- the masks ---------------------------------------------------------------------------------

    def build_mask(
        self, batches: Iterable[tuple[Tensor, Tensor]] | None = None, *, exclude: Sequence[BlockMask] = ()
    ) -> BlockMask:
        """Choose the generator's active weights as ``config.mask`` says, and get everything ready to train.

        The published saliency mask is PECKER's: the generator frozen, the noise-prediction loss on the classes to
        forget.

        Args:
            batches: Images of classes to forget, (x0, labels) each; None takes samples of the generator.
            exclude: Masks whose weights are left alone, for example those of earlier erasures.

        Returns:
            The mask.

        Raises:
            ValueError: Images, for a saliency that takes none; nothing left to choose from.
        """
        self._check_no_mask()
        self.masks.check(batches, exclude)
        if self.ranks.group is not None:
            self.ranks.check_same(agreed_parts(self))
        with self.draws.undone_on_failure():
            ahead = self._updates.ahead(self.fake_score)
            make = functools.partial(self.masks.of_generator, lambda: ahead, batches, exclude)
            return self.use_mask(self.ranks.shared_mask(make))

    def use_mask(self, mask: BlockMask, fake_score_mask: BlockMask | None = None) -> BlockMask:
        """Train with a given mask, for example one read from a file.

        Args:
            mask: Of the generator.
            fake_score_mask: Of the fake score; None chooses it as ``config.fake_score_mask`` says.

        Returns:
            ``mask``.

        Raises:
            RuntimeError: A mask is in use already; or another rank has another mask, true score, generator or config.
            ValueError: One of them was made for another network. Nothing has changed then.
        """
        self._check_no_mask()
        if self.ranks.group is not None:
            self.ranks.check_same(agreed_parts(self, mask))
        config = self.config
        lr_scale(mask, config.mask)
        with self.draws.undone_on_failure():
            if fake_score_mask is None:
                fake_score_mask = self.ranks.shared_mask(lambda: self.masks.of_fake_score(self.fake_score))
            lr_scale(fake_score_mask, config.mask_of_fake_score)
            active, fake_active = self._apply(mask, fake_score_mask)
        self.generator_optimizer = make_optimizer(config, active, config.generator_lr, config.ema_decay)
        self.fake_score_optimizer = make_optimizer(config, fake_active, config.fake_score_lr)
        self.active, self.mask, self.fake_score_mask = active, mask, fake_score_mask
        return mask

    def _apply(self, mask: BlockMask, fake_score_mask: BlockMask) -> tuple[ActiveParameters, ActiveParameters]:
        """Both masks, or none."""
        all_of_it = all(parameter.is_full for parameter in fake_score_mask.parameters.values())
        shared = self.config.share_frozen_weights
        unmaskable: Literal["dense", "frozen"] = "dense" if all_of_it else "frozen"
        active = apply_mask(self.generator, mask, shared=shared)
        try:
            return active, apply_mask(self.fake_score, fake_score_mask, unmaskable=unmaskable, shared=shared)
        except BaseException:
            active.remove()
            raise

    def _check_no_mask(self) -> None:
        if self.mask is not None:
            raise RuntimeError("the distiller has a mask already; make a new MaskedDistiller for another one")

    @property
    def lr_scale(self) -> float:
        """What ``config.mask.lr_scale`` multiplies the generator's learning rate by."""
        return 1.0 if self.mask is None else lr_scale(self.mask, self.config.mask)

    @property
    def fake_score_lr_scale(self) -> float:
        """What the fake score's learning rate is multiplied by, for its own mask."""
        return 1.0 if self.mask is None else lr_scale(self.fake_score_mask, self.config.mask_of_fake_score)

    # -- one iteration -----------------------------------------------------------------------------

    def step(self) -> dict[str, Tensor]:
        """One iteration: an update of the fake score, then one of the generator.

        Returns:
            "fake_score_loss" and "generator_loss", detached 0-d tensors; reading their values waits for the device.
        """
        if self.mask is None:
            self.build_mask()
        config, share = self.config, warmup(self.config, self.steps_done)
        lr, fake_score_lr = config.generator_lr * self.lr_scale, config.fake_score_lr * self.fake_score_lr_scale
        losses = self._updates.iteration(
            Learner(self.generator, self.generator_optimizer, lr * share),
            Learner(self.fake_score, self.fake_score_optimizer, fake_score_lr * share),
        )
        self.steps_done += 1
        return losses

    def compile(self, **options: Any) -> None:
        """Compile the three networks in place: ``network.compile(**options)`` of each; the next step begins with it.

        Chooses the mask first, if there is none: a compiled network belongs to its mask. Input gradients of frozen skip
        connections are computed then, and dropped: which they are is not known while a network is traced.

        Args:
            **options: Of ``torch.compile``, for example ``mode="reduce-overhead"``.
        """
        if self.mask is None:
            self.build_mask()
        for network in (self.true_score, self.generator, self.fake_score):
            network.compile(**options)

    @property
    def _updates(self) -> Updates:
        return Updates(self.losses, self.draws, self.ranks, self.true_score, self.generator)

    def flops(self, steps: int | None = None) -> dict[str, Any]:
        """What one ``step`` computes by network and by kind, 2 a multiply-add, as ``torch.utils.flop_counter`` counts.

        Nothing is computed and nothing of the run changes: the step runs on a copy whose weights have no data. Hooks
        that the networks carry run there too. Counted are matrix products, convolutions and attention, our own ops
        included, on every device; elementwise work, norms and optimizers are not. Recomputed forward passes count as
        forward, the backward pass of attention as input gradient.

        Args:
            steps: Iterations that share the cost of the mask; None leaves that cost apart.

        Returns:
            "generator", "true_score" and "fake_score", each {"forward", "input_gradient", "weight_gradient"}; "total",
            of one iteration; "mask": what ``build_mask()`` computes by ``config.mask`` when it draws its own samples,
            once, with the same kinds and "total", all zero unless saliency is looked at. With ``steps`` also
            "steps" and "per_step" in "mask", and "total_with_mask": an iteration and its share of the mask.

        Raises:
            RuntimeError: There is no mask yet.
            ValueError: ``steps`` is not a positive integer.
        """
        from pecker_fast.iteration_flops import iteration_flops  # torch's counter imports triton if it is there

        return iteration_flops(self, steps)

    def run(self, steps: int, *, progress: bool = True, label: str = "unlearn") -> Iterator[Mapping[str, float]]:
        """Iterate ``steps`` times, with a progress bar.

        Args:
            steps: Iterations.
            progress: Whether to show the bar, on stderr.
            label: What stands before it.

        Yields:
            After every step: "step" (counted over the distiller's life) and the losses. On a GPU the step may still be
            under way: it is waited for when a loss is read, and only then (see ``StepMetrics``).

        Raises:
            NonFiniteError: A loss is NaN or infinite; on a GPU that is known some steps later.
        """
        bar = tqdm(range(steps), desc=label, unit="step", disable=not progress or self.ranks.rank > 0)
        yield from checked(self._measured_step() for _ in bar)

    def _measured_step(self) -> StepMetrics:
        losses = self.step()
        return StepMetrics(self.steps_done, losses)

    # -- what comes out ----------------------------------------------------------------------------

    def sample(
        self, condition: Tensor | list[int] | int, *, noise: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """One-step samples of the generator's running average, in eval mode; training is not disturbed.

        Args:
            condition: Classes, (batch,) or a single one.
            noise: Standard normal start, (batch, *sample_shape); None draws it.
            seed: Of that draw; None takes the global random state.

        Returns:
            (batch, *sample_shape), about [-1, 1].
        """
        labels = torch.as_tensor(condition, device=self.device).reshape(-1)
        if noise is None:
            noise = draw_start((len(labels), *self.config.sample_shape), seed, self.device, self.dtype)
        with self.averaged() as generator:
            return sample(generator, self.losses, noise, labels)

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Within the block the generator has its running-average weights and is in eval mode."""
        return averaged(self.generator, None if self.mask is None else self.active)

    def save(self, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False) -> None:
        """Write ``model/`` (the averaged generator), ``mask.safetensors`` and ``distill_config.json`` into ``folder``.

        ``pecker_fast.models.load(folder / "model")`` reads a DDPMUNet back, diffusers' ``from_pretrained`` its own
        models; of any other module ``model/`` holds the weights, to be loaded into it with safetensors. ``delta/`` is
        what changed since the true score, or since the generator that was given (see ``Delta``), where it still has
        that one's dtype and buffers.

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
        with self.ranks.first_writes() as mine, self.averaged() as generator:
            if mine:
                distill_output.write(self, generator, self.mask, folder, name=name, overwrite=overwrite)

    @property
    def generation(self) -> dict[str, Any]:
        """How to sample from the saved generator, for its ``config.json``."""
        return {
            "kind": "one_step",
            "t_init": self.config.t_init,
            "schedule": self.schedule.to_dict(),
            "sample_shape": list(self.config.sample_shape),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers and strings only."""
        return distill_state.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the next step is the same to the bit (dropout draws apart).

        Raises:
            ValueError: The state has another mask than the one in use.
        """
        distill_state.load_state(self, state)

    def save_checkpoint(
        self, root: StrPath, *, total_limit: int | None = None, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write ``root/checkpoint-{step}``: all that the next step depends on, without the weights that never change.

        It appears complete or not at all. Nothing is pickled.

        Args:
            root: The folder that checkpoints are in.
            total_limit: Afterwards remove checkpoints of the lowest steps until so many are left; None keeps all.
            extra: JSON values of the caller's own, which ``load_checkpoint`` gives back.

        Returns:
            The folder.

        Raises:
            FileFormatError: It cannot be written; older checkpoints stay as they were.
            RuntimeError: There is no mask yet.
            ValueError: ``total_limit`` is below 1, or ``extra`` holds NaN.
        """
        return distill_checkpoint.save(self, root, total_limit=total_limit, extra=extra)

    def load_checkpoint(self, checkpoint: StrPath, root: StrPath | None = None) -> Checkpoint:
        """Continue from a checkpoint: the next step is the one that would have come, to the bit, dropout included.

        torch's global random state becomes that of the checkpoint too. A refused call changes nothing.

        Args:
            checkpoint: Its folder, or "latest": the finished one of the highest step in ``root``.
            root: The folder that checkpoints are in; ``checkpoint`` is looked up in it.

        Returns:
            Its folder, step, and what the caller saved along with it.

        Raises:
            FileFormatError: It is missing, unfinished or damaged, or ``root`` has none.
            ValueError: It was saved with other settings, another mask, true score or starting generator, or on another
                kind of device.
        """
        return distill_checkpoint.load(self, checkpoint, root)
