"""MaskedDistiller: Score Forgetting Distillation of a one-step generator whose active weights alone train."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pecker_fast import distill_checkpoint
from pecker_fast.active import ActiveParameters
from pecker_fast.apply import apply_mask
from pecker_fast.checkpoint import StrPath, atomic_folder, write_json
from pecker_fast.config import DistillConfig, MaskConfig
from pecker_fast.delta import Delta
from pecker_fast.delta.state import only_weights_changed
from pecker_fast.distill_checkpoint import Checkpoint
from pecker_fast.distill_parts import agreed_parts
from pecker_fast.distill_ranks import Ranks
from pecker_fast.draws import Batch, Draws
from pecker_fast.errors import NonFiniteError
from pecker_fast.mask import BlockMask
from pecker_fast.models import storage
from pecker_fast.objectives import denoising_loss, score_difference_loss, sid_loss
from pecker_fast.optim import MaskedAdamW
from pecker_fast.saliency import compute_saliency
from pecker_fast.sampling import one_step_sample
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import predictor

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
        true_score: The pretrained network; see ``score_model.predictor`` for what is understood. It is frozen, put in
            eval mode, and otherwise unchanged.
        schedule: The noise schedule it was trained with.
        config: What to forget, and how.
        generator: Where the one-step generator starts; None starts from the true score itself.
        process_group: Train together with these processes, one distiller in each, made of the same true score and
            config: every rank draws samples of its own (``config.batch_size`` of them), the gradients of either
            network are averaged in one all-reduce, the first rank makes the mask and writes the files. Every rank
            calls every method; losses are its own. None trains alone.

    Raises:
        RuntimeError: This process is not in ``process_group``.
        ValueError: ``config`` names timesteps that the schedule does not have.
    """

    def __init__(
        self,
        true_score: nn.Module,
        schedule: NoiseSchedule,
        config: DistillConfig,
        *,
        generator: nn.Module | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        last = max(config.t_init, config.t_max - 1)
        if last >= schedule.num_train_timesteps:
            raise ValueError(
                f"DistillConfig: t_init={config.t_init} and t_max={config.t_max} reach timestep {last}, but the "
                f"schedule has {schedule.num_train_timesteps}"
            )
        self.schedule = schedule
        self.config = config
        self._predict = predictor(true_score)
        self.generator = copy.deepcopy(true_score if generator is None else generator)
        self._from_true_score = generator is None
        self.fake_score = copy.deepcopy(true_score).requires_grad_(True)
        self.true_score = true_score.eval().requires_grad_(False)
        weight = next(true_score.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.ranks = Ranks(process_group, self.device)
        self.draws = Draws(config, self.device, self.dtype, self.ranks.seed(config.seed))
        self.steps_done = 0
        self.mask: BlockMask | None = None

    # -- the mask ----------------------------------------------------------------------------------

    def build_mask(self, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> BlockMask:
        """Choose the generator's active weights as ``config.mask`` says, and get everything ready to train.

        The saliency mask is PECKER's: the generator frozen, the noise-prediction loss on the classes to forget.

        Args:
            batches: Images of classes to forget, (x0, labels) each; None takes samples of the generator.

        Returns:
            The mask.
        """
        return self.use_mask(self.ranks.shared_mask(lambda: self._make_mask(batches)))

    def _make_mask(self, batches: Iterable[tuple[Tensor, Tensor]] | None) -> BlockMask:
        mask = self.config.mask
        if batches is None:
            batches = (self._forget_batch() for _ in range(mask.batches))
        return self._chosen(self.generator, mask, batches)

    def _chosen(self, network: nn.Module, mask: MaskConfig, batches: Iterable[tuple[Tensor, Tensor]]) -> BlockMask:
        if mask.kind == "dense":
            return BlockMask.dense(network)
        if mask.kind == "random":
            return BlockMask.random(network, mask.density, mask.block, self.config.seed)
        saliency = compute_saliency(network, self._saliency_loss, batches, mask.accumulate)
        return BlockMask.from_saliency(saliency, mask.density, mask.block, mask.scope)

    def use_mask(self, mask: BlockMask, fake_score_mask: BlockMask | None = None) -> BlockMask:
        """Train with a given mask, for example one read from a file.

        Args:
            mask: Of the generator.
            fake_score_mask: Of the fake score; None chooses it as ``config.fake_score_mask`` says.

        Returns:
            ``mask``.

        Raises:
            RuntimeError: A mask is in use already; or another rank has another mask, true score, generator or config.
            ValueError: It was made for another network.
        """
        if self.mask is not None:
            raise RuntimeError("the distiller has a mask already; make a new MaskedDistiller for another one")
        if self.ranks.group is not None:
            self.ranks.check_same(agreed_parts(self, mask))
        config = self.config
        self.active = apply_mask(self.generator, mask)
        self.mask = mask
        self.generator_optimizer = self._optimizer(self.active, config.generator_lr, config.ema_decay)
        if fake_score_mask is None:
            of_fake_score = config.fake_score_mask or MaskConfig(kind="dense")
            batches = (self._batch_of_all() for _ in range(of_fake_score.batches))
            fake_score_mask = self.ranks.shared_mask(lambda: self._chosen(self.fake_score, of_fake_score, batches))
        self.fake_score_mask = fake_score_mask
        all_of_it = all(parameter.is_full for parameter in fake_score_mask.parameters.values())
        fake_active = apply_mask(self.fake_score, fake_score_mask, unmaskable="dense" if all_of_it else "frozen")
        self.fake_score_optimizer = self._optimizer(fake_active, config.fake_score_lr, None)
        return mask

    def _optimizer(self, active: ActiveParameters, lr: float, ema_decay: float | None) -> MaskedAdamW:
        config = self.config
        return MaskedAdamW(
            active,
            lr,
            config.betas,
            config.eps,
            config.weight_decay,
            clip_value=config.clip_value,
            ema_decay=ema_decay,
        )

    @property
    def lr_scale(self) -> float:
        """What ``config.mask.lr_scale`` multiplies the generator's learning rate by."""
        rule = self.config.mask.lr_scale
        if self.mask is None or rule == "none":
            return 1.0
        density = self.mask.density
        by_density = rule == "density" or self.mask.mass is None  # chance has as much mass as density
        return 1 / density if by_density else 1 / math.sqrt(cast(float, self.mask.mass) * density)

    def _batch_of_all(self) -> tuple[Tensor, Tensor]:
        """What the fake score trains on: samples of retained and forgotten classes."""
        batch = self.draws.batch()
        with torch.no_grad():
            return self._generate(batch.noise, batch.labels), batch.labels

    def _forget_batch(self) -> tuple[Tensor, Tensor]:
        labels = self.draws.forgotten(self.config.mask.batch_size)
        with torch.no_grad():
            return self._generate(self.draws.noise(len(labels)), labels), labels

    def _saliency_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x0, labels = (tensor.to(self.device) for tensor in batch)
        t = self.draws.timesteps(len(x0), 0, self.schedule.num_train_timesteps)
        epsilon = self.draws.noise(len(x0))
        return denoising_loss(epsilon, self._predict(model, self.schedule.add_noise(x0, epsilon, t), t, labels)).mean()

    # -- one iteration -----------------------------------------------------------------------------

    def step(self) -> dict[str, Tensor]:
        """One iteration: an update of the fake score, then one of the generator.

        Returns:
            "fake_score_loss" and "generator_loss", detached 0-d tensors; reading their values waits for the device.
        """
        if self.mask is None:
            self.build_mask()
        shared = self._samples() if self.config.reuse_generator_forward else None
        metrics = {"fake_score_loss": self._update_fake_score(shared), "generator_loss": self._update_generator(shared)}
        self.steps_done += 1
        return metrics

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
            once, with the same kinds and "total", all zero unless the kind is "saliency". With ``steps`` also
            "steps" and "per_step" in "mask", and "total_with_mask": an iteration and its share of the mask.

        Raises:
            RuntimeError: There is no mask yet.
            ValueError: ``steps`` is not a positive integer.
        """
        from pecker_fast.iteration_flops import iteration_flops  # torch's counter imports triton if it is there

        return iteration_flops(self, steps)

    def run(self, steps: int, *, progress: bool = True, label: str = "unlearn") -> Iterator[dict[str, float]]:
        """Iterate ``steps`` times, with a progress bar.

        Args:
            steps: Iterations.
            progress: Whether to show the bar, on stderr.
            label: What stands before it.

        Yields:
            After every step: "step" (counted over the distiller's life) and the losses.

        Raises:
            NonFiniteError: A loss is NaN or infinite.
        """
        for _ in tqdm(range(steps), desc=label, unit="step", disable=not progress or self.ranks.rank > 0):
            metrics = {name: float(value) for name, value in self.step().items()}
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"step {self.steps_done}: {name} is {value}; lower the learning rates or raise warmup_steps"
                    )
            yield {"step": self.steps_done, **metrics}

    def _samples(self) -> tuple[Batch, Tensor]:
        """What the generator learns from: a batch, and its samples with their graph."""
        self.generator.train()
        self.generator_optimizer.zero_grad()
        batch = self.draws.batch()
        return batch, self._generate(batch.noise, batch.labels)

    def _update_fake_score(self, shared: tuple[Batch, Tensor] | None = None) -> Tensor:
        """The fake score learns the generator's samples: noise prediction on x0 = G(z, c), the generator fixed."""
        optimizer = self.fake_score_optimizer
        self.fake_score.train()
        optimizer.active.requires_grad_(True)
        optimizer.zero_grad()
        if shared is None:
            self.generator.eval()
            batch = self.draws.batch()
            with torch.no_grad():
                x0 = self._generate(batch.noise, batch.labels)
        else:
            batch, x0 = shared[0], shared[1].detach()
        x_t = self.schedule.add_noise(x0, batch.epsilon, batch.t)
        losses = denoising_loss(batch.epsilon, self._predict(self.fake_score, x_t, batch.t, batch.labels))
        return self._step(optimizer, (batch.weights * losses).sum(), self.config.fake_score_lr)

    def _update_generator(self, shared: tuple[Batch, Tensor] | None = None) -> Tensor:
        """The generator moves its samples to where the true score, asked for the target class, wants them."""
        optimizer, config = self.generator_optimizer, self.config
        self.fake_score.eval()
        self.fake_score_optimizer.active.requires_grad_(False)
        batch, x0 = self._samples() if shared is None else (self.draws.again(shared[0]), shared[1])
        x_t = self.schedule.add_noise(x0, batch.epsilon, batch.t)
        with torch.no_grad() if config.stop_gradient else nullcontext():
            epsilon_true = self._predict(self.true_score, x_t, batch.t, batch.targets)
            epsilon_fake = self._predict(self.fake_score, x_t, batch.t, batch.labels)
        sigma = self.schedule.sigma(batch.t, x_t).flatten()
        if config.stop_gradient:
            losses = score_difference_loss(x0, batch.epsilon, epsilon_true, epsilon_fake, sigma)
        else:
            losses = sid_loss(batch.epsilon, epsilon_true, epsilon_fake, sigma, config.sid_alpha)
        return self._step(optimizer, (batch.weights * losses).sum(), self.config.generator_lr * self.lr_scale)

    def _step(self, optimizer: MaskedAdamW, loss: Tensor, lr: float) -> Tensor:
        warmup = self.config.warmup_steps
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (self.steps_done + 1) / warmup) if warmup else lr
        loss.backward()
        if self.ranks.group is not None:
            optimizer.active.all_reduce_(self.ranks.group)
        optimizer.step()
        return loss.detach()

    def _generate(self, noise: Tensor, labels: Tensor) -> Tensor:
        """One-step samples: x0 = (b z - b eps(b z, t_init, c)) / a = sigma_init (z - eps)."""
        t_init = self.config.t_init
        x_init = self.schedule.std(t_init) * noise
        t = torch.full((len(labels),), t_init, device=self.device)
        return self.schedule.predict_x0(x_init, self._predict(self.generator, x_init, t, labels), t_init)

    # -- what comes out ----------------------------------------------------------------------------

    @torch.no_grad()
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
            rng = None if seed is None else torch.Generator(self.device).manual_seed(seed)
            shape = (len(labels), *self.config.sample_shape)
            noise = torch.randn(shape, generator=rng, device=self.device).to(self.dtype)
        with self.averaged() as generator:
            predict = functools.partial(self._predict, generator)
            return one_step_sample(predict, self.schedule, noise, labels, t_init=self.config.t_init)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Within the block the generator has its running-average weights and is in eval mode."""
        training = self.generator.training
        ema = self.mask is not None and self.active.ema is not None
        try:
            self.generator.eval()
            with self.active.ema_weights() if ema else nullcontext():
                yield self.generator
        finally:
            self.generator.train(training)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model/`` (the averaged generator), ``mask.safetensors`` and ``distill_config.json`` into ``folder``.

        ``pecker_fast.models.load(folder / "model")`` reads a DDPMUNet back, diffusers' ``from_pretrained`` its own
        models; of any other module ``model/`` holds the weights, to be loaded into it with safetensors. ``delta/`` is
        what changed since the true score (see ``Delta``), where the generator started from it and still has its dtype
        and buffers.

        Raises:
            FileFormatError: The folder cannot be written; an older model in it stays as it was.
            RuntimeError: There is no mask yet.
        """
        if self.mask is None:
            raise RuntimeError("nothing to save: call build_mask() and step() first")
        with self.ranks.first_writes() as mine:
            if mine:
                self._write(folder, self.mask)

    def _write(self, folder: StrPath, mask: BlockMask) -> None:
        with atomic_folder(folder) as unfinished, self.averaged() as generator:
            (unfinished / "model").mkdir()
            if self._from_true_score and only_weights_changed(self.true_score, generator):
                name = f"forget {', '.join(map(str, self.config.forget))}"
                metadata = {"distill_config": self.config.to_dict(), "generation": self.generation}
                delta = Delta.extract(self.true_score, generator, mask, name=name, metadata=metadata, progress=False)
                delta.save(unfinished / "delta")
            storage.write_model(generator, unfinished / "model", self.generation)
            mask.save(unfinished / "mask.safetensors")
            write_json(unfinished / "distill_config.json", self.config.to_dict())

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
        if self.mask is None:
            raise RuntimeError("no state yet: call build_mask() first")
        (mask, header), (fake_mask, fake_header) = (m.to_tensors() for m in (self.mask, self.fake_score_mask))
        return {
            "steps_done": self.steps_done,
            "mask": mask,
            "mask_header": header,
            "fake_score_mask": fake_mask,
            "fake_score_mask_header": fake_header,
            "generator": self.generator.state_dict(),
            "fake_score": self.fake_score.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "fake_score_optimizer": self.fake_score_optimizer.state_dict(),
            "rng": self.draws.rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the next step is the same to the bit (dropout draws apart).

        Raises:
            ValueError: The state has another mask than the one in use.
        """
        mask, fake_score_mask = (
            BlockMask.from_tensors(state[name], state[f"{name}_header"]) for name in ("mask", "fake_score_mask")
        )
        if self.mask is None:
            self.use_mask(mask, fake_score_mask)
        elif self.mask != mask or self.fake_score_mask != fake_score_mask:
            raise ValueError("the state was saved with another mask; load it into a new MaskedDistiller")
        self.generator.load_state_dict(state["generator"])
        self.fake_score.load_state_dict(state["fake_score"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.fake_score_optimizer.load_state_dict(state["fake_score_optimizer"])
        self.draws.rng.set_state(state["rng"])
        self.steps_done = state["steps_done"]

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
