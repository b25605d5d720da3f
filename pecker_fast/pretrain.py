"""Training from scratch: the noise-predicting teacher and the classifier that judges its samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pecker_fast.classes import Classes, check_same
from pecker_fast.data.images import ImageData
from pecker_fast.errors import NonFiniteError
from pecker_fast.pretrain_checkpoint import Checkpoints, State, described
from pecker_fast.schedule import NoiseSchedule


def train_denoiser(
    model: nn.Module,
    data: ImageData,
    schedule: NoiseSchedule,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 5e-3,
    ema_decay: float = 0.998,
    class_dropout: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    warmup_steps: int = 0,
    first_step: int = 0,
    autocast: torch.dtype | None = None,
    checkpoints: Checkpoints | None = None,
) -> nn.Module:
    """Train a class-conditional DDPM by noise prediction (Ho et al. 2020, "simple" loss).

    Adam with a cosine learning rate, antithetic timesteps, gradients clipped to norm 1. ``model`` is trained
    in place; what is worth keeping is the average of its weights that is returned. A training that is resumed from
    one of its checkpoints gives the same bits as one that was never interrupted (on one device and thread count).

    Args:
        model: ``(x_t, t, label) -> epsilon``, on the device to train on; all parameters must be trainable.
        data: Images in [-1, 1] and labels; moved to the model's device as a whole.
        schedule: Noise schedule.
        steps: Optimizer steps.
        batch_size: Images per step, drawn with replacement.
        learning_rate: Peak learning rate.
        ema_decay: Final decay of the weight average; it grows towards this, so that the start is forgotten.
        class_dropout: Share of labels replaced by the null class ``len(data.class_names)``.
        seed: Fixes batches, noise and dropout (on one device and thread count).
        progress: Show a progress bar on stderr.
        warmup_steps: The learning rate grows linearly over so many steps at first.
        first_step: Go on after this step of the schedule, from the model's weights, with a new optimizer, a new average
            and other draws: what is left to do where an earlier training left nothing but its weights.
        autocast: Run the network in this dtype where ``torch.autocast`` does; weights stay as they are.
        checkpoints: When to save, where to resume, and how long to train.

    Returns:
        A copy of the model with averaged weights, in eval mode; it carries the classes of ``data`` (`Classes`).

    Raises:
        FileFormatError: A checkpoint is missing or damaged, or cannot be written.
        KeyboardInterrupt: ``checkpoints`` was told to interrupt; a checkpoint is written.
        NonFiniteError: The loss became NaN or infinite.
        OutOfTimeError: The time that ``checkpoints`` allows is up; a checkpoint is written.
        ValueError: An argument is out of range, a parameter of the model is frozen, its classes are not those of
            ``data``, or a checkpoint is of other settings.
    """
    _check_arguments(model, data, steps=steps, batch_size=batch_size)
    if not 0.0 <= class_dropout < 1.0 or not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"class_dropout, ema_decay must lie in [0, 1), got {class_dropout}, {ema_decay}")
    if warmup_steps < 0 or not 0 <= first_step < steps:
        raise ValueError(
            f"expected warmup_steps >= 0 and first_step in [0, {steps}), got {warmup_steps} and {first_step}"
        )
    _take_classes(model, data)
    # What tensor cores want; on CPUs it costs nothing.
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(model, multi_avg_fn=_warmed_up_average(ema_decay))
    images, labels = _on_device_of(model, data)
    draw = torch.Generator(images.device).manual_seed(seed + first_step)

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(images), (batch_size,), generator=draw, device=images.device)
        x0, condition = images[index].contiguous(memory_format=torch.channels_last), labels[index]
        if class_dropout:
            drop = torch.rand(batch_size, generator=draw, device=images.device) < class_dropout
            condition = condition.masked_fill(drop, len(data.class_names))
        t = antithetic_timesteps(batch_size, schedule.num_train_timesteps, draw)
        epsilon = torch.empty_like(x0).normal_(generator=draw)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            return F.mse_loss(model(schedule.add_noise(x0, epsilon, t), t, condition), epsilon)

    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    rates = _rates(optimizer, steps, first_step, warmup_steps)
    done = first_step
    with seeded(seed + first_step, images.device):
        if checkpoints is not None:
            settings = {
                "steps": steps,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "ema_decay": ema_decay,
                "class_dropout": class_dropout,
                "seed": seed,
                "warmup_steps": warmup_steps,
                "autocast": str(autocast),
                "schedule": schedule.to_dict(),
            }
            state = State(model, average, optimizer, rates, draw, {**settings, **described(data, images.device)}, steps)
            done = checkpoints.begin(state) or first_step
        todo: dict[str, Any] = {"steps": steps, "done": done, "name": "denoiser", "progress": progress}
        for step in _optimize(model, optimizer, rates, loss_of_batch, **todo):
            average.update_parameters(model)
            if checkpoints is not None:
                checkpoints.after(step, state)
    trained: nn.Module = average.module
    return trained.eval()


def _rates(optimizer: torch.optim.Optimizer, steps: int, done: int, warmup: int) -> tuple[LRScheduler, ...]:
    """A cosine over ``steps`` of which some are done, after a linear warm-up from here."""
    cosine = CosineAnnealingLR(optimizer, steps)
    if done:
        for group in optimizer.param_groups:
            group["lr"] *= (1 + math.cos(math.pi * done / steps)) / 2
        rates = [group["lr"] for group in optimizer.param_groups]
        cosine.load_state_dict({"last_epoch": done, "_step_count": done + 1, "_last_lr": rates})
    if not warmup:
        return (cosine,)
    return cosine, LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)


def train_classifier(
    model: nn.Module,
    data: ImageData,
    *,
    steps: int = 300,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    augment: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Train a classifier in place by cross-entropy: AdamW, cosine learning rate, gradients clipped to norm 1.

    Args:
        model: ``images -> logits``, on the device to train on; all parameters must be trainable.
        data: Images in [-1, 1] and labels; moved to the model's device as a whole.
        steps: Optimizer steps.
        batch_size: Images per step, drawn with replacement.
        learning_rate: Peak learning rate.
        augment: Flip half of the images left to right, and shift each by up to an eighth of its size, with the
            margin mirrored. For images whose classes survive that; digits do not.
        seed: Fixes the batches (on one device and thread count).
        progress: Show a progress bar on stderr.

    Returns:
        The same model, in eval mode; it carries the classes of ``data`` (`Classes`).

    Raises:
        ValueError: An argument is out of range, a parameter of the model is frozen, or its classes are not those of
            ``data``.
        NonFiniteError: The loss became NaN or infinite.
    """
    _check_arguments(model, data, steps=steps, batch_size=batch_size)
    _take_classes(model, data)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = _on_device_of(model, data)
    draw = torch.Generator(images.device).manual_seed(seed)

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(images), (batch_size,), generator=draw, device=images.device)
        batch = augmented(images[index], draw) if augment else images[index]
        batch = batch.contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    rates = _rates(optimizer, steps, 0, 0)
    with seeded(seed, images.device):
        for _ in _optimize(model, optimizer, rates, loss_of_batch, steps=steps, name="classifier", progress=progress):
            pass
    return model.eval()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images flipped left to right by a coin and shifted by up to an eighth of their size, margins mirrored.

    Args:
        images: (B, C, H, W).
        generator: Of the draws, on the images' device.

    Returns:
        New images, (B, C, H, W).
    """
    batch, channels, height, width = images.shape
    device = images.device
    flip = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
    images = torch.where(flip, images.flip(3), images)
    margin = min(height, width) // 8
    padded = F.pad(images, (margin,) * 4, mode="reflect")
    shift = torch.randint(2 * margin + 1, (2, batch, 1), generator=generator, device=device)
    rows = shift[0] + torch.arange(height, device=device)
    columns = shift[1] + torch.arange(width, device=device)
    which, channel = torch.arange(batch, device=device), torch.arange(channels, device=device)
    return padded[which[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[LRScheduler],
    loss_of_batch: Callable[[], Tensor],
    *,
    steps: int,
    name: str,
    progress: bool,
    done: int = 0,
) -> Iterator[int]:
    """Take those of ``steps`` steps that are not done yet, yielding after each how many are."""
    parameters = list(model.parameters())
    with tqdm(total=steps, initial=done, desc=f"training {name}", disable=not progress) as bar:
        for step in range(done, steps):
            loss = loss_of_batch()
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of the {name} became {loss.item()} at step {step + 1} of {steps}; "
                    "lower learning_rate or check the images"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for rate in rates:
                rate.step()
            bar.update()
            yield step + 1


def antithetic_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 timesteps in pairs ``t`` and ``total - 1 - t``: less variance at the same cost."""
    half = torch.randint(total, ((count + 1) // 2,), generator=generator, device=generator.device)
    return torch.cat([half, total - 1 - half])[:count]


def _warmed_up_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential average for `AveragedModel` whose decay starts small, so that early weights fade."""

    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        seen = int(updates)
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + seen) / (10 + seen)))

    return update


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which dropout draws from, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _take_classes(model: nn.Module, data: ImageData) -> None:
    """Let the model carry the classes of ``data``, or go on with those that it has: what it saw once, it has seen."""
    classes, earlier = Classes.of_images(data), Classes.of_module(model)
    settings = getattr(model, "config", None)
    count = settings.get("num_classes", classes.count) if isinstance(settings, Mapping) else classes.count
    if count != classes.count:
        raise ValueError(f"data: expected {count} classes, the model's, got {classes.count}")
    if earlier is not None:
        check_same({"the model": earlier, "data": classes})
        unseen = tuple(label for label in classes.unseen if label in earlier.unseen)
        classes = replace(earlier if earlier.named else classes, unseen=unseen)
    classes.put_on(model)


def _on_device_of(model: nn.Module, data: ImageData) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return data.images.to(device), data.labels.to(device)


def _check_arguments(model: nn.Module, data: ImageData, *, steps: int, batch_size: int) -> None:
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if len(data) == 0:
        raise ValueError("cannot train on no images; data is empty")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        # Besides being surprising, torch 2.13 crashes in group norm's backward just above a frozen prefix.
        raise ValueError(f"{len(frozen)} parameters are frozen (first: {frozen[0]}); call requires_grad_()")
